"""Data that come in pairs (x0, x1)."""
