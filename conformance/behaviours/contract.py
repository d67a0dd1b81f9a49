"""What trainers, schedulers and hooks expect of a torch optimizer."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import torch
from torch import nn

from conformance.adapter import Adapter, NotOfferedError, Subject, sgd
from conformance.problems import RHO, closure_of, copies, difference, displacement, loss_on, net, train, unequal
from conformance.verdict import Behaviour, Fault, at_most, behaviour, demand


def _built(adapter: Adapter, **base: Any) -> tuple[nn.Sequential, Subject]:
    model = net()
    return model, adapter.build(list(model.parameters()), sgd(**base), rho=RHO, model=model)


@behaviour
def is_an_optimizer(adapter: Adapter) -> str:
    """What the user holds is a torch.optim.Optimizer.

    Schedulers, GradScaler, Lightning and Accelerate refuse anything else.
    """
    _, subject = _built(adapter)
    demand(isinstance(subject.optimizer, torch.optim.Optimizer), f"a {type(subject.optimizer).__name__}")
    return ""


@behaviour
def step_takes_a_closure(adapter: Adapter) -> str:
    """`optimizer.step(closure)` alone is a whole step: no backward before it.

    Trainers that pass a closure crash, or train on the gradient that the last step left behind.
    """
    model = net()
    reference = copy.deepcopy(model)
    subject = adapter.build(list(model.parameters()), sgd(), rho=RHO, model=model)
    whole = adapter.build(list(reference.parameters()), sgd(), rho=RHO, model=reference)
    for k in range(3):
        subject.bare_step(closure_of(subject, loss_on(model, k)))
        whole.step(closure_of(whole, loss_on(reference, k)))
    return at_most(difference(model, reference), 1e-12, "differs from the documented loop by")


@behaviour
def step_returns_the_loss(adapter: Adapter) -> str:
    """`optimizer.step(closure)` returns the loss at w.

    Logs show nothing, or the loss at w + eps, which is no other run's.
    """
    model, subject = _built(adapter)
    wanted = float(loss_on(model, 0)())
    loss = subject.bare_step(closure_of(subject, loss_on(model, 0)))
    demand(loss is not None, "returns None")
    return at_most(abs(float(loss) - wanted), 1e-12, "off by")


@behaviour
def two_evaluations_a_step(adapter: Adapter) -> str:
    """The documented step runs the closure twice, in the first step and later ones.

    One evaluation is no ascent at w, three are half again the price.
    """
    model, subject = _built(adapter)
    counts = []
    for k in range(3):
        inner, calls = closure_of(subject, loss_on(model, k)), [0]

        def closure(inner: Any = inner, calls: list[int] = calls) -> Any:
            calls[0] += 1
            return inner()

        subject.step(closure)
        counts.append(calls[0])
    demand(counts == [2, 2, 2], f"evaluations {counts}")
    return "2"


@behaviour
def scheduler_drives_the_lr(adapter: Adapter) -> str:
    """A torch scheduler changes the learning rate that the weights see.

    The schedule runs and is logged, and training continues with the first learning rate.
    """
    model = net()
    reference = copy.deepcopy(model)
    base = sgd(momentum=0.0, weight_decay=0.0)
    subject = adapter.build(list(model.parameters()), base, rho=0.0, model=model)
    plain = Subject(adapter.plain(list(reference.parameters()), base))
    for one, trained in ((subject, model), (plain, reference)):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(one.schedulable, 0.5)
        train(one, trained, range(4), scheduler.step)
    return at_most(difference(model, reference), 1e-6, "weights differ by")


@behaviour
def no_word_on_the_order(adapter: Adapter) -> str:
    """The documented step followed by the scheduler's gives no warning about their order.

    The warning sends users looking for an error in a loop that has none, or hides a real one.
    """
    model, subject = _built(adapter)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(subject.schedulable, 0.5)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        train(subject, model, range(2), scheduler.step)
    words = [str(w.message) for w in heard if "lr_scheduler.step()" in str(w.message)]
    demand(not words, "warns of lr_scheduler.step() before optimizer.step()")
    return ""


@behaviour
def hooks_fire_once(adapter: Adapter) -> str:
    """Step hooks run once a step, before and after.

    Averages of the weights, logging and profilers that hang on hooks see no step, or each step twice.
    """
    model, subject = _built(adapter)
    if not hasattr(subject.optimizer, "register_step_post_hook"):
        raise NotOfferedError("no hooks")
    fired = [0, 0]

    def hook(i: int) -> Any:
        def count(*_: Any) -> None:
            fired[i] += 1

        return count

    subject.optimizer.register_step_pre_hook(hook(0))
    subject.optimizer.register_step_post_hook(hook(1))
    train(subject, model, range(3))
    demand(fired == [3, 3], f"fired {fired} in 3 steps")
    return "3 in 3 steps"


@behaviour
def late_param_group(adapter: Adapter) -> str:
    """A group added during training is climbed with, and trained.

    Layers that are unfrozen later stay out of the ascent or out of the base.
    """
    model = net()
    late = list(model.parameters())[4:]
    subject = adapter.build(list(model.parameters())[:4], sgd(), rho=RHO, model=model)
    if not hasattr(subject.optimizer, "add_param_group"):
        raise NotOfferedError("no add_param_group")
    train(subject, model, range(2))
    for p in late:
        p.grad = None
    subject.optimizer.add_param_group({"params": late})
    before = copies(late)
    gone = displacement(subject, late, closure_of(subject, loss_on(model, 2)))
    stepped = [p.detach() - b for p, b in zip(late, before, strict=True)]
    demand(all(g.norm() for g in gone), "the group is not climbed with")
    demand(all(s.norm() for s in stepped), "the group is not trained")
    return ""


def _goes_on_alike(model: nn.Module, subject: Subject, other: nn.Module, copied: Subject, what: str) -> str:
    before = [p.detach().clone() for p in model.parameters()]
    train(copied, other, range(3, 6))
    demand(not unequal(before, model.parameters()), f"training the {what} moves the original")
    train(subject, model, range(3, 6))
    gap = float(difference(model, other))
    if gap or gap != gap:
        raise Fault(f"the {what} trains differently, by {gap:.2g}")
    return "bit for bit"


@behaviour
def deepcopy(adapter: Adapter) -> str:
    """A deep copy of model and optimizer trains on as the original does, and apart from it.

    Look-ahead, population training and retries after a failure copy optimizers.
    """
    model, subject = _built(adapter)
    train(subject, model, range(3))
    other, copied = copy.deepcopy((model, subject))
    return _goes_on_alike(model, subject, other, copied, "copy")


@behaviour
def pickled(adapter: Adapter) -> str:
    """Model and optimizer that were pickled together train on as the originals do.

    Spawned workers and schedulers of jobs hand optimizers over as pickles.
    """
    model, subject = _built(adapter)
    train(subject, model, range(3))
    other, copied = pickle.loads(pickle.dumps((model, subject)))
    return _goes_on_alike(model, subject, other, copied, "pickled one")


BEHAVIOURS: tuple[Behaviour, ...] = (
    is_an_optimizer,
    step_takes_a_closure,
    step_returns_the_loss,
    two_evaluations_a_step,
    scheduler_drives_the_lr,
    no_word_on_the_order,
    hooks_fire_once,
    late_param_group,
    deepcopy,
    pickled,
)
