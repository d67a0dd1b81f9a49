"""Data sets as tensors, image files and their augmentation, label noise, and the checks of a user's own data."""
