"""The commands, and how text becomes objects."""
