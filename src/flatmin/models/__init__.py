"""Networks to train: one file a family, one line a network in `zoo.MODELS`."""
