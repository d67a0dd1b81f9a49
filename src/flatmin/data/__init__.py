"""Data sets as tensors or image files, augmentation, label noise, and checks of a user's own data."""
