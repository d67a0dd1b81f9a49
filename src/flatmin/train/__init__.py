"""A training run: configuration, data, training loop, checkpoints, run folder and trackers."""
