"""Runs as they lie on disk; without torch."""
