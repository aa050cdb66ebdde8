"""The closed-form oracle, and the theorems held against it."""
