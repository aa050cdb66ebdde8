"""Factorial comparisons: train what differs in training once, and compute the rest from the checkpoints."""
