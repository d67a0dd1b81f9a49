"""Flat-LoRA: noise on the frozen weights of layers with low-rank adapters, during one update."""

from __future__ import annotations

import math
import numbers
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.optim.tensors import LOW, add_rounded_, is_sharded
from flatmin.words import suggest


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _bytes(t: Tensor) -> tuple[torch.device, int, int]:
    """The device and the range of addresses of a tensor's entries; an empty range if it has no memory of its own."""
    try:
        first = t.data_ptr()
    except RuntimeError:  # wrappers around other tensors
        first = 0
    if not first or not t.numel():
        return t.device, 0, 0
    extent = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.device, first, first + extent * t.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory, so that writing to one changes the other."""
    if a is b:
        return True
    (device, a_first, a_last), (other, b_first, b_last) = _bytes(a), _bytes(b)
    return device == other and a_first < b_last and b_first < a_last


def _own(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module itself, without those of its children."""
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


class _Layer:
    """A module with a method `lora_weight()` that returns W and what the adapters add to it.

    Args:
        name: name of the module.
        module: the module.

    Attributes:
        inputs: the dimension of W that belongs to the layer's inputs.
    """

    inputs = 1

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module

    @property
    def title(self) -> str:
        """The module's name in messages."""
        return self.name or "the model"

    def _weight(self) -> Any:
        return self.module.lora_weight()[0]

    def _copied(self) -> str:
        return (
            f"lora_weight() of {self.title} must return the weight itself, not a copy: noise on a copy has no effect."
        )

    def weight(self) -> Tensor:
        """The matrix W. Raises ValueError unless it is a frozen, unsharded floating-point matrix of the module."""
        weight: Tensor = self._weight()
        matrix = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()
        if not matrix:
            raise ValueError(
                f"the weight of {self.title} is not a matrix of floating-point numbers, which the noise needs; exclude "
                "the layer by only=."
            )
        if is_sharded(weight):
            raise ValueError(f"the weight of {self.title} is sharded, but the noise needs whole rows; train with DDP.")
        held = [t for module in self.module.modules() for t in _own(module) if _overlap(t, weight)]
        if not held:
            raise ValueError(self._copied())
        if weight.requires_grad or any(t.requires_grad for t in held):
            raise ValueError(
                f"the weight of {self.title} is trained, but Flat-LoRA restores it after each update; freeze it."
            )
        return weight

    def added(self, weight: Tensor) -> Any:
        """What the adapters add to W. Raises ValueError unless it has the shape of W."""
        added = self.module.lora_weight()[1]
        if not isinstance(added, Tensor) or added.shape != weight.shape:
            got = tuple(added.shape) if isinstance(added, Tensor) else type(added).__name__
            raise ValueError(
                f"lora_weight() of {self.title} must return what the adapters add, as a tensor of the weight's shape "
                f"{tuple(weight.shape)}; got {got}."
            )
        return added

    @torch.no_grad()
    def deviation(self, size: float) -> Tensor:
        """The standard deviations sigma_i = size ||(W + s B A)_i|| / sqrt(n_in), in a shape that broadcasts over W."""
        weight = self.weight()
        whole = weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.added(weight)
        norms: Tensor = whole.norm(dim=self.inputs, keepdim=True)
        return norms.mul_(size / math.sqrt(weight.shape[self.inputs]))


class _PeftLayer(_Layer):
    """A LoRA layer of PEFT."""

    def __init__(self, name: str, module: Any) -> None:
        super().__init__(name, module)
        self.inputs = 0 if getattr(module, "fan_in_fan_out", False) else 1
        kinds = getattr(module, "lora_variant", {}), {a for a, on in module.use_dora.items() if on}
        if any(a in kind for kind in kinds for a in module.active_adapters) or len(module.lora_embedding_A):
            raise ValueError(
                f"{self.title} is not a linear layer with plain adapters W + s B A (DoRA and other variants are not "
                "supported); exclude it by only=."
            )

    def _weight(self) -> Any:
        return getattr(self.module.get_base_layer(), "weight", None)

    def _copied(self) -> str:
        return (
            f"the weight of {self.title} is computed in every forward (a parametrisation), so noise on it has no "
            "effect; exclude the layer by only=."
        )

    def added(self, weight: Tensor) -> Any:
        """The sum of s B A over the active adapters; 0 if adapters are disabled."""
        module = self.module
        if module.merged_adapters:
            raise RuntimeError(
                f"the adapters of {self.title} are merged into its weight; call unmerge_adapter() first."
            )
        active = () if module.disable_adapters else [a for a in module.active_adapters if a in module.lora_A]
        return sum(module.get_delta_weight(adapter) for adapter in active)


def _with_adapters(model: nn.Module) -> dict[str, tuple[type[_Layer], nn.Module]]:
    """The modules with adapters by name, each with the class that handles it."""
    layers: dict[str, tuple[type[_Layer], nn.Module]] = {}
    for name, module in model.named_modules():
        if callable(getattr(module, "lora_weight", None)):
            layers[name] = _Layer, module
        elif all(hasattr(module, x) for x in ("lora_A", "lora_embedding_A", "get_base_layer", "active_adapters")):
            layers[name] = _PeftLayer, module
    return layers


def _refuse_shared(layer: _Layer, model: nn.Module) -> None:
    """Raise ValueError if a module outside the layer has the same weight, such as a tied embedding."""
    weight, inside = layer.weight(), set(layer.module.modules())
    for name, module in model.named_modules():
        if module not in inside and any(_overlap(t, weight) for t in _own(module)):
            raise ValueError(
                f"{layer.title} and {name or 'the model'} share one weight, so the noise would change both; exclude "
                f"{layer.title} by only=."
            )


class FlatLoRA:
    """Trains low-rank adapters with noise on the frozen weights below them, at one gradient a step.

        W' = W + E,   E_ij ~ N(0, sigma_i^2)
        sigma_i = f rho ||(W + s B A)_i||_2 / sqrt(n_in)
        f = (1 - cos(pi min(t, T) / T)) / 2

    for update t = 0, 1, ... and row i, which belongs to one output. Use it as a context around all forward and backward
    passes of an update, with any optimizer of the adapters. On leaving, W is restored bit for bit, also after an
    exception, and the update is counted unless there was one:

        flat = FlatLoRA(model, rho=0.05, total=epochs * len(loader))
        for x, y in loader:
            optimizer.zero_grad()
            with flat:
                loss_fn(model(x), y).backward()
            optimizer.step()

    The noise depends only on the seed and t: the global random generators are not used, and resumed runs and all
    replicas draw the same noise. W + E in bf16 or fp16 is rounded at random to one of the two neighbouring numbers.
    While the context is open, one copy of the matrices is held.

    Supported are the LoRA layers of PEFT (linear layers, with any number of active adapters), and your own modules with
    a method `lora_weight()` that returns W of shape (out, in) and what the adapters add to it, in the same shape. W
    must be a parameter or buffer of the module, or a view of one.

    Args:
        model: the model with the adapters.
        rho: size of the noise, >= 0. Default 0.05 (the authors' README). With 0 nothing is changed or drawn.
        total: T, the number of updates over which f grows from 0 to 1; afterwards f = 1. With 0, f = 1 throughout.
        only: shell pattern of module names; only matching layers get noise. Default "*": all layers with adapters.
        seed: seed of the noise. Default 0.

    Raises:
        ValueError: a number out of range; no layer with adapters; a layer that is not W + s B A (DoRA and other
            variants); a weight that is not a floating-point matrix, is trained, sharded, a copy, or shared with another
            layer.
        RuntimeError: merged adapters (`merge_adapter()`); on entering, a context that is already open. The weights are
            checked again on entering, with the same errors.

    Source: Li, He, Li, Wang, Shang & Huang, Flat-LoRA, ICML 2025. The authors' code counts t in micro-batches and draws
    from the global generator.
    """

    def __init__(self, model: nn.Module, rho: float = 0.05, *, total: int, only: str = "*", seed: int = 0) -> None:
        if not _is(numbers.Real, rho) or not 0.0 <= rho < math.inf:
            raise ValueError(f"rho must be a finite number >= 0, got {rho!r}.")
        if not _is(numbers.Integral, total) or total < 0:
            raise ValueError(f"total must be a whole number of updates >= 0, got {total!r}.")
        if not _is(numbers.Integral, seed):
            raise ValueError(f"seed must be a whole number, got {seed!r}.")
        found = _with_adapters(model)
        if not found:
            raise ValueError(
                "the model has no layers with low-rank adapters; pass a model from peft.get_peft_model, or one whose "
                "modules have a method lora_weight()."
            )
        self._layers = [kind(name, module) for name, (kind, module) in found.items() if fnmatchcase(name, only)]
        if not self._layers:
            raise ValueError(
                f"only={only!r} matches no layer with adapters{suggest(only, found)} (layers: {', '.join(found)})."
            )
        self.rho, self.total, self.seed = rho, total, seed
        self.updates = 0
        self._before: list[tuple[Tensor, Tensor]] | None = None
        for layer in self._layers:
            layer.deviation(0.0)
            _refuse_shared(layer, model)

    @property
    def scale(self) -> float:
        """The factor f of the current update."""
        return 1.0 if self.total == 0 else (1 - math.cos(math.pi * min(self.updates, self.total) / self.total)) / 2

    def deviations(self) -> dict[str, Tensor]:
        """The standard deviations sigma_i of the current update by layer, each of shape (outputs,)."""
        return {layer.name: layer.deviation(self.scale * self.rho).flatten() for layer in self._layers}

    @torch.no_grad()
    def __enter__(self) -> FlatLoRA:
        if self._before is not None:
            raise RuntimeError("the noise of this update is already applied; enter the context once in each update.")
        self._before = []
        size = self.scale * self.rho
        generators: dict[torch.device, torch.Generator] = {}
        try:
            for layer in self._layers if size > 0 else ():
                weight = layer.weight()
                generator = generators.get(weight.device)
                if generator is None:
                    generator = generators[weight.device] = torch.Generator(weight.device)
                    generator.manual_seed((self.seed * 1_000_003 + self.updates) % 2**64)
                deviation = layer.deviation(size)
                noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=deviation.dtype)
                noise.mul_(deviation)
                self._before.append((weight, weight.detach().clone()))
                if weight.dtype in LOW:
                    add_rounded_([weight], [noise], 1.0, generator)
                else:
                    weight.add_(noise)
        except BaseException:
            self._put_back()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._put_back()
        self.updates += kind is None

    @torch.no_grad()
    def _put_back(self) -> None:
        for weight, before in self._before or ():
            weight.copy_(before)
        self._before = None

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and the seed, which determine f and all further noise."""
        return {"updates": self.updates, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self.updates, self.seed = int(state["updates"]), int(state["seed"])
