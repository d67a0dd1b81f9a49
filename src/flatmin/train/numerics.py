"""Precision and determinism of a run; torch's global settings are restored afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from flatmin.train.config import RunConfig

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(config: RunConfig) -> AbstractContextManager[Any]:
    """The autocast context of a forward pass."""
    if config.precision == "float32":
        return nullcontext()
    return torch.autocast(config.device, dtype=_AUTOCAST[config.precision])


@contextmanager
def numerics(config: RunConfig) -> Iterator[None]:
    """A context with torch's global settings as the run needs them.

    With `deterministic`, every operation either gives bit-identical results in every run on the same device or raises
    an error; on a GPU, the algorithms of convolutions are then not chosen by benchmarks. Without it they are, which is
    faster but may give slightly different results. A CPU with the same number of threads gives bit-identical results in
    both cases.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32)
    algorithms, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        if config.device == "cuda":
            cudnn.benchmark, cudnn.deterministic = not config.deterministic, config.deterministic
            cudnn.allow_tf32 = matmul.allow_tf32 = config.tf32
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(algorithms, warn_only=warned)
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
