"""Parameter counts, by formulas written out here and as published."""

import itertools
import re

import pytest
import torch
from torch import nn

from flatmin.models.densenet import DenseNet
from flatmin.models.pyramidnet import PyramidNet
from flatmin.models.vgg import VGG
from flatmin.models.vit import ViT
from flatmin.models.wide_resnet import WideResNet
from flatmin.models.zoo import MODELS


def count(make, **options):
    with torch.device("meta"):  # shapes without memory
        return sum(parameter.numel() for parameter in make(**options).parameters())


def conv(i, o, size=3):
    return i * o * size**2


def norm(c):
    return 2 * c


def linear(i, o):
    return i * o + o


def resnet(blocks, bottleneck, classes):
    total, i = conv(3, 64) + norm(64), 64
    for k, n in enumerate(blocks):
        c = 64 * 2**k
        o = 4 * c if bottleneck else c
        for _ in range(n):
            if bottleneck:
                total += conv(i, c, 1) + norm(c) + conv(c, c) + norm(c) + conv(c, o, 1) + norm(o)
            else:
                total += conv(i, c) + norm(c) + conv(c, c) + norm(c)
            if i != o:
                total += conv(i, o, 1) + norm(o)
            i = o
    return total + linear(i, classes)


def option_a(depth, classes):
    n = (depth - 2) // 6
    total = conv(3, 16) + norm(16)
    for i, o in ((16, 16), (16, 32), (32, 64)):
        total += conv(i, o) + (2 * n - 1) * conv(o, o) + 2 * n * norm(o)
    return total + linear(64, classes)


def wrn(n, width, classes):
    total, i = conv(3, 16), 16
    for o in (16 * width, 32 * width, 64 * width):
        total += norm(i) + conv(i, o) + norm(o) + conv(o, o)
        total += conv(i, o, 1) if i != o else 0
        total += (n - 1) * 2 * (norm(o) + conv(o, o))
        i = o
    return total + norm(i) + linear(i, classes)


def densenet(blocks, growth, classes):
    c = 2 * growth
    total = conv(3, c)
    for k, n in enumerate(blocks):
        if k:
            total += norm(c) + conv(c, c // 2, 1)
            c //= 2
        for _ in range(n):
            total += norm(c) + conv(c, 4 * growth, 1) + norm(4 * growth) + conv(4 * growth, growth)
            c += growth
    return total + norm(c) + linear(c, classes)


def vgg(convs, hidden, classes):
    total, i = 0, 3
    for o, n in zip((64, 128, 256, 512, 512), convs, strict=True):
        for _ in range(n):
            total += conv(i, o) + o + norm(o)
            i = o
    return total + linear(512, hidden) + linear(hidden, hidden) + linear(hidden, classes)


def pyramidnet(n, alpha, classes):
    widths = [16 + int(alpha * k / (3 * n) + 1e-9) for k in range(3 * n + 1)]
    total = conv(3, 16) + norm(16)
    for i, o in itertools.pairwise(widths):
        total += norm(i) + conv(i, o) + norm(o) + conv(o, o) + norm(o)
    return total + norm(widths[-1]) + linear(widths[-1], classes)


def vit(depth, width, patch, tokens, classes):
    layer = 2 * norm(width) + linear(width, 3 * width) + linear(width, width)
    layer += linear(width, 4 * width) + linear(4 * width, width)
    ends = linear(3 * patch**2, width) + width + (tokens + 1) * width + norm(width) + linear(width, classes)
    return depth * layer + ends


FORMULAS = {
    "conv": lambda k: conv(1, 16) + 16 + conv(16, 32) + 32 + linear(512, 64) + linear(64, k),
    "mlp": lambda k: linear(64, 64) + linear(64, 64) + linear(64, k),
    "resnet18": lambda k: resnet((2, 2, 2, 2), False, k),
    "resnet34": lambda k: resnet((3, 4, 6, 3), False, k),
    "resnet50": lambda k: resnet((3, 4, 6, 3), True, k),
    "resnet101": lambda k: resnet((3, 4, 23, 3), True, k),
    "resnet152": lambda k: resnet((3, 8, 36, 3), True, k),
    "resnet8": lambda k: option_a(8, k),
    "resnet20": lambda k: option_a(20, k),
    "resnet32": lambda k: option_a(32, k),
    "resnet44": lambda k: option_a(44, k),
    "resnet56": lambda k: option_a(56, k),
    "resnet110": lambda k: option_a(110, k),
    "wrn28-10": lambda k: wrn(4, 10, k),
    "wrn28-2": lambda k: wrn(4, 2, k),
    "wrn16-8": lambda k: wrn(2, 8, k),
    "wrn34-10": lambda k: wrn(5, 10, k),
    "densenet121": lambda k: densenet((6, 12, 24, 16), 32, k),
    "vgg11-bn": lambda k: vgg((1, 1, 2, 2, 2), 512, k),
    "vgg13-bn": lambda k: vgg((2, 2, 2, 2, 2), 512, k),
    "vgg16-bn": lambda k: vgg((2, 2, 3, 3, 3), 512, k),
    "vgg19-bn": lambda k: vgg((2, 2, 4, 4, 4), 512, k),
    "pyramidnet110": lambda k: pyramidnet(18, 270, k),
    "vit": lambda k: vit(6, 192, 4, 64, k),
}


def test_a_formula_for_every_network():
    assert set(FORMULAS) == set(MODELS)


@pytest.mark.parametrize("name", FORMULAS)
def test_count(name):
    """By the formula, and as the docstring says."""
    number = count(MODELS[name])
    assert number == FORMULAS[name](10)
    assert count(MODELS[name], num_classes=100) == FORMULAS[name](100)
    doc = " ".join(getattr(MODELS[name], "func", MODELS[name]).__doc__.split())
    assert f"{number:_}".replace("_", " ") in doc or str(number) in doc


def test_published_counts():
    for name, classes, published in (
        ("resnet18", 100, 11_220_132),
        ("resnet34", 100, 21_328_292),
        ("resnet50", 100, 23_705_252),
        ("resnet56", 10, 853_018),
        ("wrn28-10", 100, 36_536_884),
        ("densenet121", 10, 6_956_298),
        ("vgg19-bn", 10, 20_565_834),
        ("pyramidnet110", 10, 28_485_477),
        ("conv", 10, 38_282),
        ("mlp", 10, 8_970),
    ):
        assert FORMULAS[name](classes) == published, name


@pytest.mark.parametrize(("name", "published"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_counts_for_imagenet(name, published):
    """Those of torchvision's networks of these names."""
    assert count(MODELS[name], num_classes=1000, stem="imagenet") == published
    assert f"{published:_}".replace("_", " ") in " ".join(MODELS[name].func.__doc__.split())


@pytest.mark.parametrize(("name", "classes"), [("wrn28-10", 100), ("densenet121", 100), ("vit", 100)])
def test_documented_count_with_100_classes(name, classes):
    doc = " ".join(getattr(MODELS[name], "func", MODELS[name]).__doc__.split())
    assert f"{count(MODELS[name], num_classes=classes):_}".replace("_", " ") in doc


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_with_the_papers_classifier(depth):
    convs = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}[depth]
    number = count(lambda: VGG(depth, hidden=4096))
    assert number == vgg(convs, 4096, 10)
    assert f"{number:_}".replace("_", " ") in " ".join(VGG.__doc__.split())


def test_an_extra_block_makes_the_deeper_network():
    assert count(lambda: WideResNet(28, 2, extra_block=True)) == count(lambda: WideResNet(34, 2)) == wrn(5, 2, 10)
    assert round(wrn(5, 2, 10) / 1e6, 3) == 1.856  # as counted in the example script's network
    assert round(wrn(5, 10, 10) / 1e6, 2) == 46.16


@pytest.mark.parametrize(("n", "alpha"), [(1, 0), (2, 7), (3, 48), (4, 100)])
def test_pyramids_of_other_slopes(n, alpha):
    assert count(lambda: PyramidNet(6 * n + 2, alpha)) == pyramidnet(n, alpha, 10)


def test_other_sizes():
    assert count(lambda: DenseNet(growth=12, blocks=(3, 3, 3))) == densenet((3, 3, 3), 12, 10)
    assert count(lambda: WideResNet(16, 1)) == wrn(2, 1, 10)
    assert count(lambda: ViT(image_size=64, patch=8, depth=3, width=48, heads=4)) == vit(3, 48, 8, 64, 10)


@pytest.mark.slow
def test_the_depth_counts_layers_with_weights():
    """Convolutions and linear layers, those of shortcuts left out; in wide networks all convolutions (6n + 4)."""
    for name in FORMULAS.keys() - {"conv", "mlp", "vit"}:
        with torch.device("meta"):
            modules = dict(MODELS[name]().named_modules())
        wide = name.startswith("wrn")
        kinds = nn.Conv2d if wide else nn.Conv2d | nn.Linear
        layers = [k for k, m in modules.items() if isinstance(m, kinds) and (wide or "shortcut" not in k)]
        assert len(layers) == int(re.search(r"[a-z](\d+)", name)[1]), name
