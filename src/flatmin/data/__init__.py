"""Data sets as tensors, label noise, and the checks that a user's own data must pass."""
