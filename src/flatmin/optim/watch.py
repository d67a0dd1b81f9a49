"""Watches the model's training forwards without leaving a trace on it."""

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
    """Stands where `nn.Module.__call__` looks for a compiled forward, and tells watches of each call.

    torch leaves this attribute out of copies and pickles, and `torch.jit.script`, `torch.export` and `torch.fx` do not
    look at it, so that a model can be saved, copied and exported while it is watched.

    Args:
        module: whose calls.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.inner = module.__dict__.get(SLOT)  # what `module.compile()` has put there
        self.watches: list[tuple[weakref.ref[ModelWatch], bool]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        if torch.compiler.is_compiling():
            # Traced away, so that the phases of an update cause no recompilation.
            return module._call_impl(*args, **kwargs)
        # Who copies a module's attributes, as DataParallel does for its replicas, copies the slot: the caller knows.
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
            return call(*args, **kwargs)  # a transformation, which must see no values
        trains = module.training or any(m.training for m in module.modules())
        if not (trains and torch.is_grad_enabled()):
            whole_ones = [watch for reference, whole in self.watches if whole and (watch := reference()) is not None]
            for watch in whole_ones if trains else ():
                watch.take_turn()
            result = call(*args, **kwargs)
            for watch in () if trains else whole_ones:
                if watch.random is not None:
                    watch.random.evaluated()
            return result
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
        """Go round what `module.compile()` has put in the place since."""
        module = self._module()
        if module is not None and (found := module.__dict__.get(SLOT)) is not self:
            self.inner = found
            module.__dict__[SLOT] = self

    def watches_over(self, module: nn.Module) -> bool:
        """Whether it was made for this very module."""
        return self._module() is module

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # which is what torch finds where nothing is compiled

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def drop(self, watch: weakref.ref[ModelWatch]) -> None:
        """Forget a watch; the last one takes the slot with it."""
        self.watches = [entry for entry in self.watches if entry[0] is not watch and entry[0]() is not None]
        module = self._module()
        if not self.watches and module is not None and module.__dict__.get(SLOT) is self:
            del module.__dict__[SLOT]
            if self.inner is not None:
                module.__dict__[SLOT] = self.inner


def _slot_of(module: nn.Module) -> CallSlot:
    # torch's own list of the attributes that scripting leaves out; else it would read this one's annotation.
    ignored = torch.jit._recursive.ignored_attributes
    if SLOT not in ignored:
        ignored.append(SLOT)
    slot = module.__dict__.get(SLOT)
    if not (isinstance(slot, CallSlot) and slot.watches_over(module)):
        slot = module.__dict__[SLOT] = CallSlot(module)
    return slot


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that a method of the model's own may call instead of its forward."""
    if type(model).__module__.startswith("torch."):
        return
    waiting = list(model.children())
    while waiting:
        module = waiting.pop()
        yield module
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            waiting += module.children()


class ModelWatch:
    """Sees the model's training forwards.

    Captures and replays random states around them in manual loops, and notices a second pass that ran no forward or
    ran on another batch. It ends with its optimizer.

    Args:
        model: the module that the loop calls.
        random: what to capture and replay; None: nothing.
        weights: the optimizer's.
        follow: called before the first forward of a manual loop's update, for models whose modules change.
        abandoned: called when a forward of a first pass turns out to have been given up.

    Attributes:
        state: what else a forward changes; it is noted before a first pass.
        own_forwards: forwards of the first pass whose inputs are data, not the outputs of another network in training.
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
        """The next training forward opens a new update."""
        self.pass_index, self.forwards = 0, [0, 0]
        self.turns = [0, 0]  # forwards in train mode, also those without gradients
        self.own_forwards = 0
        self.differs = False  # the batch of the second pass from that of the first
        self.backed = False  # gradients of a forward of this update have come
        self.bracketed = False  # a closure or `passes()` brackets each pass, so random states are handled there
        self._batch: list[tuple[Any, int]] | None = None
        if self._whole_called and len(self._slots) > 1:
            # The loop calls the model itself, so that no part need tell.
            for slot in self._slots[1:]:
                slot.drop(self._me)
            del self._slots[1:]
        self._slots[0].stay()

    def clear(self) -> None:
        """Gradients have been cleared: a forward that comes now may open an update."""
        self.cleared = True
        self._slots[0].stay()

    def begin_pass(self, index: int, *, bracketed: bool) -> None:
        self.pass_index, self.bracketed = index, bracketed
        self.forwards[min(index, 1)] = self.turns[min(index, 1)] = 0
        self._before_replay = None

    @property
    def alone(self) -> bool:
        """Whether no other optimizer watches the model, whose forward it may have been."""
        return len(self._slots[0].watches) == 1

    def called(self, args: Any, kwargs: Any, *, whole: bool) -> bool:
        """A training forward begins, of the model or (not `whole`) of a part of it outside of one; whether it does."""
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
        if whole and self.state is not None and self.pass_index:
            self.state.enter_forward()
        self.inside = whole
        self._whole_called |= whole
        return True

    def left(self) -> None:
        """The model's own forward has ended."""
        self.inside = False
        if self.state is not None and self.pass_index:
            self.state.leave_forward()

    def expect_backward(self, result: Any) -> None:
        """Learn when a forward of a manual loop's first pass is followed by a backward that reaches the weights."""
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
        # What depends on weights differs between the passes, and has a graph that must not be kept.
        data = [None if isinstance(x, Tensor) and x.requires_grad else x for x in batch]
        over = self.cleared or self.backed
        if not later and self.forwards[0] and over and not self.bracketed and self._without_gradients():
            # Gradients were cleared since the last forward: it was given up, or another optimizer's.
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
                # Micro-batches that are left out of a second pass are the likelier cause; its end will tell.
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
        """A forward of a manual loop begins, in train mode: it draws what the one of its turn drew in the first pass.

        Data may be drawn between the forwards of the first pass, and not again in the second.
        """
        if self.random is None or self.bracketed or self.inside:
            return
        later = min(self.pass_index, 1)
        if not later and self.cleared and not self.forwards[0] and self._without_gradients():
            self.turns[0], self.cleared = 0, False  # a forward before it was no part of a step
        turn = self.turns[later]
        self.turns[later] += 1
        if not later:
            self.random.capture(-turn or None)
        elif turn:
            self.random.replay(-turn)
        elif self.random.captured():
            self._before_replay = torch.get_rng_state()
            # A batch that is made of such draws differs for that reason.
            self._warned |= self.random.repeat()

    def _without_gradients(self) -> bool:
        return all(w.grad is None for w in self.weights)

    def _recomputed(self) -> None:
        """A forward inside a backward: checkpointing runs it again, from the state before it was replayed."""
        if self._before_replay is not None and torch.equal(self._before_replay, torch.get_rng_state()):
            assert self.random is not None
            self.random.replay()

    def _same(self, batch: list[Any]) -> bool:
        known = self._batch or []
        if len(known) != len(batch):
            return False
        for (x, version), y in zip(known, batch, strict=True):
            if x is None or y is None:
                continue
            written = _version(x) != version
            # Another tensor beside one that the model has written over tells nothing.
            if (written and x is y) or not (written or x is y or _alike(x, y)):
                return False
        return True

    def warn_of_batches(self) -> None:
        """Say once that the passes saw different batches."""
        if not self._warned:
            self._warned = True
            way_out = (
                "fetch the batch before the step, outside the closure"
                if self.bracketed
                else "run the second pass on the batch of the first"
            )
            warn(f"the passes of one step saw different batches; {way_out}.")

    def warn_of_turns(self) -> bool:
        """Say that a manual loop ran the model more often in one pass than in the other, and draws; whether it did."""
        if self.random is None or self.turns[0] == self.turns[1] or not self.random.drawn():
            return False
        warn(
            f"the model ran {self.turns[0]} times before the weights were perturbed and {self.turns[1]} times after "
            "it, so the second pass cannot draw the random numbers of the first. Run the same forwards in both passes, "
            "call optimizer.zero_grad() after forwards that are no part of a step, or use a closure."
        )
        return True

    def check_second_pass(self) -> None:
        if self.forwards[0] and self.pass_index and not self.forwards[1]:
            raise RuntimeError(
                "no forward pass of the model ran at w + eps; the loss is detached or cached: "
                "compute it again from the batch in every pass."
            )


def warn_of_other_passes(watch: ModelWatch | None, before: int, after: int) -> bool:
    """Say what a manual loop did in one pass and not in the other; whether it did.

    Args:
        watch: of the model; None: no model is known.
        before: how often gradients were added up in the first pass.
        after: how often in this one.
    """
    turns = watch is not None and watch.warn_of_turns()
    forwards = [1, 0] if watch is None else watch.forwards
    if before > after and forwards[0] > forwards[1]:
        warn(
            f"gradients were added up or changed {before} times before the weights were perturbed and {after} times "
            "after it. To accumulate over micro-batches, run all of them in the second pass too, or use passes() or a "
            "list of closures; clip gradients after the second pass."
        )
        return True
    if watch is not None and watch.differs:
        watch.warn_of_batches()
        return True
    return turns


def _accumulates(weight: Tensor) -> bool:
    """Whether the backward pass that is running adds to this weight's gradient."""
    if not weight.requires_grad:
        return False
    with torch.enable_grad():
        node: Any = weight.view_as(weight).grad_fn
    try:
        return bool(torch._C._will_engine_execute_node(node.next_functions[0][0]))
    except RuntimeError:
        return False  # this is how torch says that it runs autograd.grad(), which adds to no gradient


def _version(x: Any) -> int:
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _alike(x: Any, y: Any) -> bool:
    """Whether two tensors or arrays have equal shape, type and, on the CPU, values; never a synchronisation."""
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
