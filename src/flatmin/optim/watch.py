"""Observes the model's training forwards without changing the model's behaviour, copies or exports."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.optim.containers import leaves
from flatmin.optim.random_state import RandomState
from flatmin.optim.untrained import UntrainedState
from flatmin.words import warn

SLOT = "_compiled_call_impl"


class CallSlot:
    """Takes the place where `nn.Module.__call__` looks for a compiled forward, and reports each call to watches.

    torch leaves this attribute out of copies and pickles, and `torch.jit.script`, `torch.export` and `torch.fx` ignore
    it, so a model can be saved, copied and exported while it is observed.

    Args:
        module: the module whose calls are observed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.inner = module.__dict__.get(SLOT)  # the compiled forward of `module.compile()`
        self.watches: list[tuple[weakref.ref[ModelWatch], bool]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        if torch.compiler.is_compiling():
            # Not part of the compiled code, so that the passes of an update cause no recompilation.
            return module._call_impl(*args, **kwargs)
        # DataParallel copies a module's attributes, and with them this slot, to replicas: find the calling module.
        caller = sys._getframe(1).f_locals.get("self", module)
        if caller is not module:
            return caller._call_impl(*args, **kwargs)
        call = module._call_impl if self.inner is None else self.inner
        for reference, _ in self.watches:
            if (watch := reference()) is not None and not watch.inside:
                break
        else:
            return call(*args, **kwargs)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return call(*args, **kwargs)  # inside torch.func transformations values must not be read
        trains = module.training or any(m.training for m in module.modules())
        if not (trains and torch.is_grad_enabled()):
            whole_ones = [watch for reference, whole in self.watches if whole and (watch := reference()) is not None]
            for watch in whole_ones if trains else ():
                watch.take_turn()
                watch.entered()
            try:
                return call(*args, **kwargs)
            finally:
                for watch in whole_ones:
                    watch.left() if trains else watch.evaluated()
        seen = [(watch, whole) for reference, whole in self.watches if (watch := reference()) is not None]
        seen = [(watch, whole) for watch, whole in seen if watch.called(args, kwargs, whole=whole)]
        try:
            result = call(*args, **kwargs)
        finally:
            for watch, whole in seen:
                if whole:
                    watch.left()
        for watch, _ in seen:
            watch.expect_backward(result)
        return result

    def stay(self) -> None:
        """Take the place again if `module.compile()` has put a compiled forward there."""
        module = self._module()
        if module is not None and (compiled := module.__dict__.get(SLOT)) is not self:
            self.inner = compiled
            module.__dict__[SLOT] = self

    def watches_over(self, module: nn.Module) -> bool:
        """Whether this slot was made for this module."""
        return self._module() is module

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # the value of a module that is not compiled

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def drop(self, watch: weakref.ref[ModelWatch]) -> None:
        """Remove a watch; with the last watch the slot is removed from the module."""
        self.watches = [entry for entry in self.watches if entry[0] is not watch and entry[0]() is not None]
        module = self._module()
        if not self.watches and module is not None and module.__dict__.get(SLOT) is self:
            del module.__dict__[SLOT]
            if self.inner is not None:
                module.__dict__[SLOT] = self.inner


def _slot_of(module: nn.Module) -> CallSlot:
    # torch's list of attributes that scripting ignores; otherwise it would read this attribute's annotation.
    ignored = torch.jit._recursive.ignored_attributes
    if SLOT not in ignored:
        ignored.append(SLOT)
    slot = module.__dict__.get(SLOT)
    if not (isinstance(slot, CallSlot) and slot.watches_over(module)):
        slot = module.__dict__[SLOT] = CallSlot(module)
    return slot


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that a custom method of the model may call in place of the model's forward."""
    if type(model).__module__.startswith("torch."):
        return
    waiting = list(model.children())
    while waiting:
        module = waiting.pop()
        yield module
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            waiting += module.children()


class ModelWatch:
    """Observes the model's training forwards.

    In manual loops it stores and restores random states around them. It detects second passes that ran no forward or
    used another batch. It ends with its optimizer.

    Args:
        model: the module that the loop calls.
        random: the random generators; None: their states are not restored.
        weights: the optimizer's weights.
        follow: called before the first forward of a manual loop's update, for models whose modules change. Default
            None.
        abandoned: called when it turns out that the forward of a first pass was discarded. Default None.

    Attributes:
        state: the untrained state of the model, recorded before a first pass; None: it is not protected.
        own_forwards: number of forwards of the first pass whose inputs are data, not outputs of another network.
    """

    def __init__(
        self,
        model: nn.Module,
        random: RandomState | None,
        weights: Sequence[Tensor],
        follow: Callable[[], object] | None = None,
        abandoned: Callable[[], None] | None = None,
    ) -> None:
        self.random, self.weights, self.abandoned = random, weights, abandoned
        self._follow = None if follow is None else weakref.WeakMethod(follow)
        self.state: UntrainedState | None = None
        self.cleared = self.inside = False
        self._warned = False
        self._before_replay: Tensor | None = None
        self._slots = [_slot_of(module) for module in (model, *_parts(model))]
        self._whole_called = False
        self._me = weakref.ref(self)
        for k, slot in enumerate(self._slots):
            slot.watches.append((self._me, k == 0))
            weakref.finalize(self, slot.drop, self._me)
        self.begin_update()

    def begin_update(self) -> None:
        """Begin a new update with the next training forward."""
        self.pass_index, self.forwards = 0, [0, 0]
        self.turns = [0, 0]  # forwards in train mode, including those without gradients
        self.own_forwards = 0
        self.differs = False  # whether the batches of the two passes differ
        self.backed = False  # whether a backward of this update has run
        self.bracketed = False  # whether a closure or `passes()` handles random states
        self._batch: list[tuple[Any, int]] | None = None
        if self._whole_called and len(self._slots) > 1:
            # The loop calls the model itself, so its parts need not be observed.
            for slot in self._slots[1:]:
                slot.drop(self._me)
            del self._slots[1:]
        self._slots[0].stay()

    def clear(self) -> None:
        """Record that gradients were cleared: the next forward may begin an update."""
        self.cleared = True
        self._slots[0].stay()

    def begin_pass(self, index: int, *, bracketed: bool) -> None:
        self.pass_index, self.bracketed = index, bracketed
        self.forwards[min(index, 1)] = self.turns[min(index, 1)] = 0
        self._before_replay = None

    def expect_other_batch(self) -> None:
        """Do not compare the batch of this pass with that of the first."""
        self._batch = None

    @property
    def alone(self) -> bool:
        """Whether no other optimizer observes the model, so that its forwards belong to this optimizer."""
        return len(self._slots[0].watches) == 1

    def called(self, args: Any, kwargs: Any, *, whole: bool) -> bool:
        """Begin a training forward of the model (`whole`) or of a part of it; returns whether it is observed."""
        if self.inside:
            return False
        if torch._C._current_graph_task_id() != -1:
            if whole:
                self._recomputed()
            return False
        later = min(self.pass_index, 1)
        if whole or not self.forwards[later] or (not later and (self.cleared or self.backed)):
            if not whole:
                batch = []
            elif not kwargs and set(map(type, args)) == {Tensor}:
                batch = list(args)
            else:
                batch = [*leaves((args, kwargs))]
            self._seen(batch, whole)
        if whole:
            self.entered()
        self._whole_called |= whole
        return True

    def entered(self) -> None:
        """Begin the model's forward, with or without gradients."""
        if self.state is not None and self.pass_index:
            self.state.enter_forward()
        self.inside = True

    def left(self) -> None:
        """End the model's forward."""
        self.inside = False
        if self.state is not None and self.pass_index:
            self.state.leave_forward()

    def evaluated(self) -> None:
        """End a forward in eval mode."""
        if self.random is not None:
            self.random.evaluated()

    def expect_backward(self, result: Any) -> None:
        """Detect a backward that reaches the weights after a forward in the first pass of a manual loop."""
        if self.bracketed or self.pass_index or self.backed or not self.weights:
            return
        output = next((x for x in leaves(result) if isinstance(x, Tensor) and x.grad_fn is not None), None)
        if output is not None:
            me = self._me

            def came(_: Tensor) -> None:
                watch = me()
                if watch is not None and any(map(_accumulates, (watch.weights[0], watch.weights[-1]))):
                    watch.backed = True

            output.register_hook(came)

    def _seen(self, batch: list[Any], whole: bool) -> None:
        later = min(self.pass_index, 1)
        # Inputs that depend on weights differ between the passes, and their graph must not be kept.
        data = [None if isinstance(x, Tensor) and x.requires_grad else x for x in batch]
        over = self.cleared or self.backed
        if not later and self.forwards[0] and over and not self.bracketed and self._without_gradients():
            # Gradients were cleared after the last forward: it was discarded, or belongs to another optimizer.
            self.begin_update()
            if self.abandoned is not None:
                self.abandoned()
        if self.forwards[later] == 0:
            if not (self.bracketed or later):
                if (follow := self._follow and self._follow()) is not None:
                    follow()
                if self.state is not None:
                    self.state.begin()
            self.take_turn()
            if not later:
                self._batch = [(x, _version(x)) for x in data] if whole else None
            elif whole and self._batch is not None and not self._warned and not self._same(data):
                # More likely the second pass leaves out micro-batches, which is checked at its end.
                self.differs = True
                if self.bracketed or self.forwards[0] == 1:
                    self.warn_of_batches()
        elif whole:
            self.take_turn()
        self.cleared = False
        self.forwards[later] += 1
        if not later and type(None) not in map(type, data):
            self.own_forwards += 1

    def take_turn(self) -> None:
        """Begin a forward of a manual loop in train mode: restore the random state of its turn in the first pass.

        Each turn has its own state, because data may be drawn between the forwards of the first pass only.
        """
        if self.random is None or self.bracketed or self.inside:
            return
        later = min(self.pass_index, 1)
        if not later and self.cleared and not self.forwards[0] and self._without_gradients():
            self.turns[0], self.cleared = 0, False  # an earlier forward was not part of a step
        turn = self.turns[later]
        self.turns[later] += 1
        if not later:
            self.random.capture(-turn or None)
        elif turn:
            self.random.replay(-turn)
        elif self.random.captured():
            self._before_replay = torch.get_rng_state()
            # Batches that were made from such draws differ for this reason, so do not warn of them.
            self._warned |= self.random.repeat()

    def _without_gradients(self) -> bool:
        return all(w.grad is None for w in self.weights)

    def _recomputed(self) -> None:
        """Handle a forward inside a backward: checkpointing runs it again, from the state before the replay."""
        if self._before_replay is not None and torch.equal(self._before_replay, torch.get_rng_state()):
            assert self.random is not None
            self.random.replay()

    def _same(self, batch: list[Any]) -> bool:
        first = self._batch or []
        if len(first) != len(batch):
            return False
        for (x, version), y in zip(first, batch, strict=True):
            if x is None or y is None:
                continue
            written, one = _version(x) != version, x is y or _whole_of_one(x, y)
            # If the model has overwritten its input, another tensor cannot be compared with it.
            if (written and one) or not (written or one or _alike(x, y)):
                return False
        return True

    def warn_of_batches(self) -> None:
        """Warn once that the passes used different batches."""
        if not self._warned:
            self._warned = True
            way_out = (
                "fetch the batch before the step, outside the closure"
                if self.bracketed
                else "run the second pass on the batch of the first"
            )
            warn(f"the passes of one step used different batches; {way_out}.")

    def warn_of_turns(self) -> bool:
        """Warn if a manual loop ran the model more often in one pass and random numbers were drawn; True if it did."""
        if self.random is None or self.turns[0] == self.turns[1] or not self.random.drawn():
            return False
        warn(
            f"the model ran {self.turns[0]} times before the weights were perturbed and {self.turns[1]} times after "
            "it, so the second pass cannot draw the random numbers of the first. Run the same forwards in both passes, "
            "call optimizer.zero_grad() after forwards that are not part of a step, or use a closure."
        )
        return True

    def check_second_pass(self) -> None:
        if self.forwards[0] and self.pass_index and not self.forwards[1]:
            raise RuntimeError(
                "no forward pass of the model ran at w + eps, so the loss is detached or cached; compute it again from "
                "the batch in every pass."
            )


def warn_of_other_passes(watch: ModelWatch | None, before: int, after: int) -> bool:
    """Warn if the two passes of a manual loop differ.

    Args:
        watch: the watch of the model; None: no model is known.
        before: how often gradients were added up in the first pass.
        after: how often gradients were added up in this pass.

    Returns:
        Whether there was a warning.
    """
    turns = watch is not None and watch.warn_of_turns()
    forwards = [1, 0] if watch is None else watch.forwards
    if before > after and forwards[0] > forwards[1]:
        warn(
            f"gradients were added up or changed {before} times before the weights were perturbed and {after} times "
            "after it. To accumulate over micro-batches, run all of them in the second pass too, or use passes() or a "
            "list of closures. Clip gradients after the second pass."
        )
        return True
    if watch is not None and watch.differs:
        watch.warn_of_batches()
        return True
    return turns


def _accumulates(weight: Tensor) -> bool:
    """Whether the current backward pass adds to this weight's gradient."""
    if not weight.requires_grad:
        return False
    with torch.enable_grad():
        node: Any = weight.view_as(weight).grad_fn
    try:
        return bool(torch._C._will_engine_execute_node(node.next_functions[0][0]))
    except RuntimeError:
        return False  # torch raises this error inside autograd.grad(), which does not add to gradients


def _version(x: Any) -> int:
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _whole_of_one(x: Any, y: Any) -> bool:
    """Whether both are the same view of all entries of one tensor, as `x[slice(None)]` is in every pass."""
    base = x._base if isinstance(x, Tensor) else None
    return (
        base is not None
        and isinstance(y, Tensor)
        and y._base is base
        and x.numel() == base.numel()
        and (x.shape, x.stride(), x.storage_offset()) == (y.shape, y.stride(), y.storage_offset())
    )


def _alike(x: Any, y: Any) -> bool:
    """Whether two tensors or arrays have equal shapes, types and, on the CPU, values. Never synchronises."""
    if isinstance(x, Tensor) and isinstance(y, Tensor) and (x.is_nested or y.is_nested):
        return True
    if type(x) is not type(y) or x.shape != y.shape or x.dtype != y.dtype:
        return False
    if isinstance(x, Tensor):
        if x.layout is not torch.strided or x.device.type != "cpu" or y.device.type != "cpu":
            return True
    elif x.dtype == object:
        return True
    same = x == y
    return bool(same.all()) or bool((same | ((x != x) & (y != y))).all())
