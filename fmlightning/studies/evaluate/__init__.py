"""Scores of a trained run under many solvers, budgets and guidance scales, each computed once."""
