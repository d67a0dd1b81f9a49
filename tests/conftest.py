"""One thread for torch: the nets are tiny, and results are then equal bit for bit from process to process.

And what the library looks up at every call, and no test changes, is looked up once: the entry points of what is
installed (once for each path to search), and the digits, a text file that scikit-learn takes as long to unpack as some
tests take to train on.
"""

import functools
import importlib.metadata
import sys

import torch

torch.set_num_threads(1)

_entry_points = importlib.metadata.entry_points
_known = functools.cache(lambda path, **chosen: _entry_points(**chosen))
importlib.metadata.entry_points = lambda **chosen: _known(tuple(sys.path), **chosen)


def pytest_runtest_setup():
    """scikit-learn is found here once something has imported it."""
    datasets = sys.modules.get("sklearn.datasets")
    if datasets is not None and not hasattr(datasets.load_digits, "cache_clear"):
        datasets.load_digits = functools.cache(datasets.load_digits)
