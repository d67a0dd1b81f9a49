"""Exact counts of a step: modelled launches, synchronisations, extra memory, arithmetic. No clock; limits are gates."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import flatmin
from benchmarks import peers
from benchmarks.launches import Recorder
from benchmarks.loops import Loop, Setting, floor, other, ours, recipe_of
from benchmarks.nets import NETS
from benchmarks.results import BenchmarkResult, Gate, Table
from flatmin.methods import Recipe

HELP = "launches, synchronisations, memory and arithmetic of a step, against exact limits"
GATED_NETS = ("mlp200", "vit-d192", "resnet18-w8")
METHOD_NET = "vit-d64"
# Parameters with which a few steps show all that the method holds: a refresh, an ascent.
SHOWING: dict[str, dict[str, Any]] = {"ssam-f": {"interval": 2}, "ssam-d": {"interval": 2}, "ae-sam": {"start": -1e3}}
SLACK = 0.01
# Methods that leave out a part of two passes -> the largest share of their floating-point operations. A pass is three
# forwards: itself, the gradients of its inputs, and those of its weights.
SHARES = {
    "esam": 0.86,  # (1 + 1 + 0.6 of pass 1, 1 of the choice, 1.5 of its half) / 6, in the mean over the draws
    "sam-on": 0.84,  # (2 + 3) / 6
    "only": 0.68,  # (1 + 3) / 6
}
ARITHMETIC_NET, ARITHMETIC_BATCH, DRAWS = "resnet18-w8", 4, 20
RATIO, ADDED, SMALL = 1.03, 16, 100
# label -> (nonfinite, base, flat=, synchronisations allowed)
MODES = {
    "propagate": ("propagate", "foreach", False, 0),
    "skip": ("skip", "foreach", False, 1),
    "skip, fused base": ("skip", "fused", False, 0),
    "skip, flat": ("skip", "foreach", True, 1),
    "skip, fused base, flat": ("skip", "fused", True, 0),
}


@dataclass(frozen=True)
class Count:
    """One step, after another one so that all state exists. Memory in bytes, at both ends of the last pass."""

    launches: int
    syncs: int
    by_op: dict[str, int]
    held: tuple[int, int]
    checkpoint: int
    parameters: int
    tensors: int
    passes: float


def count(make: Callable[[], Loop], warm: int = 1, steps: int = 1) -> Count:
    """Run a loop under the recorder.

    Args:
        make: builds the loop; everything it allocates is followed.
        warm: steps before the counted one.
        steps: of which the last one is counted, and the most that any one holds.
    """
    held: list[int] = []
    most = (0, 0)
    with Recorder() as recorder:
        loop = make()
        loop.hooks.append(lambda where: held.append(recorder.live_bytes()))
        for _ in range(warm):
            loop.step()
        for _ in range(steps):
            recorder.reset()
            held.clear()
            loop.step()
            most = (max(most[0], held[-2]), max(most[1], held[-1]))
        launches, syncs, by_op = recorder.launches, recorder.syncs, dict(recorder.by_op)
    weights = list(loop.model.parameters())
    return Count(
        launches=launches,
        syncs=syncs,
        by_op=by_op,
        held=most,
        checkpoint=_checkpoint_bytes(loop.optimizer),
        parameters=sum(w.nbytes for w in weights),
        tensors=len(weights),
        passes=len(held) / 2 * loop.share,
    )


def _checkpoint_bytes(optimizer: Any) -> int:
    sizes: dict[int, int] = {}

    def visit(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            for value in x.values():
                visit(value)
        elif isinstance(x, (list, tuple)):
            for value in x:
                visit(value)

    visit(optimizer.state_dict())
    return sum(sizes.values())


def extra_copies(count_: Count, reference: Count, *, graph: bool = False) -> float:
    """Memory in the last pass beyond the floor's, in copies of the parameters: the larger of its start and end.

    Where the pass keeps its `graph`, its end holds activations as well, so only the start is taken.
    """
    ends = zip(count_.held, reference.held, strict=True)
    return max(a - b for a, b in ([next(ends)] if graph else ends)) / count_.parameters


def keeps_graph(recipe: Recipe) -> bool:
    """Whether the graph of the last pass is kept for second derivatives."""
    return recipe.combine.keeps_graph


def saved_copies(count_: Count, reference: Count) -> float:
    """Size of the checkpoint beyond the base's, in copies of the parameters."""
    return (count_.checkpoint - reference.checkpoint) / count_.parameters


def cpu_copies(net: str) -> float:
    """Memory in pass 2 beyond the floor's where the engine takes its path for the CPU, in copies of the parameters."""
    setting = Setting(NETS[net])
    return extra_copies(count(lambda: ours(setting)), count(lambda: floor(setting)))


@functools.cache
def plain(setting: Setting) -> Count:
    """A step of the base."""
    return count(lambda: floor(setting, passes=1))


def held_copies(setting: Setting, method: str, steps: int = 6) -> tuple[float, int]:
    """(measured, stated) copies of the parameters that a method holds in the last pass: the most of several steps.

    Raises:
        ValueError: a method that cannot run on the net, with the reason.
    """
    recipe = recipe_of(method, steps, **SHOWING.get(method, {}))
    step = count(lambda: ours(setting, recipe), steps=steps)
    return extra_copies(step, plain(setting), graph=keeps_graph(recipe)), recipe.extra_copies


def reads_nothing(net: str = METHOD_NET) -> bool:
    """Whether a propagating step runs on the meta device, where no value exists that could be read."""
    loop = ours(Setting(NETS[net], base="foreach", device="meta"), nonfinite="propagate")
    try:
        loop.step()
        loop.step()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def operations(loop: Loop, steps: int) -> float:
    """Floating-point operations of a step in matrix products and convolutions, in the mean over several."""
    for _ in range(4):  # in its first three updates, flatmin looks for further parameters of the loss
        loop.step()
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            loop.step()
    return counter.get_total_flops() / steps


def arithmetic() -> tuple[Table, list[Gate]]:
    """Operations of SAM, and of the methods that leave out a part of its two passes, over those of two passes."""
    setting = Setting(NETS[ARITHMETIC_NET], batch=ARITHMETIC_BATCH)
    two = operations(floor(setting), 1)
    table = Table(f"Arithmetic of a step, {ARITHMETIC_NET}", ("step", "operations / two passes"))
    gates = []
    for method, most in {"sam": 1.0, **SHARES}.items():
        chooses = recipe_of(method).samples.selects
        share = operations(ours(setting, method, chooses=chooses), DRAWS if chooses else 1) / two
        table.rows.append((f"{method}, select_samples" if chooses else method, f"{share:.3f}"))
        gates.append(Gate(f"{method}: operations / two passes", f"{share:.3f}", f"<= {most}", share <= most))
    return table, gates


def sam_gates(net: str, mode: str, step: Count, reference: Count) -> list[Gate]:
    """The limits for SAM's whole step on one network."""
    _, _, flat, allowed = MODES[mode]
    ratio, added = step.launches / reference.launches, step.launches - reference.launches
    label = f"{net}, {mode}"
    gates = [Gate(f"{label}: synchronisations", str(step.syncs), f"= {allowed}", step.syncs == allowed)]
    if flat or reference.tensors <= SMALL:
        gates.append(Gate(f"{label}: launches above the floor", f"{added:+d}", f"<= +{ADDED}", added <= ADDED))
    else:
        gates.append(Gate(f"{label}: launches / floor", f"{ratio:.4f}", f"<= {RATIO}", ratio <= RATIO))
    extra, saved = extra_copies(step, reference), saved_copies(step, reference)
    most = 2.01 if flat else 1.01  # the buffer of gradients is one more
    gates.append(Gate(f"{label}: copies in pass 2", f"{extra:.3f}", f"<= {most}", extra <= most))
    gap = 0.01 if flat else 0.0  # blocks have gaps between weights, so that each begins at a round address
    gates.append(Gate(f"{label}: copies in a checkpoint", f"{saved:.3f}", f"<= {gap:g}", saved <= gap))
    return gates


def _row(label: str, step: Count, reference: Count, *more: str) -> tuple[str, ...]:
    return (
        label,
        str(step.launches),
        f"{step.launches - reference.launches:+d}",
        f"{step.launches / reference.launches:.3f}",
        str(step.syncs),
        f"{extra_copies(step, reference):.2f}",
        *more,
        f"{saved_copies(step, reference):.2f}",
    )


HEADERS = ("step", "launches", "above floor", "/ floor", "syncs", "copies in pass 2")


def measure(nets: tuple[str, ...] = GATED_NETS, methods: bool = True) -> BenchmarkResult:
    """Count SAM on `nets`, and every method on one of them."""
    result = BenchmarkResult("counts", settings={"nets": ", ".join(nets)})
    for name in nets:
        net = NETS[name]
        table = Table(name, (*HEADERS, "in checkpoint"))
        references: dict[str, Count] = {}
        for mode, (nonfinite, base, flat, _) in MODES.items():
            setting = Setting(net, base=base, device="meta")
            if base not in references:
                references[base] = count(lambda s=setting: floor(s))
                label = f"floor, {base} SGD, {references[base].tensors} tensors"
                table.rows.append(_row(label, references[base], references[base]))
            reference = references[base]
            step = count(lambda s=setting, n=nonfinite, f=flat: ours(s, "sam", n, flat=f), warm=3)
            table.rows.append(_row(f"sam, {mode}", step, reference))
            result.gates += sam_gates(name, mode, step, reference)
            added = {k: v - reference.by_op.get(k, 0) for k, v in step.by_op.items()}
            result.raw[f"{name}, {mode}"] = {
                "launches": step.launches,
                "floor": reference.launches,
                "syncs": step.syncs,
                "added": {k: v for k, v in added.items() if v},
            }
        setting = Setting(net, base="foreach", device="meta")
        extra = cpu_copies(name)
        table.rows.append(("sam, skip, on the CPU", "-", "-", "-", "-", f"{extra:.2f}", "-"))
        result.gates.append(Gate(f"{name}, CPU: copies in pass 2", f"{extra:.3f}", "<= 1.01", extra <= 1.01))
        for label, build in peers.found().items():
            if not label.startswith(peers.COUNTED):
                continue
            table.rows.append(_row(label, count(lambda s=setting, b=build: other(s, b)), references["foreach"]))
        result.tables.append(table)
    table, gates = arithmetic()
    result.tables.append(table)
    result.gates += gates
    ok = reads_nothing()
    result.gates.append(Gate("sam, propagate: runs where no value can be read", "yes" if ok else "no", "yes", ok))
    if methods:
        table, beyond = method_table()
        result.tables.append(table)
        value = (
            ", ".join(f"{name} {x:+.3f}" for name, x in beyond.items() if x > SLACK) or f"{max(beyond.values()):.3f}"
        )
        within = max(beyond.values()) <= SLACK
        result.gates.append(Gate("every method: copies above the stated ones", value, f"<= {SLACK}", within))
    result.notes += [
        "The floor is twice zero_grad, forward and backward, and one step of the base (SGD with momentum).",
        "Launches are modelled (see launches.py). The model leaves out two launches inside every global norm, and one "
        "more per 128 tensors.",
        "Operations are those of convolutions and matrix products, as torch.utils.flop_counter counts them.",
    ]
    return result


def method_table() -> tuple[Table, dict[str, float]]:
    """Every method's counts on one network, and the copies that each holds in its last pass above the stated ones."""
    title = f"Every method, {METHOD_NET}, skip, foreach SGD"
    table = Table(title, (*HEADERS, "stated", "in checkpoint", "passes"))
    setting = Setting(NETS[METHOD_NET], base="foreach", device="meta")
    floors: dict[int, Count] = {}
    beyond: dict[str, float] = {}
    for method in flatmin.METHODS:
        recipe = recipe_of(method, total=1, **SHOWING.get(method, {}))
        step = count(lambda r=recipe: ours(setting, r))
        passes = round(step.passes)
        if passes not in floors:
            floors[passes] = count(lambda n=passes: floor(setting, passes=n))
        row = _row(method, step, floors[passes], str(recipe.extra_copies))
        table.rows.append((*row, str(passes)))
        beyond[method] = extra_copies(step, floors[passes], graph=keeps_graph(recipe)) - recipe.extra_copies
    return table, beyond


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--nets", nargs="+", default=list(GATED_NETS), choices=list(NETS), metavar="NET")


def run(options: argparse.Namespace) -> BenchmarkResult:
    """The benchmark as asked for on the command line."""
    return measure(tuple(options.nets))
