"""Velocity networks `net(x, t, y=None, rows=None) -> like x`, each complete in its file."""
