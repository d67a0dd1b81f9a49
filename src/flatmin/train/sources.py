"""Data and model of a run: the built-in ones by name, a user's own by "package.module:function"."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.data.augment import Augment
from flatmin.data.dataset import Data, as_data, check_held
from flatmin.data.images import STATISTICS, draw_share
from flatmin.data.named import DATASETS, Progress, Reading, read_named
from flatmin.data.noise import asymmetric_noise, symmetric_noise
from flatmin.models.external import external
from flatmin.models.zoo import MODELS
from flatmin.train.config import RunConfig, derive_seed
from flatmin.train.inputs import Inputs
from flatmin.train.locate import find_function
from flatmin.words import suggest

_AUGMENT = ("crop", "flip", "cutout", "cutout_p")


def load_data(config: RunConfig, *, download: bool = False, progress: Progress | None = None) -> Data:
    """The data of a run, with its label noise, on its device.

    Args:
        config: the run.
        download: download missing files where that is possible.
        progress: see `flatmin.data.named.Reading`.

    Raises:
        ValueError: unknown name, options that the data does not have, or a function that returns something else.
        FileNotFoundError, OSError: files that are missing or cannot be read.
        ModuleNotFoundError: a package is missing; the error names the extra.
    """
    clean = load_clean(config, download=download, progress=progress)
    if config.measure:
        check_held(clean.train.x, len(clean.train))
    if not config.noise:
        return clean.to(config.device)
    if clean.clean is not None:
        raise ValueError(f"data={config.data} brings wrong labels of its own; set noise=0.")
    return clean.with_labels(_noisy(config, clean)).to(config.device)


def load_clean(config: RunConfig, *, download: bool = False, progress: Progress | None = None) -> Data:
    """The data before flatmin adds noise to the labels, on the CPU."""
    if ":" in config.data:
        data = as_data(find_function(config.data, option="data")(), config.data)
        if config.train_on_val:
            raise ValueError(f"train_on_val=true is for official releases; data={config.data} brings its own parts.")
    else:
        data = read_named(config.data, reading_of(config, download=download, progress=progress))
        if config.image_size not in (None, data.train.x.shape[-1]):
            raise ValueError(f"image_size is for folders of images; data={config.data} has images of its own size.")
    if config.statistics is not None:
        if config.statistics not in STATISTICS:
            raise ValueError(
                f"statistics={config.statistics} is not known{suggest(config.statistics, STATISTICS)} "
                f"(statistics: {', '.join(STATISTICS)}, or none for the data's own)"
            )
        data = dataclasses.replace(data, statistics=STATISTICS[config.statistics])
    data = dataclasses.replace(data, augment=_augmentation(config, data))
    if config.train_size is not None:
        data = _smaller(data, config.train_size, seed=derive_seed(config.split_seed, "train_size"))
    return data


def reading_of(config: RunConfig, *, download: bool = False, progress: Progress | None = None) -> Reading:
    """How a run reads a data set of the table."""
    return Reading(
        folder=config.data_dir,
        validation=None if config.train_on_val else config.val_share,
        split_seed=config.split_seed,
        image_size=config.image_size,
        workers=config.workers,
        download=download,
        progress=progress,
    )


def _augmentation(config: RunConfig, data: Data) -> Augment | None:
    """What is usual for the data, with the configuration's own options."""
    given = {name: getattr(config, name) for name in _AUGMENT if getattr(config, name) is not None}
    if not given:
        return data.augment
    if data.statistics is None:
        raise ValueError(f"{next(iter(given))} is for images of bytes; data={config.data} has none: leave it out.")
    usual = data.augment or Augment(crop=0, flip=False, cutout=0)
    return dataclasses.replace(usual, **given)


def _smaller(data: Data, size: int, *, seed: int) -> Data:
    if size > len(data.train):
        raise ValueError(f"train_size={size} is more than the {len(data.train)} training samples of {data.name}.")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    drawn = draw_share(order, data.train.y, size).sort().values
    clean = None if data.clean is None else data.clean[drawn]
    return dataclasses.replace(data, train=data.train.only(drawn), clean=clean)


def _noisy(config: RunConfig, data: Data) -> Tensor:
    seed = derive_seed(config.seed, "noise")
    if config.noise_kind == "symmetric":
        return symmetric_noise(data.train.y, config.noise, data.num_classes, seed=seed)
    dataset = DATASETS.get(config.data)
    if dataset is None or dataset.confusions is None:
        which = ", ".join(name for name, one in DATASETS.items() if one.confusions)
        raise ValueError(
            f"noise_kind=asymmetric needs to know which classes are confused, which it does for {which} only; "
            "use noise_kind=symmetric."
        )
    return asymmetric_noise(data.train.y, config.noise, dataset.confusions, seed=seed)


def build_model(config: RunConfig, data: Data | Inputs) -> nn.Module:
    """A freshly initialised model on the run's device.

    A function is called with those of `num_classes=K`, `in_channels=C` and `image_size=H` that it has parameters for,
    the latter two for inputs of shape (n, C, H, W). The global random state is the same after the call as before.

    Raises:
        ValueError: unknown name, a function that needs other arguments, or something that is no module.
        ModuleNotFoundError, ImportError: timm or torchvision is missing, or does not fit torch.
    """
    function: Callable[..., Any]
    if (named := external(config.model)) is not None:
        function = named
    elif ":" in config.model:
        function = find_function(config.model, option="model")
    elif config.model in MODELS:
        function = MODELS[config.model]
    else:
        raise ValueError(
            f"unknown model {config.model!r}{suggest(config.model, MODELS)} "
            f"(models: {', '.join(MODELS)}; timm:NAME, torchvision:NAME, or package.module:function)"
        )
    if isinstance(function, nn.Module):
        raise ValueError(f"model={config.model} is a module; name a function that builds one: def build(): return ...")
    parameters = inspect.signature(function).parameters
    inputs = data if isinstance(data, Inputs) else Inputs.of(data)
    arguments: dict[str, Any] = {"num_classes": inputs.num_classes}
    if len(inputs.shape) == 3:
        arguments |= {"in_channels": inputs.shape[0], "image_size": inputs.shape[1]}
    for name in config.model_params:
        if name not in parameters and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            raise ValueError(f"model={config.model} has no option {name!r}{suggest(name, parameters)}")
    arguments |= config.model_params
    given = {name: value for name, value in arguments.items() if name in parameters or name in config.model_params}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and parameter.kind not in variadic and name not in given:
            raise ValueError(
                f"model={config.model} must be callable without arguments, but it requires {name!r}; name a "
                f"function that gives it: def build(): return ...({name}=...)."
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "model"))
        model = function(**given)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={config.model} returned a {type(model).__name__}, expected a torch.nn.Module.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"model={config.model} has no parameter that requires a gradient, so there is nothing to train."
        )
    return model.to(config.device)


def check_device(name: str) -> None:
    """Raise ValueError unless tensors can live on the device."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device={name} cannot be used here: {reason}") from error


def check_machine(config: RunConfig) -> None:
    """Raise ValueError unless this machine has the run's device and precision."""
    check_device(config.device)
    if config.precision == "bf16" and config.device == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("this GPU has no bf16; set precision=fp16 or precision=float32.")


def check_fit(model: nn.Module, data: Data, *, channels_last: bool = False) -> None:
    """Raise ValueError unless the model maps the data's inputs, in this memory format, to one logit per class."""
    from flatmin.measure.modes import evaluating

    x = data.inputs(data.train.x[:2], channels_last=channels_last)
    try:
        with evaluating(model), torch.no_grad():
            out = model(x)
    except Exception as error:
        hint = " (channels_last=false keeps the usual memory format)" if channels_last and x.dim() == 4 else ""
        raise ValueError(
            f"the model does not take inputs of shape {tuple(x.shape[1:])} from {data.name}: {error}{hint}"
        ) from error
    if not isinstance(out, torch.Tensor) or out.shape != (len(x), data.num_classes):
        shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(
            f"the model returned {shape} for {len(x)} inputs, expected logits {(len(x), data.num_classes)}."
        )
