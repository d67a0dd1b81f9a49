"""What every method costs, beside what its recipe states: time over a plain step of the base, gradients, and copies.

Every step of a method runs directly after a plain step of the base on its own copy of the model; a sample is the sum
over a window of steps, a multiple of every method's period. The control is the plain step, run as if it were a method.
LookSAM against SAM, and the methods with one gradient a step, are measured once more in whole windows that take turns:
there each method finds the caches as it left them itself, as in training.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import flatmin
from benchmarks.counts import SLACK, held_copies
from benchmarks.loops import Loop, Setting, floor, ours, recipe_of
from benchmarks.nets import BASES, NETS
from benchmarks.results import BenchmarkResult, Gate, Spread, Table
from benchmarks.timing import seconds
from flatmin.optim.state import PREFIX

HELP = "every method's time, gradients and copies beside what its recipe states; 8 min, wants a quiet machine"
DEFAULT_NETS = ("mlp200", "resnet18-w8")
GATED_NET, CONTROL, RESOLUTION = "mlp200", "A/A control (plain step)", 0.10
WINDOW, WARM, LONG, FEW = 10, 2, 100, 2
FLAT = "default, flat=True"
LOOK, LOOK_BASES, TURNS = ("looksam", "sam", 0.65), ("fused", FLAT), 6
CHEAP, ABOVE = ("every-k", "momentum-sam", "stale-sam", "late"), 1.15
ABOVE_FLAT = 1.10
IN_TURNS = ("momentum-sam", "stale-sam")  # every step alike, so that any window of theirs will do
HEADERS = (
    *("method", "x plain step, median [IQR]", "gradients stated", "measured", "x per gradient", "closure calls"),
    *("copies stated", "measured"),
)


@dataclass
class Cost:
    """What was measured of one method on one net.

    Args:
        ratios: time of a window over that of the plain steps in it.
        calls: closure calls per step, one entry a window.
        share: of the batch that a call works on.
        stated: gradient evaluations per step, by the recipe.
        copies: (measured, stated) in the last pass.
    """

    ratios: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    share: float = 1.0
    stated: float = 1.0
    copies: tuple[float, int] = (0.0, 0)

    @property
    def over(self) -> Spread:
        """The time over the plain step's."""
        return Spread.of(self.ratios)

    @property
    def passes(self) -> float:
        """Gradients of the whole batch per step, by the closure calls: second-order products are not among them."""
        return sum(self.calls) / len(self.calls) * self.share


def window(method: str) -> int:
    """Steps in a sample: a multiple of the method's period."""
    long = any(name.endswith(".interval") and k > WINDOW for name, k in recipe_of(method).parameters().items())
    return LONG if long else WINDOW


def sample(setting: Setting, loop: Loop, plain: Loop, steps: int) -> tuple[float, float]:
    """(time over the plain step's, closure calls per step) over a window of steps that starts at update 0."""
    calls: list[str] = []
    for _ in range(WARM):
        plain.step()
        loop.step()
    if isinstance(loop.optimizer, flatmin.SAM):
        loop.optimizer.param_groups[0][PREFIX + "step"] = 0
    clock = partial(seconds, device=setting.device, repeats=1, warm=False)
    loop.hooks.append(calls.append)
    mine = reference = 0.0
    for _ in range(steps):
        reference += clock(plain.step)
        mine += clock(loop.step)
    return mine / reference, calls.count("start") / steps


def measure(setting: Setting, methods: list[str], rounds: int, seed: int = 0) -> tuple[dict[str, Cost], dict[str, str]]:
    """The costs by method, the control first; and the reasons of the methods that cannot run on the net."""
    costs, skipped = {CONTROL: Cost()}, {}
    for method in methods:
        try:
            held = held_copies(setting, method)
        except ValueError as error:
            skipped[method] = str(error)
            continue
        stated = recipe_of(method).gradient_evaluations
        costs[method] = Cost(share=ours(setting, method).share, stated=stated, copies=held)
    order = random.Random(seed)
    gc.disable()
    try:
        for number in range(rounds):
            for label in order.sample(list(costs), len(costs)):
                steps = WINDOW if label == CONTROL else window(label)
                if steps > WINDOW and number >= FEW:
                    continue
                loop = floor(setting, passes=1) if label == CONTROL else ours(setting, label)
                ratio, calls = sample(setting, loop, floor(setting, passes=1), steps)
                costs[label].ratios.append(ratio)
                costs[label].calls.append(calls)
                del loop
                gc.collect()
    finally:
        gc.enable()
    return costs, skipped


def row(method: str, cost: Cost) -> tuple[str, ...]:
    """The line of one method."""
    over = cost.over
    return (
        method,
        over.ratio(),
        f"{cost.stated:.2f}",
        f"{cost.passes:.2f}",
        f"{over.median / cost.stated:.2f}",
        f"{cost.passes / cost.share:.2f}",
        str(cost.copies[1]),
        f"{cost.copies[0]:.2f}",
    )


def gates(net: str, costs: dict[str, Cost]) -> list[Gate]:
    """The limits on one net: copies always, times unless the control says that nothing can be told."""
    noisy = costs[CONTROL].over.relative_iqr > RESOLUTION
    beyond = {m: c.copies[0] - c.copies[1] for m, c in costs.items()}
    excess = ", ".join(f"{m} {x:+.2f}" for m, x in beyond.items() if x > SLACK) or f"{max(beyond.values()):.3f}"
    made = [Gate(f"{net}: copies above the stated ones", excess, f"<= {SLACK}", max(beyond.values()) <= SLACK)]

    def timed(name: str, value: float, limit: float) -> None:
        made.append(Gate(name, "inconclusive" if noisy else f"{value:.3f}", f"<= {limit}", noisy or value <= limit))

    for method in CHEAP:
        if method in costs and not (net == GATED_NET and method in IN_TURNS):
            cost = costs[method]
            timed(f"{net}: {method} over its gradients' plain steps", cost.over.median / cost.stated, ABOVE)
    return made


def turns(loops: dict[str, Loop], windows: int) -> dict[str, list[float]]:
    """Seconds of windows of steps, by loop; the loops take turns, after one window each that does not count."""
    spent: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(-1, windows):
        for name, loop in loops.items():

            def window_of(step: Callable[[], object] = loop.step) -> None:
                for _ in range(WINDOW):
                    step()

            time = seconds(window_of, "cpu", repeats=1, warm=False)
            if number >= 0:
                spent[name].append(time)
    return spent


def by_base(net: str, times: dict[str, dict[str, list[float]]]) -> tuple[Table, list[Gate]]:
    """LookSAM's time over SAM's for each implementation of the base, from the windows of `turns`.

    A base whose own step is long leaves less to gain, since LookSAM takes as many of these steps as SAM does: the
    column "without own work" is the share of k - 1 plain steps and one of SAM.
    """
    mine, other, limit = LOOK
    k = recipe_of(mine).parameters()["schedule.k"]
    over = {
        base: {m: Spread.of([x / y for x, y in zip(spent[m], spent[other], strict=True)]) for m in (mine, CONTROL)}
        for base, spent in times.items()
    }
    rows = [
        (base, ratios[mine].ratio(), f"{((k - 1) * ratios[CONTROL].median + 1) / k:.3f}", ratios[CONTROL].ratio())
        for base, ratios in over.items()
    ]
    made = []
    for base in LOOK_BASES:
        share = over[base][mine]
        noisy = share.relative_iqr > RESOLUTION
        value = "inconclusive" if noisy else f"{share.median:.3f}"
        name = f"{net}, base {base}: {mine} over {other}"
        made.append(Gate(name, value, f"<= {limit}", noisy or share.median <= limit))
    headers = ("base", f"{mine} over {other}, median [IQR]", "without own work", f"plain step over {other}")
    table = Table(f"{net}: {mine} over {other} by implementation of the base", headers, rows)
    return table, made


def in_turns(net: str, times: dict[str, dict[str, list[float]]]) -> tuple[Table, list[Gate]]:
    """The time of methods with one gradient a step over a plain step's, from the windows of `turns`."""
    rows, made = [], []
    for base, limit in (("default", ABOVE), (FLAT, ABOVE_FLAT)):
        for method in IN_TURNS:
            spent = times[base]
            over = Spread.of([x / y for x, y in zip(spent[method], spent[CONTROL], strict=True)])
            noisy = over.relative_iqr > RESOLUTION
            value = "inconclusive" if noisy else f"{over.median:.3f}"
            label = f"{method}, flat=True" if base == FLAT else method
            rows.append((label, over.ratio()))
            name = f"{net}, in turns: {label} over a plain step"
            made.append(Gate(name, value, f"<= {limit}", noisy or over.median <= limit))
    return Table(f"{net}: one gradient a step, in turns", ("method", "x plain step, median [IQR]"), rows), made


def run_bases(net: str, windows: int) -> dict[str, dict[str, list[float]]]:
    """The windows that `by_base` and `in_turns` compare; the latter with the default base.

    The plain step is that of the base alone, also beside methods with `flat=True`.
    """
    times = {}
    for base in (*BASES, FLAT):
        flat = base == FLAT
        setting = Setting(NETS[net], "default" if flat else base)
        methods = (LOOK[1], LOOK[0], *(IN_TURNS if setting.base == "default" else ()))
        loops = {method: ours(setting, method, flat=flat) for method in methods}
        times[base] = turns(loops | {CONTROL: floor(setting, passes=1)}, windows)
    return times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--nets", nargs="+", default=list(DEFAULT_NETS), choices=list(NETS), metavar="NET")
    parser.add_argument("--methods", nargs="+", default=list(flatmin.METHODS), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each method, at least 2")


def run(options: argparse.Namespace) -> BenchmarkResult:
    """The benchmark as asked for on the command line."""
    settings = {"base": "default", "device": "cpu", "clock": "thread CPU time", "rounds": options.rounds}
    result = BenchmarkResult("cost", settings=settings)
    for name in options.nets:
        costs, skipped = measure(Setting(NETS[name]), options.methods, options.rounds)
        table = Table(f"{name}: time, gradients and copies", HEADERS, [row(m, c) for m, c in costs.items()])
        result.tables.append(table)
        result.gates += gates(name, costs)
        noise = costs[CONTROL].over.relative_iqr
        verdict = ", so the times of this run are inconclusive." if noise > RESOLUTION else "."
        if name == GATED_NET and {*LOOK[:2]} <= costs.keys():
            times = run_bases(name, TURNS * options.rounds)
            for compare in (by_base, in_turns):
                table, made = compare(name, times)
                result.tables.append(table)
                result.gates += made
            result.raw[f"{name} by base"] = times
        result.notes.append(f"{name}: the control's quartiles are {noise:.1%} apart{verdict}")
        result.notes += [f"{name}: {m} cannot run: {reason}" for m, reason in skipped.items()]
        result.raw[name] = {m: c.ratios for m, c in costs.items()}
    result.notes += [
        f"A window is {WINDOW} steps, or {LONG} in {FEW} samples for methods with a longer period. Each call of "
        "micro-sam sees half a batch. Second-order products and per-sample gradients are stated, and are no calls.",
        "Copies: of all parameters, in the last pass, the most of several steps; activations that a kept graph holds "
        "are not counted.",
    ]
    return result
