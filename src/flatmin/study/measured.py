"""Compare the reports of several networks: differences between groups of seeds, with intervals."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flatmin.measure.problem import Conventions
from flatmin.measure.report import Quantity, Report
from flatmin.methods import BASE
from flatmin.stats import Stat, paired, summarise
from flatmin.study.finished import ends_of

_WORDS = ("flatter", "sharper")


@dataclass(frozen=True, kw_only=True, eq=False)
class NetReport:
    """The report of one network.

    Args:
        name: name of the network, e.g. of its run folder.
        group: name shared by networks that differ only in the seed.
        seed: seed of the training.
        report: the measurements.
        remarks: notes on the weights, as sentences.
    """

    name: str
    group: str
    seed: int
    report: Report
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Unmeasured:
    """A network that could not be measured at all.

    Args:
        name: name of the network.
        why: the reason.
        refused: whether flatmin raised the error itself, so that the reason says what to do.
    """

    name: str
    why: str
    refused: bool = True


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One quantity, compared over the groups.

    Args:
        quantity: the quantity of the first network, for its name and description.
        groups: mean over the networks of each group that have the quantity, with the 95 % t interval.
        difference: difference from the base group, paired over the seeds that both have; empty for the base.
        error: the largest measurement error of a single network, in the quantity's unit; NaN if any is unknown.
        notes: remarks such as "not converged", or that the quantity is missing for some networks.
    """

    quantity: Quantity
    groups: dict[str, Stat]
    difference: dict[str, Stat]
    error: float
    notes: tuple[str, ...] = ()

    def verdict(self, group: str) -> str:
        """Whether the group is "flatter" or "sharper" than the base.

        It is "not significant" if the interval of the paired difference contains 0, "not tested" if the two have only
        one seed in common, and empty if there is no difference or the quantity does not measure flatness.
        """
        difference = self.difference.get(group)
        if difference is None or not self.quantity.flat:
            return ""
        if difference.n < 2:
            return "not tested"
        if difference.covers_zero:
            return "not significant"
        return "flatter" if (difference.mean < 0) == (self.quantity.flat == "low") else "sharper"


def groups_of(nets: Sequence[NetReport]) -> dict[str, list[NetReport]]:
    """The networks by group, in order of appearance, with the base first."""
    groups: dict[str, list[NetReport]] = {}
    for net in nets:
        groups.setdefault(net.group, []).append(net)
    return {**({BASE: groups[BASE]} if BASE in groups else {}), **groups}


def check_doubles(nets: Iterable[tuple[str, int]], differences: Callable[[int, int], str] = lambda i, k: "") -> None:
    """Raise ValueError if two networks have the same group and seed, which makes pairing by seed ambiguous.

    Args:
        nets: group and seed of each network.
        differences: returns a sentence on how two of them differ, given their indices.
    """
    seen: dict[tuple[str, int], int] = {}
    for place, net in enumerate(nets):
        if net in seen:
            raise ValueError(
                f"{net[0]!r} has two networks with seed {net[1]}; leave one out.{differences(seen[net], place)}"
            )
        seen[net] = place


def compare_reports(nets: Sequence[NetReport]) -> list[Comparison]:
    """Every quantity that was measured for at least one network, compared over the groups.

    Raises:
        ValueError: there is no network, or two have the same group and seed.
    """
    if not nets:
        raise ValueError("there is no network to compare.")
    check_doubles((net.group, net.seed) for net in nets)
    groups = groups_of(nets)
    base = next(iter(groups))
    rows = []
    for name in dict.fromkeys(name for net in nets for name in net.report.quantities):
        by_group = {
            g: {net.seed: q for net in members if (q := net.report.quantities.get(name)) is not None}
            for g, members in groups.items()
        }
        values = {g: {seed: q.value for seed, q in one.items()} for g, one in by_group.items() if one}
        (low, high), step = ends_of(name), _step(name, nets)
        differences = {
            g: paired(one, values[base], step=step, ends=(low - high, high - low))
            for g, one in values.items()
            if g != base and base in values
        }
        measured = [q for one in by_group.values() for q in one.values()]
        errors = [q.error for q in measured]
        notes = list(dict.fromkeys(q.note for q in measured if q.note))
        if len(measured) < len(nets):
            notes.append(f"from {len(measured)} of {len(nets)} networks")
        rows.append(
            Comparison(
                quantity=measured[0],
                groups={g: summarise(list(one.values()), step=step, ends=(low, high)) for g, one in values.items()},
                difference={g: stat for g, stat in differences.items() if stat is not None},
                error=math.nan if any(map(math.isnan, errors)) else max(errors),
                notes=tuple(notes),
            )
        )
    return rows


def conclusions(nets: Sequence[NetReport]) -> list[str]:
    """One sentence for each group but the base: by which and how many measures it is flatter or sharper."""
    rows = [row for row in compare_reports(nets) if row.quantity.flat]
    base, *others = groups_of(nets)
    told = []
    for group in others:
        by = {
            verdict: [row.quantity.name for row in rows if row.verdict(group) == verdict]
            for verdict in ("flatter", "sharper", "not significant", "not tested")
        }
        count = sum(map(len, by.values()))
        if not count:
            continue
        if by["not tested"]:
            told.append(f"{group} and {base} have one seed in common; a test of their difference needs at least two.")
            continue
        if len(by["not significant"]) == count:
            told.append(f"{group} and {base} do not differ significantly by any of {_measures(count)}.")
            continue
        parts = [f"{verdict} by {len(names)}" for verdict, names in by.items() if names and verdict in _WORDS]
        named = [f"{verdict.capitalize()}: {', '.join(by[verdict])}." for verdict in _WORDS if by[verdict]]
        told.append(f"{group} is {' and '.join(parts)} of {_measures(count)} than {base}. {' '.join(named)}")
    return told


def _measures(count: int) -> str:
    return f"{count} measure{'s' * (count != 1)}"


def _step(name: str, nets: Sequence[NetReport]) -> float:
    """The change that one example makes in a share of examples; 0 for other quantities."""
    return 1 / min(net.report.conventions.examples for net in nets) if name == "error_rate" else 0.0


def left_out(nets: Sequence[NetReport]) -> list[str]:
    """Quantities that are missing for some network, with the reason, as sentences."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for net in nets:
        for section in net.report.sections:
            for what, why in section.missing.items():
                reasons.setdefault((what, why), []).append(net.name)
    every = len(nets)
    return [
        f"{what} is missing" + (f" for {', '.join(names)}" if len(names) < every else "") + f": {why}"
        for (what, why), names in reasons.items()
    ]


def remarks(nets: Sequence[NetReport]) -> list[str]:
    """Notes on the weights of the networks, as sentences."""
    return [f"{net.name}: {remark}" for net in nets for remark in net.remarks]


def unlike(nets: Sequence[NetReport]) -> list[str]:
    """Conventions of measurement in which the networks differ; numbers cannot be compared across conventions.

    The share of wrong labels depends on the seed and does not count.
    """
    conventions = [dataclasses.asdict(net.report.conventions) for net in nets]
    for one in conventions:
        one["split"] = one["split"].partition(",")[0]
    return [
        f"{key}: {', '.join(map(str, dict.fromkeys(one[key] for one in conventions)))}"
        for key in conventions[0]
        if len({str(one[key]) for one in conventions}) > 1
    ]


def sentence(nets: Sequence[NetReport]) -> str:
    """One sentence that says what was measured: loss, examples, mode, weights, precision."""
    c = nets[0].report.conventions
    splits = dict.fromkeys(net.report.conventions.split for net in nets)
    split = c.split if len(splits) == 1 else f"{c.split.partition(',')[0]}, with the labels that each was trained on"
    names = "" if c.params == "*" else f" ({c.params})"
    return (
        f"Mean {c.loss} over {c.examples} examples ({split}), {c.mode} mode, weight decay {c.weight_decay:g}, "
        f"{c.size} weights{names}, {c.dtype}."
    )


def with_error(value: float, error: float = 0.0) -> str:
    """A number rounded to the second digit of its error, e.g. 23.81 ± 0.22; five digits if the error is 0 or tiny."""
    size = max(abs(value), error)
    if not math.isfinite(size) or not error > 0:
        return f"{value:.5g}"
    if error < 1e-4 * abs(value):
        return f"{value:.5g} ± {error:.1g}"
    exponent = 0 if 1e-3 <= size < 1e5 else math.floor(math.log10(size))
    places = max(0, exponent + 1 - math.floor(math.log10(error)))
    value = value if abs(value) >= 0.5 * 10.0 ** (exponent - places) else 0.0  # no "-0.0"
    scaled = f"{value / 10**exponent:.{places}f} ± {error / 10**exponent:.{places}f}"
    return f"({scaled})e{exponent}" if exponent else scaled


def stat_text(stat: Stat) -> str:
    """A mean with its interval, as `with_error` writes it, or with both ends if the interval is cut."""
    if not stat.cut:
        return with_error(stat.mean, stat.half)
    return f"{stat.mean:.3g} ({stat.low:.3g} to {stat.high:.3g})"


def as_json(
    nets: Sequence[NetReport], environment: dict[str, object], failed: Sequence[Unmeasured] = (), *, of: str = ""
) -> dict[str, Any]:
    """Everything that was measured, for a file.

    Args:
        nets: the reports.
        environment: versions and machine.
        failed: networks that could not be measured.
        of: digest of the request: the networks and the settings of measurement.
    """
    return {
        "of": of,
        "environment": environment,
        "nets": [
            {"name": n.name, "group": n.group, "seed": n.seed, "remarks": list(n.remarks), **n.report.to_dict()}
            for n in nets
        ],
        "not_measured": {one.name: one.why for one in failed},
    }


def as_csv(nets: Sequence[NetReport]) -> str:
    """All measurements as CSV, one line for each network and quantity, with the conventions of measurement.

    Numbers that are not finite, and unknown errors, are empty cells.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(Conventions)]
    start = ["net", "group", "seed", "section", "quantity", "value", "error", "error_is", "flat", "note", "what"]
    writer.writerow([*start, *("drawn_by" if name == "seed" else name for name in names)])
    for net in nets:
        for section in net.report.sections:
            for q in section.quantities:
                numbers = [number if math.isfinite(number) else "" for number in (q.value, q.error)]
                words = [q.error_is, q.flat, q.note, q.text]
                conventions = [getattr(q.conventions, name) for name in names]
                writer.writerow([net.name, net.group, net.seed, section.name, q.name, *numbers, *words, *conventions])
    return out.getvalue()
