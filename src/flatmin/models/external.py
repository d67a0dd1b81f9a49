"""Networks of timm and torchvision by name, such as "timm:resnet50d" or "torchvision:resnet50".

They need the extra `vision`. The packages are imported only when a network is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from flatmin.words import install, suggest

_REFUSALS = (AssertionError, RuntimeError, ValueError)  # what both packages raise for unsuitable settings


def external(spec: str) -> Callable[..., nn.Module] | None:
    """Return a function that builds the network "timm:NAME" or "torchvision:NAME", or None for any other `spec`.

    The function takes keyword arguments:

    - num_classes: number of classes. Default 10.
    - in_channels: number of channels of the images. Default 3. torchvision's networks accept only 3.
    - image_size: height and width of the images, for networks that are built for one size, such as ViTs. Other networks
      take any size and ignore it. Default None: the default size of the network.
    - pretrained: load the default weights of the package, which needs a network connection. Default False.
    - any other option: passed to `timm.create_model` or `torchvision.models.get_model`.

    torchvision's GoogLeNet and Inception are built without their auxiliary heads (unless `pretrained`), so they return
    logits only.

    The function raises:
        ValueError: the name is unknown, or the network cannot be built with these settings.
        ModuleNotFoundError: the package is not installed.
        ImportError: the installed torchvision does not match the installed torch.
        TypeError: the network has no such option.
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
        suggestion = suggest(name.partition(".")[0], timm.list_models())  # The part after the dot names the weights.
        raise ValueError(f"timm has no model {name!r}{suggestion} (timm.list_models() lists them)")
    with _building(spec, num_classes, in_channels, image_size):
        # timm sets this flag for networks that are built for one image size and take it as `img_size`.
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
            f"torchvision's models take images of 3 channels, got {in_channels}; models of timm ('timm:...') take any "
            "number."
        )
    weights = models.get_model_weights(name).DEFAULT if pretrained else None
    if weights is not None and len(weights.meta["categories"]) != num_classes:
        raise ValueError(
            f"the pretrained weights of {spec} have {len(weights.meta['categories'])} classes, got num_classes="
            f"{num_classes}; use a model of timm ('timm:...'), whose last layer is replaced."
        )
    if image_size is not None and name.startswith("vit_"):
        options = {"image_size": image_size, **options}
    elif image_size is not None and name == "maxvit_t":
        options = {"input_size": (image_size, image_size), **options}
    elif name in ("googlenet", "inception_v3") and not pretrained:
        # With auxiliary heads, these networks return a tuple in training. init_weights=None gives a FutureWarning.
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
            f"{spec} needs {error.name or 'timm and torchvision'}: {install('vision')}.",
            name=error.name,
        ) from error
    except RuntimeError as error:
        # A torchvision compiled for another torch cannot load its operators; the error then names a missing operator.
        if "torchvision" not in str(error):
            raise
        try:
            installed = version("torchvision")
        except PackageNotFoundError:
            installed = "of unknown version"
        raise ImportError(
            f"{spec} needs torchvision, but the installed torchvision {installed} does not match the installed torch "
            f"{torch.__version__} ({error}); install matching releases of both, as described on pytorch.org.",
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
