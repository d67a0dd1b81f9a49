"""The table of networks: each name and the function that builds the network.

Each function takes keyword arguments only, all with defaults. All functions take `num_classes` and `in_channels`;
those whose network depends on the size of the image also take `image_size`. To add a network, write one file (start
from `common.py`) and add one line here. The tests run over the whole table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from flatmin.models import small
from flatmin.models.densenet import DenseNet
from flatmin.models.pyramidnet import PyramidNet
from flatmin.models.resnet import LAYERS, ResNet
from flatmin.models.resnet_cifar import CifarResNet
from flatmin.models.vgg import CONVS, VGG
from flatmin.models.vit import ViT
from flatmin.models.wide_resnet import WideResNet

MODELS: dict[str, Callable[..., nn.Module]] = {
    **small.MODELS,
    **{f"resnet{depth}": partial(ResNet, depth) for depth in LAYERS},
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (8, 20, 32, 44, 56, 110)},
    **{f"wrn{d}-{w}": partial(WideResNet, d, w) for d, w in ((28, 10), (28, 2), (16, 8), (34, 10))},
    "densenet121": DenseNet,
    **{f"vgg{depth}-bn": partial(VGG, depth) for depth in CONVS},
    "pyramidnet110": partial(PyramidNet, 110, 270),
    "vit": ViT,
}
