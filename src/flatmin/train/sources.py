"""The data and the model of a run: built-in ones by name, or a user's own by "package.module:function"."""

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
    """Load the data of a run, with its label noise, on its device.

    Args:
        config: configuration of the run.
        download: download missing files, for data sets that can be downloaded.
        progress: see `flatmin.data.named.Reading`.

    Raises:
        ValueError: the name is unknown, an option does not apply to the data, or the function returns something else.
        FileNotFoundError, OSError: files are missing or cannot be read.
        ModuleNotFoundError: a package is missing; the message names the extra.
    """
    clean = load_clean(config, download=download, progress=progress)
    if config.measure:
        check_held(clean.train.x, len(clean.train))
    if not config.noise:
        return clean.to(config.device)
    if clean.clean is not None:
        raise ValueError(f"data={config.data} already contains label noise; set noise=0.")
    return clean.with_labels(_noisy(config, clean)).to(config.device)


def load_clean(config: RunConfig, *, download: bool = False, progress: Progress | None = None) -> Data:
    """Load the data without flatmin's label noise, on the CPU."""
    if ":" in config.data:
        data = as_data(find_function(config.data, option="data")(), config.data)
        if config.train_on_val:
            raise ValueError(
                f"train_on_val=true is for the built-in data sets; data={config.data} returns its own parts. Leave out "
                "train_on_val."
            )
    else:
        data = read_named(config.data, reading_of(config, download=download, progress=progress))
        if config.image_size not in (None, data.train.x.shape[-1]):
            raise ValueError(
                f"image_size is for folders of images; the images of data={config.data} have a fixed size. Leave out "
                "image_size."
            )
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
    """How a run reads a built-in data set."""
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
    """The usual augmentation of the data, changed by the options of the configuration."""
    given = {name: getattr(config, name) for name in _AUGMENT if getattr(config, name) is not None}
    if not given:
        return data.augment
    if data.statistics is None:
        name = next(iter(given))
        raise ValueError(
            f"{name} needs images stored as bytes, which data={config.data} does not have; leave out {name}."
        )
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
            f"noise_kind=asymmetric is defined for {which} only, not for data={config.data}; use noise_kind=symmetric."
        )
    return asymmetric_noise(data.train.y, config.noise, dataset.confusions, seed=seed)


def build_model(config: RunConfig, data: Data | Inputs) -> nn.Module:
    """Build a newly initialised model on the run's device.

    A user's function receives `num_classes=K`, `in_channels=C` and `image_size=H`, as far as it has parameters with
    these names; the latter two only for inputs of shape (n, C, H, W). The global random state is not changed.

    Raises:
        ValueError: the name is unknown, the function needs other arguments, or it does not return a module.
        ModuleNotFoundError, ImportError: timm or torchvision is missing, or does not fit the installed torch.
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
        raise ValueError(
            f"model={config.model} is a module; name a function that builds the module: def build(): return ..."
        )
    parameters = inspect.signature(function).parameters
    inputs = data if isinstance(data, Inputs) else Inputs.of(data)
    if config.model in MODELS and config.model != "mlp" and len(inputs.shape) != 3:
        raise ValueError(
            f"the network {config.model!r} needs images (channels, height, width), but the data have shape "
            f"{inputs.shape}: name a network with --model or model=package.module:function."
        )
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
                f"model={config.model} must be callable without arguments, but it requires {name!r}; name a function "
                f"that sets it: def build(): return ...({name}=...)."
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
    """Raise ValueError unless this machine has the device."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device={name} cannot be used here: {reason}") from error


def check_machine(config: RunConfig) -> None:
    """Raise ValueError unless this machine supports the run's device and precision."""
    check_device(config.device)
    if config.precision == "bf16" and config.device == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("this GPU does not support bf16; set precision=fp16 or precision=float32.")


def check_fit(model: nn.Module, data: Data, *, channels_last: bool = False) -> None:
    """Raise ValueError unless the model maps the data's inputs, in this memory format, to one logit per class."""
    from flatmin.measure.modes import evaluating

    x = data.inputs(data.train.x[:2], channels_last=channels_last)
    try:
        with evaluating(model), torch.no_grad():
            out = model(x)
    except Exception as error:
        hint = " (channels_last=false sets the default memory format)" if channels_last and x.dim() == 4 else ""
        raise ValueError(
            f"the model does not take inputs of shape {tuple(x.shape[1:])} from {data.name}: {error}{hint}"
        ) from error
    if not isinstance(out, torch.Tensor) or out.shape != (len(x), data.num_classes):
        shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(
            f"the model returned {shape} for {len(x)} inputs, expected logits {(len(x), data.num_classes)}."
        )
