"""Networks to train: one file per family, one line per network in `zoo.MODELS`."""
