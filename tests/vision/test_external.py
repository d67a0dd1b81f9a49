"""Networks of timm and torchvision: built for any classes, channels and size, and trained by SAM."""

import copy
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.models.external import external
from flatmin.words import explained

pytest.importorskip("torchvision", reason="needs torchvision: run make test-vision")
timm = pytest.importorskip("timm", reason="needs timm: run make test-vision")

TRAINED = {"timm:resnet18": {}, "timm:vit_tiny_patch16_224": {"patch_size": 8}, "torchvision:resnet18": {}}
SHAPES = [
    ("timm:resnet18", 1, 32, {}),
    ("timm:resnet18.a1_in1k", 3, 48, {}),
    ("timm:vit_tiny_patch16_224", 3, 32, {}),
    ("timm:vit_tiny_patch16_224", 3, 224, {"img_size": 224}),
    ("timm:swin_tiny_patch4_window7_224", 1, 32, {}),
    ("timm:maxvit_tiny_tf_224", 3, 64, {}),
    ("timm:convnext_atto", 4, 32, {"drop_path_rate": 0.1}),
    ("torchvision:resnet18", 3, 32, {}),
    ("torchvision:vit_b_16", 3, 32, {}),
    ("torchvision:maxvit_t", 3, 224, {}),
    ("torchvision:swin_t", 3, 32, {}),
    ("torchvision:googlenet", 3, 64, {}),
    ("torchvision:inception_v3", 3, 128, {}),
]


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize(("spec", "channels", "size", "options"), SHAPES)
def test_shape_of_logits_in_training(spec, channels, size, options):
    with torch.device("meta"):  # shapes without numbers
        model = external(spec)(num_classes=7, in_channels=channels, image_size=size, **options)
        assert model(torch.empty(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("spec", TRAINED)
def test_the_seed_decides_the_weights(spec):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(external(spec)(image_size=32).state_dict())
    same = [all(torch.equal(states[0][k], other[k]) for k in other) for other in states[1:]]
    assert same == [True, False]


@pytest.mark.parametrize("spec", TRAINED)
def test_ten_steps_of_sam(spec):
    torch.manual_seed(0)
    model = external(spec)(num_classes=5, image_size=32, **TRAINED[spec]).train()
    x, y = torch.randn(10, 3, 32, 32), torch.arange(10) % 5
    once = copy.deepcopy(model)
    once(x)
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer = flatmin.SAM(base, rho=0.05, model=model)
    passes = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        passes.append(loss.item())
        return loss

    losses = [optimizer.step(closure).item()]
    for norm, expected in zip(batch_norms(model), batch_norms(once), strict=True):
        assert torch.equal(norm.running_mean, expected.running_mean)
        assert torch.equal(norm.running_var, expected.running_var)
    losses += [optimizer.step(closure).item() for _ in range(9)]
    assert len(passes) == 20 and losses == passes[::2]
    assert passes[1] > passes[0], "pass 2 is at the weights that were moved uphill"
    assert losses[-1] < 0.7 * losses[0]
    assert len(batch_norms(model)) == (0 if "vit" in spec else 20)
    assert all(norm.num_batches_tracked == 10 for norm in batch_norms(model))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("timm:resnet_18", "timm has no model 'resnet_18'; did you mean 'resnet18'? (timm.list_models() lists them)"),
        (
            "torchvision:ResNet18",
            "torchvision has no image classifier 'ResNet18'; did you mean 'resnet18'? "
            "(torchvision.models.list_models() lists them)",
        ),
    ],
)
def test_unknown_names(spec, sentence):
    with pytest.raises(ValueError) as said:
        external(spec)()
    assert str(said.value) == sentence and explained(said.value)


def test_a_detector_is_no_classifier():
    with pytest.raises(ValueError, match="no image classifier 'fasterrcnn_resnet50_fpn'"):
        external("torchvision:fasterrcnn_resnet50_fpn")()


def test_unknown_weights():
    with pytest.raises(ValueError, match=r"^timm:resnet18\.none cannot be built for .*: Invalid pretrained tag"):
        external("timm:resnet18.none")()


def test_channels_that_torchvision_does_not_take():
    with pytest.raises(ValueError, match=r"^torchvision's models take .* 3 channels, got 1; models of timm .*\.$"):
        external("torchvision:resnet18")(in_channels=1)


def test_a_size_that_does_not_fit():
    with pytest.raises(
        ValueError, match=r"^torchvision:vit_b_16 cannot .* and 20x20 pixels: Input shape indivisible by"
    ):
        external("torchvision:vit_b_16")(image_size=20)


def test_weights_for_other_classes():
    with pytest.raises(ValueError, match="weights of torchvision:resnet18 have 1000 classes, got num_classes=10"):
        external("torchvision:resnet18")(pretrained=True)


def test_an_option_that_the_network_does_not_have():
    for spec in ("timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(TypeError, match="depht"):
            external(spec)(depht=3)


def test_networks_of_one_size_are_known_by_timms_flag():
    """Networks that would refuse `image_size` images if they were not told the size."""
    fixed = [name for name in timm.list_models("*_tiny_*") if timm.get_pretrained_cfg(name).fixed_input_size]
    assert len(fixed) > 20
    with torch.device("meta"):
        for name in fixed[::4]:
            external(f"timm:{name}")(image_size=64)


@pytest.mark.parametrize("spec", ["timm:resnet18", "torchvision:resnet18"])
def test_a_torchvision_that_does_not_match(mismatched, spec):
    if not mismatched:
        pytest.skip("the installed torchvision matches the installed torch")
    code = f"from flatmin.models.external import external\ntry: external({spec!r})()\nexcept ImportError as e: print(e)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{spec} needs torchvision, but the installed torchvision {version('torchvision')} does not")
    assert f"the installed torch {torch.__version__} (" in said and "operator torchvision::nms does not exist" in said
