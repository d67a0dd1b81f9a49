"""One training run: its configuration, its loop, what it records."""
