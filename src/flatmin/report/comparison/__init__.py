"""The comparison to look at."""
