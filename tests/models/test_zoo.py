"""The table: what each network takes, and what each refuses."""

import inspect

import pytest
import torch
from torch import nn

from flatmin.models import small
from flatmin.models.common import he_normal
from flatmin.models.densenet import DenseNet
from flatmin.models.pyramidnet import PyramidNet
from flatmin.models.resnet import ResNet
from flatmin.models.resnet_cifar import CifarResNet
from flatmin.models.vgg import VGG
from flatmin.models.vit import ViT
from flatmin.models.wide_resnet import WideResNet
from flatmin.models.zoo import MODELS
from tests.models.nets import make

FEATURES = {  # channels and height of what is averaged over the image, for images of 32x32
    **{f"resnet{depth}": (512, 4) for depth in (18, 34)},
    **{f"resnet{depth}": (2048, 4) for depth in (50, 101, 152)},
    **{f"resnet{depth}": (64, 8) for depth in (8, 20, 32, 44, 56, 110)},
    **{"wrn28-10": (640, 8), "wrn28-2": (128, 8), "wrn16-8": (512, 8), "wrn34-10": (640, 8)},
    **{f"vgg{depth}-bn": (512, 1) for depth in (11, 13, 16, 19)},
    **{"densenet121": (1024, 4), "pyramidnet110": (286, 8)},
}
LARGE = {
    *("resnet50", "resnet101", "resnet152", "resnet110", "wrn28-10", "wrn34-10", "wrn16-8"),
    *("densenet121", "pyramidnet110"),
}


def options(name, **wanted):
    """Those of the options that the network knows."""
    known = inspect.signature(MODELS[name]).parameters
    return {key: value for key, value in wanted.items() if key in known}


def test_names():
    assert set(small.MODELS) <= set(MODELS)
    assert {"resnet18", "resnet56", "wrn28-10", "densenet121", "vgg19-bn", "pyramidnet110", "vit"} <= set(MODELS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in MODELS]
)
def test_every_network_has_the_common_options(name):
    """Its signature, shapes for grey images, for larger ones and before the average, and what it refuses."""
    make, seen = MODELS[name], []
    parameters = inspect.signature(make).parameters
    assert {"num_classes", "in_channels"} <= set(parameters)
    assert all(parameter.default is not parameter.empty for parameter in parameters.values())
    assert parameters["num_classes"].default == 10
    with torch.device("meta"):  # shapes without numbers
        model = make(num_classes=7, **options(name, in_channels=1, image_size=32))
        assert hasattr(model, "pool") == (name in FEATURES)
        if name in FEATURES:
            model.pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
        assert model(torch.empty(2, 1, 32, 32)).shape == (2, 7)
        if not options(name, image_size=32):
            assert model(torch.empty(2, 1, 33, 33)).shape == (2, 7)
    if name in FEATURES:
        channels, height = FEATURES[name]
        assert seen[0] == (2, channels, height, height)
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    for option in ("num_classes", "in_channels"):
        with pytest.raises(ValueError, match=rf"{option} must be an integer >= 1, got 0\."):
            make(**{option: 0})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in MODELS]
)
def test_logits(name):
    torch.manual_seed(0)
    model = MODELS[name](num_classes=7, **options(name, in_channels=3, image_size=32))
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7) and logits.isfinite().all() and logits.std() > 0


@pytest.mark.parametrize("name", ["resnet basic", "resnet option a", "wrn", "densenet", "vgg", "pyramidnet"])
def test_initial_weights_of_convolutional_networks(name):
    for module in make(name).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            assert (module.bias == 0).all()


def test_he_normal():
    model = nn.Sequential(nn.Conv2d(64, 32, 3), nn.Linear(400, 100)).requires_grad_(False)
    torch.manual_seed(0)
    he_normal(model)
    fan_out = 32 * 9
    assert model[0].weight.std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
    assert model[0].weight.mean().abs() < 0.003
    assert model[1].weight.abs().max() == pytest.approx(400**-0.5, rel=0.01)
    assert not model[0].bias.any() and not model[1].bias.any()


def test_initial_weights_of_the_transformer():
    torch.manual_seed(0)
    for name, parameter in ViT().requires_grad_(False).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name or name.endswith(("attend.0.weight", "mlp.0.weight")):
            assert (parameter == 1).all(), name
        else:
            assert parameter.abs().max() <= 0.04, name
            assert parameter.std() == pytest.approx(0.0176, rel=0.15), name  # 0.02, cut off at two deviations


def test_impossible_arguments():
    for build, message in [
        (lambda: ResNet(20), r"depth must be one of 18, 34, 50, 101, 152, got 20\."),
        (lambda: ResNet(18, stem="large"), r"stem must be one of small, imagenet, got 'large'\."),
        (lambda: CifarResNet(18), r"depth must be 6n \+ 2 with n >= 1, such as 14 or 20, got 18\."),
        (lambda: CifarResNet(2), r"such as 8 or 14, got 2\."),
        (lambda: WideResNet(27, 10), r"depth must be 6n \+ 4 with n >= 1, such as 22 or 28, got 27\."),
        (lambda: WideResNet(4, 10), r"such as 10 or 16, got 4\."),
        (lambda: WideResNet(28.0, 10), r"depth must be an integer >= 1, got 28\.0\."),
        (lambda: WideResNet(28, 0), r"width must be an integer >= 1, got 0\."),
        (lambda: WideResNet(28, 2, dropout=1.0), r"dropout must be in \[0, 1\), got 1\.0\."),
        (lambda: PyramidNet(111), r"depth must be 6n \+ 2 .* such as 110 or 116, got 111\."),
        (lambda: PyramidNet(alpha=-1), r"alpha must be an integer >= 0, got -1\."),
        (lambda: VGG(12), r"depth must be one of 11, 13, 16, 19, got 12\."),
        (lambda: VGG(11, hidden=0), r"hidden must be an integer >= 1, got 0\."),
        (lambda: VGG(11, dropout=-0.1), r"dropout must be in \[0, 1\), got -0\.1\."),
        (lambda: DenseNet(blocks=(6, 0)), r"blocks\[1\] must be an integer >= 1, got 0\."),
        (lambda: DenseNet(blocks=()), r"len\(blocks\) must be an integer >= 1, got 0\."),
        (lambda: DenseNet(growth=0), r"growth must be an integer >= 1, got 0\."),
        (lambda: ViT(patch=5), r"image_size must be a multiple of patch=5, got 32\."),
        (lambda: ViT(width=100), r"width must be a multiple of heads=3, got 100\."),
        (lambda: ViT(depth=0), r"depth must be an integer >= 1, got 0\."),
        (lambda: small.conv(image_size=1), r"image_size must be an integer >= 2, got 1\."),
        (lambda: small.mlp(in_channels=0), r"in_channels must be an integer >= 1, got 0\."),
    ]:
        with pytest.raises(ValueError, match=message):
            build()


def test_images_that_a_transformer_was_not_made_for():
    with pytest.raises(ValueError, match=r"images must be 32x32, the image_size of this ViT, got \(16, 64\)\."):
        ViT(depth=1)(torch.zeros(1, 3, 16, 64))
