"""Loss and accuracy at given weights, running statistics of BatchNorm there, and weights of checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flatmin.measure.checkpoints import find_weights, listed
from flatmin.measure.losses import answers
from flatmin.measure.problem import Problem, WeightedBatch, first_tensor

Statistics = Literal["as they are", "recomputed"]
Checkpoint = nn.Module | Mapping[str, Tensor] | Tensor


def evaluate(
    problem: Problem, weights: list[Tensor], *, accuracy: bool = False, statistics: Statistics = "as they are"
) -> tuple[float, float]:
    """Evaluate loss and accuracy at given weights. The model is not modified.

    Args:
        problem: the function.
        weights: one tensor per selected weight, as returned by `Problem.moved` and `Problem.shaped`.
        accuracy: also compute the accuracy, from the same forward pass. Default False.
        statistics: running statistics of BatchNorm: "as they are" in the model, or "recomputed" at these weights, see
            `batch_statistics`. Default "as they are".

    Returns:
        L, and the accuracy in [0, 1] over the targets that are not ignored; NaN if not requested.

    Raises:
        ValueError: no accuracy can be computed from the outputs and targets.
    """
    buffers = batch_statistics(problem, weights) if statistics == "recomputed" else None
    if not accuracy:
        return problem.value(weights, buffers=buffers), math.nan
    counts = torch.zeros(2, dtype=torch.float64, device=problem.device)

    def count(batch: WeightedBatch, outputs: Any) -> None:
        targets = batch.targets
        right = answers(outputs, targets) == targets
        counted = targets != problem.ignored
        counts[0] += (right & counted).sum()
        counts[1] += counted.sum()

    loss = problem.value(weights, buffers=buffers, on_batch=count)
    right, total = problem.reduced(counts).tolist()
    return loss, right / total


def batch_statistics(problem: Problem, weights: list[Tensor]) -> dict[str, Tensor]:
    """Compute running means and variances of all BatchNorm layers at given weights.

    Each batch of the problem is passed through the model, with all other layers in eval mode. The statistics of the
    batches are averaged, weighted by their numbers of examples, so they depend on how the data are divided into
    batches.

    Args:
        problem: the function.
        weights: see `evaluate`.

    Returns:
        Buffers by name; empty if the model has no BatchNorm.

    Raises:
        ValueError: the problem is in train mode, which uses no running statistics, or a layer has momentum 0.

    Source: `bn_update` of Garipov et al., NeurIPS 2018; Izmailov et al., UAI 2018.
    """
    if problem.mode == "train":
        raise ValueError(
            "statistics='recomputed' has no effect with mode='train', which uses the statistics of each batch; use "
            "mode='eval' or statistics='as they are'."
        )
    layers = _layers(problem.model)
    if not layers:
        return {}
    frozen = [name for name, layer in layers.items() if layer.momentum == 0.0]
    if frozen:
        raise ValueError(f"the statistics of {frozen[0]!r} cannot be recomputed, because its momentum is 0.")
    names = [f"{name}.{kind}" if name else kind for name in layers for kind in ("running_mean", "running_var")]
    buffers = dict(problem.model.named_buffers())
    sums = [torch.zeros_like(buffers[n], dtype=torch.float64) for n in names]
    examples = 0.0
    with torch.no_grad():
        for batch in problem.batches:
            count = float(len(first_tensor(batch.targets)))
            for total, statistic in zip(sums, _of_batch(problem, layers, batch, weights), strict=True):
                total += count * statistic.double()
            examples += count
    packed = torch.cat(
        [torch.tensor([examples], dtype=torch.float64, device=problem.device), *(s.flatten() for s in sums)]
    )
    packed = problem.reduced(packed)
    parts = (packed[1:] / packed[0]).split([s.numel() for s in sums])
    return {n: p.view_as(s).to(problem.dtype) for n, p, s in zip(names, parts, sums, strict=True)}


def batch_outputs(problem: Problem, batch: WeightedBatch, weights: list[Tensor]) -> Any:
    """The outputs with BatchNorm using the statistics of this batch. Call it inside `Problem.guard`."""
    return _outputs(problem, _layers(problem.model), batch, weights)[0]


def _of_batch(
    problem: Problem, layers: Mapping[str, _BatchNorm], batch: WeightedBatch, weights: list[Tensor]
) -> list[Tensor]:
    """Mean and variance of each layer on one batch, in the order of the layers."""
    with problem.guard(), torch.no_grad():
        buffers = _outputs(problem, layers, batch, weights)[1]
    statistics = []
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        calls = float(buffers[f"{prefix}num_batches_tracked"]) if layer.num_batches_tracked is not None else 1.0
        # Starting from zero, the moving average after k calls is 1 - (1 - m)^k times the statistics.
        share = 1.0 if layer.momentum is None else 1.0 - (1.0 - layer.momentum) ** calls
        for kind in ("running_mean", "running_var"):
            own = dict(layer.named_buffers())[kind]
            statistics.append(buffers[f"{prefix}{kind}"] / share if calls else own.detach())
    return statistics


def _outputs(
    problem: Problem, layers: Mapping[str, _BatchNorm], batch: WeightedBatch, weights: list[Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """Outputs with BatchNorm using batch statistics, and the buffers of the layers, which start from zero."""
    buffers = {}
    for name, layer in layers.items():
        layer.training = True
        for kind, buffer in layer.named_buffers(recurse=False):
            dtype = problem.dtype if buffer.is_floating_point() else buffer.dtype
            buffers[f"{name}.{kind}" if name else kind] = torch.zeros_like(buffer, dtype=dtype)
    return problem.outputs(batch, weights, buffers), buffers


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers with running statistics."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


# -- checkpoints -------------------------------------------------------------------------------------------------------


def weights_of(problem: Problem, checkpoint: Checkpoint) -> Tensor:
    """Return the selected weights of a checkpoint as one vector of shape (size,), in the problem's dtype.

    Args:
        problem: the problem that selects the weights and their order.
        checkpoint: a model, a state dict, or a vector of shape (size,). A state dict may come from a compiled model or
            one wrapped in DistributedDataParallel, and may be nested in a saved checkpoint; see
            `flatmin.measure.checkpoints`.

    Raises:
        ValueError: keys or shapes do not match the model; or weights that are not selected differ although `params` is
            "*" (they require no gradient), so the loss would not be that of the checkpoint.
    """
    if isinstance(checkpoint, Tensor):
        problem.shaped(checkpoint)
        return checkpoint.detach().to(problem.device, problem.dtype, copy=True)
    state = _state(problem, checkpoint)
    for name, own in zip(problem.names, problem.weights, strict=True):
        if state[name].shape != own.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(state[name].shape)} in the checkpoint, but {tuple(own.shape)} in the model."
            )
    outside = _unlike(state, {n: p for n, p in problem.model.named_parameters() if n not in problem.names})
    if outside and problem.conventions.params == "*":
        raise ValueError(
            f"the checkpoint also differs in {listed(outside)}, which are not selected because requires_grad=False; "
            "set requires_grad=True for them, or select weights with params=."
        )
    return problem.flat([state[n].to(problem.device, problem.dtype) for n in problem.names])


def buffers_unlike(problem: Problem, checkpoint: Checkpoint) -> list[str]:
    """Names of the floating-point buffers in which a checkpoint differs from the model; empty for a vector."""
    if isinstance(checkpoint, Tensor):
        return []
    return _unlike(_state(problem, checkpoint), dict(problem.model.named_buffers()))


def choose_statistics(
    problem: Problem, statistics: Statistics | None, unlike: list[str] | tuple[str, ...]
) -> Statistics:
    """Return the `statistics` of a landscape. None means "as they are", unless a checkpoint's buffers differ.

    Raises:
        ValueError: `statistics` is None although buffers differ, is an unknown option, or is "recomputed" for a problem
            in train mode.
    """
    if statistics not in (None, "as they are", "recomputed"):
        raise ValueError(f"statistics must be 'as they are' or 'recomputed', got {statistics!r}.")
    if statistics == "recomputed" and problem.mode == "train":
        raise ValueError(
            "statistics='recomputed' has no effect with mode='train', which uses the statistics of each batch; use "
            "mode='eval' or statistics='as they are'."
        )
    if statistics is None and unlike and problem.mode == "eval":
        raise ValueError(
            f"buffers of a checkpoint differ from those of the model ({listed(unlike)}); choose "
            "statistics='recomputed' (recompute BatchNorm statistics at every point) or 'as they are' (use those of "
            "the model at every point)."
        )
    return statistics or "as they are"


def _state(problem: Problem, checkpoint: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by the names of the model."""
    model = problem.model
    own = {
        **model.state_dict(keep_vars=True),
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    if isinstance(checkpoint, nn.Module):
        # Include non-persistent buffers, which a state dict omits.
        checkpoint = {**checkpoint.state_dict(), **dict(checkpoint.named_buffers())}
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"a checkpoint must be a model, a state dict or a vector of weights, got {type(checkpoint).__name__}."
        )
    matched = find_weights(own, checkpoint, needed=problem.names)
    for remark in () if matched is None else matched.remarks:
        warnings.warn(remark, stacklevel=4)
    state = dict(checkpoint) if matched is None else matched.state
    missing = [n for n in problem.names if not isinstance(state.get(n), Tensor)]
    if missing:
        raise ValueError(f"the checkpoint has no tensor {missing[0]!r}; it has {listed(list(state)) or 'nothing'}.")
    extra = [n for n in state if n not in own]
    if extra:
        raise ValueError(f"the checkpoint belongs to another model: this model has no {listed(extra)}.")
    return state


def _unlike(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    names = []
    for name, tensor in own.items():
        other = state.get(name)
        if isinstance(other, Tensor) and tensor.is_floating_point():
            same = other.shape == tensor.shape and torch.equal(other.to(tensor).detach(), tensor.detach())
            names += [] if same else [name]
    return names
