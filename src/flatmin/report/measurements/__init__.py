"""Measured networks to look at."""
