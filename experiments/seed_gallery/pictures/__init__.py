"""The pictures of the gallery, one a file: each `draw` yields the names and contents of its files."""
