import dataclasses

import pytest

from flatmin.study.costs import guess_seconds
from flatmin.study.timing import time_ratios
from flatmin.train.config import RunConfig

BASE = RunConfig(method="sgd", batch_size=16, data="tests.user_side:data", model="tests.user_side:slow")


def test_ratios_follow_the_number_of_gradients():
    """Each forward pass sleeps for 20 ms, so two of them take twice as long whatever else the machine does."""
    sam = RunConfig(**{**vars(BASE), "method": "sam", "rho": 0.05})
    found = time_ratios({"copy": BASE, "sam": sam}, BASE, rounds=3)
    assert found["copy"].median == pytest.approx(1, abs=0.25)
    assert found["sam"].median == pytest.approx(2, abs=0.4)
    assert found["sam"].q25 <= found["sam"].median <= found["sam"].q75


def test_one_round_has_no_spread():
    found = time_ratios({"copy": BASE}, BASE, rounds=1)["copy"]
    assert found.q25 == found.median == found.q75


def test_a_guess_counts_gradients_looks_and_the_eigenvalue(monkeypatch):
    """With a gradient of 1 s a sample: 50 training samples in 4 batches of 16, 20 for validation, 30 for the test."""
    monkeypatch.setattr("flatmin.study.costs._gradient_seconds", lambda config, inputs, few: 1.0)
    train, val, test = 50, 20, 30
    plain = dataclasses.replace(BASE, epochs=5)
    looks, batches = (5 * val + test + train) / 3, 4 * 16
    assert guess_seconds([plain], 0) == pytest.approx(5 * batches + looks)
    sam = dataclasses.replace(plain, method="sam", rho=0.1)
    assert guess_seconds([sam], 0) == pytest.approx(2 * 5 * batches + looks)
    assert guess_seconds([dataclasses.replace(plain, measure=True)], 0) == pytest.approx(
        5 * batches + looks + 30 * train
    )
    assert guess_seconds([plain] * 4, 2) == pytest.approx(2 * (5 * batches + looks) + 4)
