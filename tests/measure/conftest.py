"""Fixtures of the tests of measures."""

import importlib

import pytest


@pytest.fixture
def sampled(monkeypatch):
    """Densities are sampled also of operators so small that the whole matrix would be taken."""
    monkeypatch.setattr(importlib.import_module("flatmin.measure.trace"), "_WHOLE", 0)
