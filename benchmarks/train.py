"""A training run as a user starts it: images per second, SAM beside SGD, and what the making of batches costs.

`pipeline`: seconds of the feed a batch (order, index, crop, mirror, cutout, normalisation) as a share of an update on a
batch that is ready. `epoch`: the whole trainer through its feed, in its settings, beside the same step written plainly
with a data loader, and beside the pipeline of the papers' scripts. Every sample is a window of updates of SGD, one of
SAM, and one of SGD again; settings take turns in random order. Before that each setting's update is held against plain
float32 on the same batch. `profile`: where the time of an update goes. CPU times are CPU time of one thread with the
loader in it; GPU times lie between events.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import random
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch

from benchmarks import agreement, images, peak
from benchmarks.results import BenchmarkResult, Gate, Spread, Table
from benchmarks.timing import seconds
from benchmarks.training import METHODS, NETS, Kind, Ours, Plain, TimedTraining, config_of, original, ours, plain
from flatmin.data.dataset import Data
from flatmin.train.feed import Batch, Feed
from flatmin.train.loop import train
from flatmin.train.result import Epoch

HELP = "a whole training run: images/s, SAM beside SGD, the input pipeline; CPU --quick: 3 min"
EPOCH, BATCH, QUICK_BATCH = 50_000, 128, 32
SHARE, TWICE, RESOLUTION, TIMES, TARGET = 0.03, 2.02, 0.10, 10.0, 1.5
SAME_WAY, SAME_WAY_ROUNDED = 0.999, 0.95  # cosine to plain float32's update
FASTEST = {
    "cuda": ({"precision": "bf16", "channels_last": True, "graph": True}, {"precision": "bf16", "channels_last": True}),
    "cpu": ({"precision": "bf16", "channels_last": True},),
}
FEWEST = 2  # samples that a spread needs, whatever the time
GROUPS = ("flatmin", "plain", "original")
GROUP = 32  # batches that the feed makes at once on a GPU, at the usual size


def kinds(device: str) -> list[Kind]:
    """Everything that is compared, the most important first: time may run out."""
    half = {"precision": "bf16", "channels_last": True}
    if device == "cpu":
        return [
            ours(device, "float32"),
            ours(device, "float32", channels_last=True),
            ours(device, "bf16", **half),
            ours(device, "bf16", **half, compile=True),
            plain(device, 0, autocast=False),
            plain(device, 0, autocast=True),
            plain(device, 0, autocast=True, channels_last=True),
            plain(device, 0, autocast=True, channels_last=True, compile=True),
            original(device, 0),
        ]
    return [
        ours(device, "bf16", **half, graph=True),
        original(device, 2),
        ours(device, "float32"),
        plain(device, 8, autocast=False),
        ours(device, "bf16", **half),
        plain(device, 8, autocast=True),
        plain(device, 8, autocast=True, channels_last=True),
        plain(device, 8, autocast=True, channels_last=True, compile=True),
        ours(device, "tf32", tf32=True),
        original(device, 4),
        original(device, 2, torchvision=True),
        original(device, 8),
        ours(device, "bf16", **half, compile=True),
        ours(device, "bf16", **half, compile=True, graph=True),
    ]


@dataclass
class Running:
    """A kind of training, ready, with its samples.

    Args:
        kind: what it is.
        arms: by method.
        start: seconds until both had made their first updates.
        memory: peak bytes on the device until then, or None.
        updates: of a window, or of one turn in it.
        turns: how often SGD, SAM and SGD take turns in a window. On a CPU after every update, because what else runs
            there comes and goes.
        settle: updates before a window, so that no batch in it was made before.
        samples: seconds of [SGD, SAM, SGD] windows.
        beside: (difference over the way gone, cosine) to plain float32, by method.
    """

    kind: Kind
    arms: dict[str, TimedTraining]
    start: float = 0.0
    memory: int | None = None
    updates: int = 1
    turns: int = 1
    settle: int = 0
    samples: list[list[float]] = field(default_factory=list)
    beside: dict[str, tuple[float, float]] = field(default_factory=dict)

    def seconds(self, method: str) -> list[float]:
        """Of one update, by round."""
        return [(b if method == "sam" else (a + c) / 2) / (self.updates * self.turns) for a, b, c in self.samples]


# -- the feed --------------------------------------------------------------------------------------------------------


def waits(feed: Feed) -> float:
    """Share of a busy spell of the GPU that the host spends making a group of batches: near 1 if it waits for it."""
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    batches = feed.epoch()
    for _ in range(GROUP):
        next(batches)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(100):
        a @ a
    made = time.perf_counter()
    next(batches)
    host = time.perf_counter() - made
    torch.cuda.synchronize()
    return host / (time.perf_counter() - begun)


def feeding(feed: Feed, arm: Ours, ready: Batch, updates: int, device: str) -> list[float]:
    """Seconds of a batch from the feed, of an update on a batch that is ready, and on a GPU of one with its batch."""

    def epoch() -> None:
        for _ in feed.epoch():
            pass

    clock = partial(seconds, device=device, repeats=1, warm=False)
    row = [clock(epoch) / feed.steps, clock(lambda: arm.repeat(ready, updates)) / updates]
    if device == "cuda":
        arm.run(GROUP)
        row.append(clock(lambda: arm.run(updates)) / updates)
    return row


def pipeline(options: argparse.Namespace, data: Data, result: BenchmarkResult, deadline: float) -> None:
    """Add what the feed costs beside an update of each net."""
    gpu = options.device == "cuda"
    batch = options.batch or BATCH
    updates = 4 * GROUP if gpu else 1
    headers = ["net, method", "update, ms", "feed, ms", "feed over update", *(["added to an update"] if gpu else [])]
    table = Table("", headers)
    chosen: dict[str, object] = {}
    for net in options.pipeline_nets:
        arms, chosen = _fastest(net, batch, data, options.device, result)
        feed = Feed(data, config_of(net, "sgd", batch, options.device, **chosen))
        ready = next(feed.epoch())
        rows_of: dict[str, list[list[float]]] = {method: [] for method in arms}
        for number in range(options.rounds + 1):
            for method, arm in random.Random(number).sample(list(arms.items()), len(arms)):
                row = feeding(feed, arm, ready, updates, options.device)
                if number:
                    rows_of[method].append(row)
        for method, rows in rows_of.items():
            alone = Spread.of([row[0] / row[1] for row in rows])
            cells = [f"{net}, {method}", *(f"{1e3 * median(row[i] for row in rows):.3f}" for i in (1, 0))]
            cells.append(_percent(alone))
            costs = alone
            if gpu:
                costs = Spread.of([row[2] / row[1] - 1 for row in rows])
                cells.append(_percent(costs))
            table.rows.append(cells)
            what = "added by the feed to" if gpu else "feed over"
            name = f"pipeline: {what} an update of {method}, {net}"
            result.gates.append(Gate(name, f"{costs.median:.2%}", f"<= {SHARE:.0%}", costs.median <= SHARE))
            result.raw[f"pipeline, {net}, {method}"] = rows
        if gpu:
            share = waits(feed)
            verdict = "it waits for the GPU" if share > 0.5 else "it does not wait for the GPU"
            result.notes.append(f"{net}: making {GROUP} batches while the GPU is busy: {share:.0%} of that: {verdict}.")
        if net == "resnet18-w16":
            result.notes.append(
                f"{net}: a quarter of ResNet-18's width; an update of the whole takes seconds on a CPU."
            )
        del arms, arm
        gc.collect()
    table.title = f"pipeline: batch {batch}, {_words(chosen)}"
    result.tables.append(table)


def _fastest(
    net: str, batch: int, data: Data, device: str, result: BenchmarkResult
) -> tuple[dict[str, Ours], dict[str, object]]:
    """Warm trainers in the fastest setting that there is, and the setting: an update is short there."""
    for number, settings in enumerate(FASTEST[device]):
        try:
            arms = {m: Ours(config_of(net, m, batch, device, **settings), data) for m in METHODS}
            for arm in arms.values():
                arm.run(8 if device == "cuda" else 1)
            return arms, dict(settings)
        except Exception as error:
            if number + 1 == len(FASTEST[device]):
                raise
            result.notes.append(f"pipeline, {_words(settings)}: not available: {_first_line(error)}")
    raise AssertionError(device)


# -- epochs ----------------------------------------------------------------------------------------------------------


def build(kind: Kind, net: str, batch: int, data: Data, device: str) -> dict[str, TimedTraining] | None:
    """Both arms of a kind after their first updates; None if something is not installed."""
    arms = {}
    for method in METHODS:
        arm = kind.build(net, method, batch, data)
        if arm is None:
            return None
        arm.run(8 if device == "cuda" else 1)
        arms[method] = arm
    return arms


def prepare(kind: Kind, net: str, batch: int, data: Data, device: str, window: float) -> Running | None:
    """A kind, ready to be sampled; None if something is not installed."""
    gpu = device == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begun = time.perf_counter()
    arms = build(kind, net, batch, data, device)
    if arms is None:
        return None
    running = Running(kind, arms)
    if gpu:
        torch.cuda.synchronize()
        running.memory = torch.cuda.max_memory_allocated() - before
    running.start = time.perf_counter() - begun
    running.settle = kind.ahead + 2 if gpu else 0
    arms["sgd"].run(running.settle)
    probe = 16 if gpu else 1
    each = seconds(lambda: arms["sgd"].run(probe), device, 1, warm=False) / probe
    wanted = max(1, round(window / each))
    if not gpu:
        running.turns = wanted
    else:
        # The feed makes a group at once, so that whole groups belong into a window.
        running.updates = GROUP * math.ceil(wanted / GROUP) if kind.ours else wanted
    return running


def sample(running: Running, device: str) -> None:
    """Add windows of SGD, SAM and SGD again."""
    row = [0.0, 0.0, 0.0]
    for _ in range(running.turns):
        for place, method in enumerate(("sgd", "sam", "sgd")):
            arm = running.arms[method]
            arm.run(running.settle)
            row[place] += seconds(lambda a=arm: a.run(running.updates), device, 1, warm=False)
    running.samples.append(row)


def epochs(options: argparse.Namespace, data: Data, result: BenchmarkResult, deadline: float) -> None:
    """Add seconds of an epoch in each setting, and how they compare."""
    device, net = options.device, options.net
    batch = options.batch or (QUICK_BATCH if options.quick else BATCH)
    u = images.AUGMENT.draw(batch, torch.Generator().manual_seed(2))
    x = images.AUGMENT.apply(data.train.x[:batch], images.CIFAR10, u)
    y = data.train.y[:batch]
    begun = time.monotonic()
    ready: list[Running] = []
    references = {
        m: Plain(config_of(net, m, batch, device), data, images.Bytes(data.train), workers=0) for m in METHODS
    }
    for kind in kinds(device):
        if options.arms and not any(word in kind.name for word in options.arms):
            continue
        if "compile" in kind.name and not options.compile:
            continue
        if ready and time.monotonic() - begun > (deadline - begun) * 0.6:
            result.notes.append(f"{kind.name}: left out, no time.")
            continue
        try:
            if "graph" in kind.name:
                time.sleep(0.5)  # until the loaders' threads are idle: a capture refuses what they would do meanwhile
            running = prepare(kind, net, batch, data, device, options.window)
            if running is None:
                result.notes.append(f"{kind.name}: not installed.")
                continue
            for method, arm in running.arms.items():
                running.beside[method] = agreement.beside_plain(arm, references[method], x, y)
            ready.append(running)
        except Exception as error:  # one setting that fails must not take the others' numbers away
            result.notes.append(f"{kind.name}: not available: {_first_line(error)}")
    order = random.Random(0)
    rates = dict.fromkeys(peak.PRECISIONS[device], 0.0)
    for number in range(options.rounds):
        # The best of the rounds: what the device could do, also where others use it too.
        rates = {precision: max(best, peak.rate(precision, device)) for precision, best in rates.items()}
        for running in order.sample(ready, len(ready)):
            if number >= FEWEST and time.monotonic() > deadline:
                break
            try:
                if device == "cpu" and "compile" not in running.kind.name:
                    # Anew, so that a lucky place in memory is part of the spread.
                    running.arms = build(running.kind, net, batch, data, device) or {}
                sample(running, device)
            except Exception as error:
                result.notes.append(f"{running.kind.name}: stopped: {_first_line(error)}")
                ready.remove(running)
    flops = peak.operations(ready[0].arms["sgd"].model, x[:2]) if ready else 0.0
    report(net, batch, device, ready, flops, rates, options.over, result)


def report(
    net: str,
    batch: int,
    device: str,
    ready: Sequence[Running],
    flops: float,
    rates: dict[str, float],
    over: str,
    result: BenchmarkResult,
) -> None:
    """Add tables, gates and samples of what ran; speeds are multiples of that of the setting `over`."""
    gpu = device == "cuda"
    speeds = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates.items())
    result.notes.append(
        f"{net}: {flops / 1e9:.3g} GFLOP a gradient and image; a product of {peak.SIZES[device]} x "
        f"{peak.SIZES[device]} random matrices here: {speeds}."
    )
    first = f"{net}, batch {batch}: an epoch of {EPOCH} images"
    headers = ("setting", "SGD images/s", "s", "SAM images/s", "s", "SAM over SGD [IQR]", "SGD over itself", "start, s")
    table = Table(first, [*headers, *(["peak MiB"] if gpu else [])])
    against = next((r for r in ready if r.kind.name.startswith("original") and r.samples), None)
    beside = next((r for r in ready if r.kind.name == over and r.samples), None)
    more = Table(
        f"{net}: the same update beside plain float32, share of the product's peak, and speed over that of '{over}'",
        ("setting", "SGD differs", "cosine", "SAM differs", "cosine", "SGD of peak", "SAM of peak", "SGD x", "SAM x"),
    )
    above = False
    for running in sorted(ready, key=lambda r: GROUPS.index(r.kind.name.partition(",")[0])):
        times = {method: Spread.of(running.seconds(method)) for method in METHODS}
        ratio = Spread.of([2 * b / (a + c) for a, b, c in running.samples])
        control = Spread.of([c / a for a, b, c in running.samples])
        cells = [running.kind.name]
        for method in METHODS:
            cells += [f"{batch / times[method].median:,.0f}", f"{times[method].median * EPOCH / batch:.2f}"]
        cells += [ratio.ratio(), control.ratio(), f"{running.start:.1f}"]
        table.rows.append([*cells, *([f"{running.memory / 2**20:,.0f}"] if running.memory is not None else [])])
        cells = [running.kind.name]
        for method in METHODS:
            cells += [f"{running.beside[method][0]:.1e}", f"{running.beside[method][1]:.4f}"]
        for method, passes in zip(METHODS, (1, 2), strict=True):
            share = batch * passes * flops / times[method].median / rates[running.kind.peak]
            above = above or share > 1
            cells.append(f"{share:.1%} of {running.kind.peak}")
        cells += [_over(beside, running, method) for method in METHODS]
        more.rows.append(cells)
        _judge(running, ratio, control, result)
        result.raw[f"{net}, {running.kind.name}"] = {
            "updates": running.updates * running.turns,
            "windows": running.samples,
        }
    result.tables += [table, more]
    if beside is None:
        result.notes.append(f"No speed is over that of '{over}', which was not measured.")
    if any("compile" in r.kind.name for r in ready) and not gpu:
        result.notes.append("Compiled settings are built once, all others anew in every round.")
    if above:
        result.notes.append("A share above 100 %: the device's library has faster convolutions than products.")
    mine = [r for r in ready if r.kind.ours and r.samples]
    if gpu and mine:
        best = min(mine, key=lambda r: median(r.seconds("sam")))
        _judge_best(net, batch, best, against, result)
    elif mine:
        result.notes.append(
            f"Of a GPU, and not judged here: at least {TIMES:.0f} x the original's images/s, and on an H200 an epoch "
            f"of SAM with ResNet-18 within {TARGET} s. The loader has no workers here, so that its CPU time is counted."
        )


def _judge(running: Running, ratio: Spread, control: Spread, result: BenchmarkResult) -> None:
    name = running.kind.name
    limit = SAME_WAY if running.kind.exact else SAME_WAY_ROUNDED
    cosine = min(cosine for _, cosine in running.beside.values())
    result.gates.append(Gate(f"{name}: update beside plain float32", f"{cosine:.4f}", f">= {limit}", cosine >= limit))
    if running.kind.ours:
        undecided = ratio.q25 <= TWICE < ratio.median
        inconclusive = undecided or control.relative_iqr > RESOLUTION
        value = "inconclusive" if inconclusive else f"{ratio.median:.3f}"
        passed = inconclusive or ratio.median <= TWICE
        result.gates.append(Gate(f"{name}: epoch of SAM over SGD's", value, f"<= {TWICE}", passed))


def _judge_best(net: str, batch: int, best: Running, against: Running | None, result: BenchmarkResult) -> None:
    result.notes.append(f"The fastest setting for SAM: {best.kind.name}.")
    if against is not None:
        for method in METHODS:
            times = median(against.seconds(method)) / median(best.seconds(method))
            name = f"{best.kind.name} over {against.kind.name}: {method}, {net}"
            result.gates.append(Gate(name, f"{times:.1f} x", f">= {TIMES:.0f} x", times >= TIMES))
    if net == "resnet18" and "H200" in torch.cuda.get_device_name():
        epoch = median(best.seconds("sam")) * EPOCH / batch
        result.gates.append(Gate("epoch of SAM, ResNet-18, H200", f"{epoch:.2f} s", f"<= {TARGET} s", epoch <= TARGET))


def _over(against: Running | None, running: Running, method: str) -> str:
    """How many times as fast as another setting, round by round."""
    if against is None:
        return "-"
    pairs = zip(against.seconds(method), running.seconds(method), strict=False)
    return Spread.of([a / b for a, b in pairs]).ratio()


# -- the whole command -----------------------------------------------------------------------------------------------


def whole(options: argparse.Namespace, data: Data, result: BenchmarkResult, deadline: float) -> None:
    """Add epochs of `flatmin.train.loop.train` itself, which also looks at losses and keeps count."""
    batch = options.batch or (QUICK_BATCH if options.quick else BATCH)
    table = Table(
        f"{options.net}, batch {batch}: epochs of {len(data.train)} images of `flatmin train`, all but the first",
        ("setting", "method", "s, median", "images/s"),
    )
    for settings in FASTEST[options.device]:
        try:
            for method in METHODS:
                config = config_of(options.net, method, batch, options.device, **settings)
                config = dataclasses.replace(config, epochs=options.whole, drop_last=False, selection="last")
                lines: list[Epoch] = []
                train(config, data=data, on_epoch=lines.append)
                took = median(line.seconds for line in lines[1:])
                speed = median(line.images_per_second or 0.0 for line in lines[1:])
                table.rows.append((_words(settings), method, f"{took:.2f}", f"{speed:,.0f}"))
                result.raw[f"whole, {_words(settings)}, {method}"] = [line.seconds for line in lines]
            break
        except Exception as error:  # as above
            result.notes.append(f"flatmin train, {_words(settings)}: not available: {_first_line(error)}")
    result.tables.append(table)


def profiled(options: argparse.Namespace, data: Data, result: BenchmarkResult, deadline: float) -> None:
    """Add where the CPU time of an update goes, in the fastest setting."""
    batch = options.batch or (QUICK_BATCH if options.quick else BATCH)
    arms, chosen = _fastest(options.net, batch, data, options.device, result)
    found = {method: peak.shares(partial(arm.run, 5)) for method, arm in arms.items()}
    title = f"{options.net}, batch {batch}, {_words(chosen)}: share of the CPU time by kind of operation"
    rows = [(kind, *(f"{found[m].get(kind, 0.0):.1%}" for m in METHODS)) for kind in found["sgd"]]
    result.tables.append(Table(title, ("operations", *METHODS), rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parts, chosen = ("pipeline", "epoch", "profile"), ["pipeline", "epoch"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=chosen, metavar="PART", help=", ".join(parts))
    parser.add_argument("--quick", action="store_true", help="few updates of small nets: 3 min on one CPU thread")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--net", choices=list(NETS), metavar="NET", help=f"of epoch: {', '.join(NETS)}")
    parser.add_argument("--pipeline-nets", nargs="+", choices=list(NETS), metavar="NET", help="of pipeline")
    parser.add_argument("--batch", type=int, help="default: 128; with --quick 32 in epoch")
    parser.add_argument("--arms", nargs="+", metavar="WORD", help="only settings whose name has one of the words")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes")
    parser.add_argument(
        "--over", default="original", metavar="NAME", help="setting that speeds are multiples of, or its beginning"
    )
    parser.add_argument("--rounds", type=int, help="samples of each setting, at least 2 (default 5; --quick 4)")
    parser.add_argument("--window", type=float, help="seconds of a window of SGD (default 0.4; CPU 1, --quick 0.5)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="leave out what does not fit into so many")
    parser.add_argument("--samples", type=int, default=EPOCH, help=f"images in the training part (default {EPOCH})")
    parser.add_argument(
        "--whole", type=int, help="epochs of `flatmin train` itself, at least 2, or 0 (default 4 on a GPU)"
    )


def run(options: argparse.Namespace) -> BenchmarkResult:
    """The benchmark as asked for on the command line."""
    deadline = time.monotonic() + options.seconds
    gpu = options.device == "cuda"
    small = options.quick and not gpu
    options.net = options.net or ("resnet18" if gpu else "resnet20")
    options.pipeline_nets = options.pipeline_nets or ["resnet20", "resnet18-w16" if small else "resnet18"]
    options.rounds = options.rounds or (4 if options.quick else 5)
    options.window = options.window or (0.4 if gpu else 0.5 if options.quick else 1.0)
    options.whole = (4 if gpu else 0) if options.whole is None else options.whole
    options.over = _named(options.over, [kind.name for kind in kinds(options.device)])
    result = BenchmarkResult(
        "train",
        settings={
            "device": options.device,
            "clock": "CUDA events" if gpu else "thread CPU time",
            "images": options.samples,
            "rounds": options.rounds,
            "window": f"{options.window} s",
            **({"quick": "yes"} if options.quick else {}),
        },
    )
    result.gates += agreement.gates(options.net, options.device)
    data = images.synthetic(options.samples, options.device)
    wanted = [*options.parts, *(["whole"] if options.whole else [])]
    for part, work in PARTS.items():
        if part in wanted:
            try:
                work(options, data, result, deadline)
            except Exception as error:  # the other parts' numbers stay
                traceback.print_exc()
                result.gates.append(Gate(part, _first_line(error), "runs", False))
    return result


def _named(over: str, names: Sequence[str]) -> str:
    """The setting of this name, or the first whose name begins so."""
    found = [name for name in names if name.startswith(over)]
    if not found:
        raise SystemExit(f"--over {over!r} is none of the settings: {'; '.join(names)}.")
    return over if over in found else found[0]


PARTS = {"pipeline": pipeline, "whole": whole, "epoch": epochs, "profile": profiled}


def _words(settings: Mapping[str, object]) -> str:
    return " + ".join(str(v) if k == "precision" else k for k, v in settings.items())


def _percent(share: Spread) -> str:
    return f"{share.median:.2%} [{share.q25:.2%} to {share.q75:.2%}]"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
