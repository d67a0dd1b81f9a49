"""A small instance of every family of networks."""

from functools import partial

import torch

from flatmin.models.densenet import DenseNet
from flatmin.models.pyramidnet import PyramidNet
from flatmin.models.resnet import ResNet
from flatmin.models.resnet_cifar import CifarResNet
from flatmin.models.small import conv, mlp
from flatmin.models.vgg import VGG
from flatmin.models.vit import ViT
from flatmin.models.wide_resnet import WideResNet

# name -> (what makes it, size of its images)
SMALL = {
    "conv": (partial(conv, in_channels=3, image_size=8), 8),
    "mlp": (partial(mlp, in_channels=3, image_size=8), 8),
    "resnet basic": (partial(ResNet, 18, width=4), 16),
    "resnet bottleneck": (partial(ResNet, 50, width=2), 16),
    "resnet max pool": (partial(ResNet, 18, width=4, max_pool=True), 32),
    "resnet option a": (partial(CifarResNet, 14, width=4), 8),
    "wrn": (partial(WideResNet, 16, 1), 8),
    "wrn dropout": (partial(WideResNet, 10, 2, dropout=0.3), 8),
    "densenet": (partial(DenseNet, growth=4, blocks=(2, 3)), 8),
    "vgg": (partial(VGG, 11, width=4, hidden=16), 32),
    "pyramidnet": (partial(PyramidNet, 14, 20), 8),
    "vit": (partial(ViT, image_size=8, depth=2, width=12, heads=3), 8),
}
DROPOUT = ("wrn dropout", "vgg")
CLASSES = 5


def make(name, seed=0):
    torch.manual_seed(seed)
    return SMALL[name][0](num_classes=CLASSES).double()


def images(name, n=4, seed=1):
    size = SMALL[name][1]
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(n=4):
    return torch.arange(n) % CLASSES
