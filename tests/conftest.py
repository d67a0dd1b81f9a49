"""One thread for torch: the nets are tiny, and results are then equal bit for bit from process to process.

And the digits are read once: a text file that scikit-learn takes as long to unpack as some tests take to train on.
"""

import functools
import signal
import sys

import torch

torch.set_num_threads(1)
# Tests press Ctrl-C, which a shell lets those ignore that it starts in the background.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup():
    """scikit-learn is found here once something has imported it."""
    datasets = sys.modules.get("sklearn.datasets")
    if datasets is not None and not hasattr(datasets.load_digits, "cache_clear"):
        datasets.load_digits = functools.cache(datasets.load_digits)
