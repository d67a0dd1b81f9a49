"""Networks of timm and torchvision by name: "timm:resnet50d", "torchvision:resnet50". Needs the extra `vision`.

Neither package is imported before a network is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from flatmin.words import suggest

_REFUSALS = (AssertionError, RuntimeError, ValueError)  # what the two raise for settings that do not suit a network


def external(spec: str) -> Callable[..., nn.Module] | None:
    """What builds the network that "timm:NAME" or "torchvision:NAME" names; None for any other spec.

    The builder is called with keywords:

    - num_classes: length of the logits. Default 10.
    - in_channels: channels of the images. Default 3, and torchvision's networks take no other.
    - image_size: height and width, for networks that are made for one size, such as ViTs; the others take any.
      Default None: the network's own size.
    - pretrained: load the package's default weights, which needs a network connection. Default False.
    - further options of `timm.create_model` or `torchvision.models.get_model`, as they are.

    torchvision's GoogLeNet and Inception come without their auxiliary heads, so that they return logits alone.

    The builder raises:
        ValueError: an unknown name, or settings that the network cannot be built with.
        ModuleNotFoundError: the package is not installed.
        ImportError: the installed torchvision does not match the installed torch.
        TypeError: an option that the network does not have.
        OSError: the weights could not be downloaded.
    """
    package, colon, name = spec.partition(":")
    build = {"timm": _timm, "torchvision": _torchvision}.get(package) if colon else None
    return None if build is None else partial(build, name)


def _timm(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int | None = None,
    pretrained: bool = False,
    **options: Any,
) -> nn.Module:
    spec = f"timm:{name}"
    with _importing(spec):
        import timm
    if not timm.is_model(name):
        suggestion = suggest(name.partition(".")[0], timm.list_models())  # what follows the dot names weights
        raise ValueError(f"timm has no model {name!r}{suggestion} (timm.list_models() lists them)")
    with _building(spec, num_classes, in_channels, image_size):
        # timm's flag for networks with an argument `img_size` that fixes the size of their images.
        fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
        if fixed and image_size is not None:
            options = {"img_size": image_size, **options}
        model: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels, **options
        )
    return model


def _torchvision(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int | None = None,
    pretrained: bool = False,
    **options: Any,
) -> nn.Module:
    spec = f"torchvision:{name}"
    with _importing(spec):
        from torchvision import models
    classifiers = models.list_models(module=models)
    if name not in classifiers:
        raise ValueError(
            f"torchvision has no image classifier {name!r}{suggest(name, classifiers)} "
            "(torchvision.models.list_models() lists them)"
        )
    if in_channels != 3:
        raise ValueError(
            f"torchvision's models take images of 3 channels, not {in_channels}; timm's ('timm:...') take any number."
        )
    weights = models.get_model_weights(name).DEFAULT if pretrained else None
    if weights is not None and len(weights.meta["categories"]) != num_classes:
        raise ValueError(
            f"the weights of {spec} are for {len(weights.meta['categories'])} classes, not {num_classes}; use a model "
            "of timm ('timm:...'), which gets a new last layer."
        )
    if image_size is not None and name.startswith("vit_"):
        options = {"image_size": image_size, **options}
    elif image_size is not None and name == "maxvit_t":
        options = {"input_size": (image_size, image_size), **options}
    elif name in ("googlenet", "inception_v3") and not pretrained:
        # With auxiliary heads a tuple is returned in training; init_weights=None warns that its meaning will change.
        options = {"aux_logits": False, "init_weights": True, **options}
    with _building(spec, num_classes, in_channels, image_size):
        model: nn.Module = models.get_model(name, weights=weights, num_classes=num_classes, **options)
    return model


@contextmanager
def _importing(spec: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{spec} needs {error.name or 'timm and torchvision'}: pip install '.[vision]' in a clone of flatmin.",
            name=error.name,
        ) from error
    except RuntimeError as error:
        # A torchvision that was compiled for another torch cannot load its operators, and then fails on their names.
        if "torchvision" not in str(error):
            raise
        try:
            installed = version("torchvision")
        except PackageNotFoundError:
            installed = "of unknown version"
        raise ImportError(
            f"{spec} needs torchvision, but the installed torchvision {installed} does not match the installed torch "
            f"{torch.__version__}, in release or in build ({error}); install both together, from one index, as "
            "pytorch.org describes.",
            name="torchvision",
        ) from error


@contextmanager
def _building(spec: str, num_classes: int, in_channels: int, image_size: int | None) -> Iterator[None]:
    try:
        yield
    except _REFUSALS as error:
        size = "" if image_size is None else f" and {image_size}x{image_size} pixels"
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"{spec} cannot be built for {num_classes} classes and images of {in_channels} channels{size}: {reason}."
        ) from error
