"""Data and model of a run: the built-in ones by name, a user's own by "package.module:function"."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from flatmin.data.base import Data, as_data
from flatmin.data.digits import load_digits
from flatmin.data.noise import symmetric_noise
from flatmin.models.zoo import MODELS
from flatmin.train.config import RunConfig, stream
from flatmin.train.locate import find_function
from flatmin.words import suggest

DATA = ("digits",)


def load_data(config: RunConfig) -> Data:
    """The data of a run, with its label noise, on its device.

    Raises:
        ValueError: unknown name, or a function that returns something else than data.
        ModuleNotFoundError: scikit-learn is missing.
    """
    clean = load_clean(config.data, config.split_seed)
    if not config.noise:
        return clean.to(config.device)
    if clean.clean is not None:
        raise ValueError(f"data={config.data} brings wrong labels of its own; set noise=0.")
    noisy = symmetric_noise(clean.train.y, config.noise, clean.num_classes, seed=stream(config.seed, "noise"))
    return clean.with_labels(noisy).to(config.device)


def load_clean(name: str, split_seed: int = 0) -> Data:
    """The data before flatmin adds noise to the labels."""
    if name == "digits":
        return load_digits(split_seed=split_seed)
    if ":" not in name:
        raise ValueError(
            f"unknown data {name!r}{suggest(name, DATA)} (data: {', '.join(DATA)}, or package.module:function)"
        )
    return as_data(find_function(name, option="data")(), name)


def build_model(config: RunConfig, data: Data) -> nn.Module:
    """A freshly initialised model on the run's device.

    A function is called with those of `num_classes=K`, `in_channels=C` and `image_size=H` that it has parameters for,
    the latter two for inputs of shape (n, C, H, W). The global random state is the same after the call as before.

    Raises:
        ValueError: unknown name, a function that needs other arguments, or something that is no module.
    """
    if ":" in config.model:
        function = find_function(config.model, option="model")
    elif config.model in MODELS:
        function = MODELS[config.model]
    else:
        raise ValueError(
            f"unknown model {config.model!r}{suggest(config.model, MODELS)} "
            f"(models: {', '.join(MODELS)}, or package.module:function)"
        )
    known = inspect.signature(function).parameters
    told = {"num_classes": data.num_classes}
    if data.train.x.dim() == 4:
        told |= {"in_channels": data.train.x.shape[1], "image_size": data.train.x.shape[2]}
    given = {name: value for name, value in told.items() if name in known}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in known.items():
        if parameter.default is parameter.empty and parameter.kind not in variadic and name not in given:
            raise ValueError(f"model={config.model} must be callable without arguments, but it requires {name!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(config.seed, "model"))
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


def check_fit(model: nn.Module, data: Data) -> None:
    """Raise ValueError unless the model maps the data's inputs to one logit per class."""
    from flatmin.measure.modes import evaluating

    x = data.train.x[:2]
    try:
        with evaluating(model), torch.no_grad():
            out = model(x)
    except Exception as error:
        raise ValueError(
            f"the model does not take inputs of shape {tuple(x.shape[1:])} from {data.name}: {error}"
        ) from error
    if not isinstance(out, torch.Tensor) or out.shape != (len(x), data.num_classes):
        shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(
            f"the model returned {shape} for {len(x)} inputs, expected logits {(len(x), data.num_classes)}."
        )
