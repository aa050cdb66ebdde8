"""The largest batch that fits: trials of a few steps, each in a process of its own."""

MARK = '{"trial": '
"""The beginning of the line in which a trial reports what it took."""
