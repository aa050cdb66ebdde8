"""Tensors into numbers."""
