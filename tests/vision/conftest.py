"""timm and torchvision on a machine whose only torch is one for the CPU."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.library import Library


def declared():
    """Declares two operators, if torchvision cannot load its own next to a torch for the CPU.

    PyPI has torchvision's builds for CUDA alone, and without the library of operators that needs CUDA it fails on
    these two names when it is imported. Declared before, they let all of it be imported but `ops` and `io`.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or torch.version.cuda is not None:
        return None
    for file in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(file)
        except OSError:
            continue
        return None
    fragment = Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return fragment


FRAGMENT = declared()  # its operators live as long as it does


@pytest.fixture
def mismatched():
    """Whether the installed torchvision does not match the installed torch."""
    return FRAGMENT is not None
