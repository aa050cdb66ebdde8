"""The largest batch that fits: trials of a few steps, each in a process of its own."""

MARK = '{"trial": '
"""How the line begins in which a trial says what it took."""
