"""How a pair of points is joined."""
