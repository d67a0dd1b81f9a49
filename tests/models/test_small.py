import pytest
import torch
from torch import nn

from flatmin.models.small import MODELS, conv, mlp


@pytest.mark.parametrize("name", sorted(MODELS))
def test_logits_for_digits(name):
    assert MODELS[name](num_classes=7)(torch.randn(3, 1, 8, 8)).shape == (3, 7)


@pytest.mark.parametrize("size", [8, 9, 32])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_logits_for_other_images(name, size):
    model = MODELS[name](num_classes=7, in_channels=3, image_size=size)
    assert model(torch.randn(3, 3, size, size)).shape == (3, 7)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_no_batch_statistics(name):
    assert not list(MODELS[name]().buffers())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in MODELS[name]().modules())


def test_sizes_as_documented():
    assert sum(p.numel() for p in conv().parameters()) == 38_282
    assert sum(p.numel() for p in mlp().parameters()) == 8_970
