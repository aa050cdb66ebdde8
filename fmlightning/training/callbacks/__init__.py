"""When to look at a model, and what to log."""
