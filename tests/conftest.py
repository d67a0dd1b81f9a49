"""One thread for torch: the nets are tiny, and results are then equal bit for bit from process to process.

What takes longer than most tests and is the same each time is done once in a process: the digits are read (a text file
that scikit-learn has to unpack), and the commands are built (typer resolves the types of every option of each of them).
Files are not forced to the disk, for which a test would wait: only a power cut could tell. That `fsync` is called, and
when, is in `train/test_write_errors.py`.
"""

import functools
import os
import signal
import sys

import torch
import typer.main

torch.set_num_threads(1)
typer.main.get_command = functools.cache(typer.main.get_command)
os.fsync = os.fstat
# Tests press Ctrl-C, which a shell lets those ignore that it starts in the background.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup():
    """scikit-learn is found here once something has imported it."""
    datasets = sys.modules.get("sklearn.datasets")
    if datasets is not None and not hasattr(datasets.load_digits, "cache_clear"):
        datasets.load_digits = functools.cache(datasets.load_digits)
