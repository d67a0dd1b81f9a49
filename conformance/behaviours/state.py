"""Checkpoints."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from conformance.adapter import Adapter, Base, NotOfferedError, Subject, adamw, sgd
from conformance.problems import (
    RHO,
    closure_of,
    copies,
    difference,
    displacement,
    global_norm,
    loss_on,
    net,
    same_model,
    train,
)
from conformance.verdict import Behaviour, at_most, behaviour, demand, within


def _built(adapter: Adapter, base: Base, seed: int = 0) -> tuple[nn.Sequential, Subject]:
    model = net(torch.float32, seed)
    return model, adapter.build(list(model.parameters()), base, rho=RHO, model=model)


def _through_a_file(state: Any, *, weights_only: bool = False) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def _resumes(adapter: Adapter, base: Base) -> str:
    model, subject = _built(adapter, base)
    train(subject, model, range(5))
    saved = _through_a_file({"model": model.state_dict(), "optimizer": subject.state_dict()})
    train(subject, model, range(5, 10))
    fresh, again = _built(adapter, base, seed=9)
    fresh.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(again, fresh, range(5, 10))
    return same_model(model, fresh, "resumed and uninterrupted")


@behaviour
def resume_with_sgd(adapter: Adapter) -> str:
    """Saved after 5 steps and loaded into fresh objects, 5 more give the uninterrupted run, bit for bit.

    Without the base's momentum in it a checkpoint is smaller than expected and the loss jumps on resuming.
    """
    return _resumes(adapter, sgd())


@behaviour
def resume_with_adamw(adapter: Adapter) -> str:
    """The same with AdamW and its moments.

    Adam starts again without moments, at the full learning rate.
    """
    return _resumes(adapter, adamw())


@behaviour
def loading_keeps_the_model(adapter: Adapter) -> str:
    """After load_state_dict the optimizer trains the model's own tensors.

    The optimizer continues training tensors of the checkpoint, and the model stands still.
    """
    model, subject = _built(adapter, sgd())
    train(subject, model, range(2))
    subject.load_state_dict(_through_a_file(subject.state_dict()))
    before = copies(model.parameters())
    train(subject, model, range(2, 3))
    still = sum(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    demand(not still, f"{still} of {len(before)} tensors stand still")
    return ""


@behaviour
def loads_safely(adapter: Adapter) -> str:
    """`torch.load(weights_only=True)`, torch's default, reads the checkpoint.

    Loading needs an option that runs code from the file.
    """
    model, subject = _built(adapter, sgd())
    train(subject, model, range(1))
    try:
        _through_a_file(subject.state_dict(), weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line), "refused")
        demand(False, reason.strip())
    return ""


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        return [t for v in state.values() for t in _tensors(v)]
    if isinstance(state, (list, tuple)):
        return [t for v in state for t in _tensors(v)]
    return []


def _copies_in(subject: Subject, model: nn.Module) -> float:
    """How many of the weights, as a share, the checkpoint has a tensor for that is nearly equal."""
    saved = _tensors(subject.state_dict())
    weights = list(model.parameters())
    held = sum(
        w.numel() for w in weights for t in saved if t.shape == w.shape and (t - w).norm() < 0.02 * w.detach().norm()
    )
    return held / sum(w.numel() for w in weights)


@behaviour
def no_copy_of_the_weights(adapter: Adapter) -> str:
    """The checkpoint holds no copy of the weights, unless that of the plain base does.

    Checkpoints grow by the size of the model, for tensors that the next step overwrites.
    """
    more = []
    model, subject = _built(adapter, sgd(lr=1e-3))
    train(subject, model, range(2))
    more.append(_copies_in(subject, model))
    with contextlib.suppress(NotOfferedError):
        reference = net(torch.float32)
        plain = Subject(adapter.plain(list(reference.parameters()), sgd(lr=1e-3)))
        train(plain, reference, range(2))
        more.append(-_copies_in(plain, reference))
    return at_most(sum(more), 0.0, "copies of the weights:")


@behaviour
def plain_checkpoint_loads(adapter: Adapter) -> str:
    """A checkpoint of the plain base loads: its momentum is used and rho stays.

    A run that begins plainly and ends sharpness-aware, the cheapest schedule there is, loses its momentum.
    """
    model = net()
    plain = Subject(adapter.plain(list(model.parameters()), sgd()))
    train(plain, model, range(5))
    saved = _through_a_file(plain.state_dict())
    # The radius of one that loaded nothing, and of one that did.
    lengths = []
    for loads in (False, True):
        other = copy.deepcopy(model)
        params = list(other.parameters())
        subject = adapter.build(params, sgd(), rho=RHO, model=other)
        if loads:
            subject.load_plain(saved)
        lengths.append(global_norm(displacement(subject, params, closure_of(subject, loss_on(other, 5)))))
    within(lengths[1], lengths[0], 1e-6, "the radius is")
    # With a radius this small the momentum is all that matters.
    reference = copy.deepcopy(model)
    subject = adapter.build(list(reference.parameters()), sgd(), rho=1e-9, model=reference)
    subject.load_plain(_through_a_file(plain.state_dict()))
    train(subject, reference, range(5, 8))
    train(plain, model, range(5, 8))
    return at_most(difference(model, reference), 1e-6, "the plain run goes elsewhere by")


@behaviour
def distributed_checkpoint(adapter: Adapter) -> str:
    """get_ and set_optimizer_state_dict of torch.distributed.checkpoint carry the base's state, bit for bit.

    Checkpoints of sharded and reshaped trainings go through these two functions.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, subject = _built(adapter, sgd())
    train(subject, model, range(5))
    saved = copy.deepcopy(get_optimizer_state_dict(model, subject.optimizer))
    weights = copy.deepcopy(model.state_dict())
    train(subject, model, range(5, 8))
    fresh, again = _built(adapter, sgd(), seed=9)
    fresh.load_state_dict(weights)
    set_optimizer_state_dict(fresh, again.optimizer, saved)
    train(again, fresh, range(5, 8))
    return same_model(model, fresh, "resumed and uninterrupted")


BEHAVIOURS: tuple[Behaviour, ...] = (
    resume_with_sgd,
    resume_with_adamw,
    loading_keeps_the_model,
    loads_safely,
    no_copy_of_the_weights,
    plain_checkpoint_loads,
    distributed_checkpoint,
)
