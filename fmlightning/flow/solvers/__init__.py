"""How a model makes samples."""
