"""Recipes: named methods as frozen sets of parts, and their composition by name.

>>> from flatmin.recipes import compose
>>> recipe = compose("vasso+bisam-log+asam", theta=0.8)
>>> recipe.direction
EMA(theta=0.8)
>>> recipe.default_rho, recipe.gradient_evaluations
(0.5, 2.0)
>>> compose("asam+usam")
Traceback (most recent call last):
...
ValueError: 'asam' and 'usam' both set the geometry; choose one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flatmin import parts as p
from flatmin.parts import KINDS, Need, Part
from flatmin.words import suggest

ENTRY_POINTS = "flatmin.methods"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method: one part for each question. The defaults are SAM.

    Args:
        objective, direction, geometry, mask, radius, when, points, combine: the parts; see `flatmin.parts`.
        name: what tables print. Default "recipe".

    Raises:
        TypeError: a part of another kind.
        ValueError: parts whose needs and gifts contradict each other.
    """

    objective: p.Objective = field(default_factory=p.SameLoss)
    direction: p.Direction = field(default_factory=p.Gradient)
    geometry: p.Geometry = field(default_factory=p.L2)
    mask: p.Mask = field(default_factory=p.All)
    radius: p.Radius = field(default_factory=p.Constant)
    when: p.When = field(default_factory=p.Always)
    points: p.Points = field(default_factory=p.One)
    combine: p.Combine = field(default_factory=p.Descent)
    name: str = "recipe"

    def __post_init__(self) -> None:
        for kind, part in self.parts.items():
            if not isinstance(part, Part) or part.kind != kind:
                raise TypeError(f"{kind} must be a part of kind {kind!r}, got {part!r}.")
        for one in self.parts.values():
            for need in sorted(_demands(one), key=lambda n: n.name):
                for other in self.parts.values():
                    reason = _withheld(other, need)
                    if reason and other is not one:
                        raise ValueError(
                            f"{one.kind} {one} needs {need.value}, which {other.kind} {other} does not give: {reason}."
                        )

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by kind."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @functools.cached_property
    def needs(self) -> frozenset[Need]:
        """What the loop must serve."""
        asked = frozenset[Need]().union(*(part.demands() for part in self.parts.values()))
        return asked - {Need.GRADIENT_AT_W, Need.ASCENT}

    @property
    def default_rho(self) -> float:
        """The geometry's default radius."""
        return self.geometry.default_rho

    @property
    def gradient_evaluations(self) -> float:
        """Gradients of one batch per step, on average."""
        full = self.points.evaluations(1 if self.direction.evaluates else 0)
        return self.when.duty * full + (1.0 - self.when.duty)

    @property
    def ascends(self) -> bool:
        """False for the plain base optimizer."""
        return not isinstance(self.when, p.Never)

    @property
    def extra_copies(self) -> int:
        """Copies of the moved weights held during the last pass, beyond the base optimizer's own.

        One snapshot of w; two for each remembered tensor (the old one is kept until the step is known to be good);
        one for g where the combination needs it.
        """
        slots = sum(k == "param" for part in self.parts.values() for k in part.slots.values())
        return int(self.ascends) + 2 * slots + int(self.combine.uses_gradient)

    @property
    def two_pass(self) -> bool:
        """Whether a step is one gradient at w and one at w + eps: what `perturbed()` and `first_step` serve."""
        return self.direction.evaluates and not self.direction.moves_start and isinstance(self.points, p.One)

    def parameters(self) -> dict[str, Any]:
        """Every parameter by its qualified name, e.g. {"direction.theta": 0.9}."""
        return {f"{kind}.{k}": v for kind, part in self.parts.items() for k, v in part.parameters().items()}

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self.parameters().items())
        return f"{self.name}({inner})"


def _demands(part: Part) -> frozenset[Need]:
    ascent = part.kind != "when" and part != _DEFAULTS.get(part.kind)
    return part.demands() | ({Need.ASCENT} if ascent else frozenset())


def _withheld(part: Part, need: Need) -> str | None:
    if need in part.withholds:
        return part.withholds[need]
    if need is Need.GRADIENT_AT_W and isinstance(part, p.Direction):
        if part.moves_start:
            return "pass 1 is not taken at w"
        if not part.evaluates:
            return "it takes no pass 1"
    return None


_DEFAULTS: dict[str, Part] = {
    "objective": p.SameLoss(),
    "direction": p.Gradient(),
    "geometry": p.L2(),
    "mask": p.All(),
    "radius": p.Constant(),
    "when": p.Always(),
    "points": p.One(),
    "combine": p.Descent(),
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line in the table of names: the parts a name sets, and what the tables print of it.

    Args:
        name: the key in the table.
        title: its name in the literature.
        parts: the parts it sets; all others keep SAM's.
        formula: the update rule in one line.
        paper: authors, title, venue.
        url: where to read it.
        summary: one sentence.
    """

    name: str
    title: str
    parts: tuple[Part, ...] = ()
    formula: str
    paper: str
    url: str = ""
    summary: str = ""

    def recipe(self) -> Recipe:
        """The method alone, with its own defaults."""
        return Recipe(name=self.name, **{part.kind: part for part in self.parts})  # type: ignore[arg-type]


_BUILT_IN = (
    Method(
        name="sgd",
        title="plain base optimizer",
        parts=(p.Never(),),
        formula="u = g",
        paper="the baseline: the base optimizer as it is",
        summary="No ascent; the same loop and the same diagnostics as the others.",
    ),
    Method(
        name="sam",
        title="SAM",
        formula="eps = rho g / ||g||,  u = grad L(w + eps)",
        paper="Foret, Kleiner, Mobahi & Neyshabur, Sharpness-Aware Minimization, ICLR 2021",
        url="https://arxiv.org/abs/2010.01412",
        summary="Climb to the worst nearby point, take the gradient there, descend with it.",
    ),
    Method(
        name="asam",
        title="ASAM",
        parts=(p.Adaptive(),),
        formula="eps = rho T^2 g / ||T g||,  T = |w| + eta",
        paper="Kwon, Kim, Park & Choi, ASAM, ICML 2021",
        url="https://arxiv.org/abs/2102.11600",
        summary="SAM in a norm that follows the scale of each weight.",
    ),
    Method(
        name="usam",
        title="USAM",
        parts=(p.Unnormalised(),),
        formula="eps = rho g",
        paper="Andriushchenko & Flammarion, Towards Understanding Sharpness-Aware Minimization, ICML 2022",
        url="https://proceedings.mlr.press/v162/andriushchenko22a.html",
        summary="SAM without the normalisation.",
    ),
    Method(
        name="vasso",
        title="VaSSO",
        parts=(p.EMA(),),
        formula="d = (1 - theta) d + theta g,  eps = rho d / ||d||",
        paper="Li & Giannakis, Enhancing Sharpness-Aware Optimization Through Variance Suppression, NeurIPS 2023",
        url="https://arxiv.org/abs/2309.15639",
        summary="Climb along a smoothed gradient.",
    ),
    Method(
        name="fsam",
        title="F-SAM",
        parts=(p.Friendly(),),
        formula="m = lam m + (1 - lam) g,  d = g - sigma m,  eps = rho d / ||d||",
        paper="Li, Zhou, He, Cheng & Huang, Friendly Sharpness-Aware Minimization, CVPR 2024",
        url="https://arxiv.org/abs/2403.12350",
        summary="Climb along the batch-specific part of the gradient.",
    ),
    Method(
        name="bisam-log",
        title="BiSAM (-log)",
        parts=(p.BiSAMLog(),),
        formula="q = grad Q(w),  phi(x) = 1 - log(1 + exp(log(e-1) - x)),  eps = rho q / ||q||",
        paper="Xie, Latorre, Antonakopoulos, Pethick & Cevher, Improving SAM Requires Rethinking its Optimization "
        "Formulation, ICML 2024",
        url="https://arxiv.org/abs/2407.12993",
        summary="Climb a lower bound of the 0-1 loss.",
    ),
    Method(
        name="bisam-tanh",
        title="BiSAM (tanh)",
        parts=(p.BiSAMTanh(),),
        formula="q = grad Q(w),  phi(x) = tanh(alpha x),  eps = rho q / ||q||",
        paper="Xie, Latorre, Antonakopoulos, Pethick & Cevher, Improving SAM Requires Rethinking its Optimization "
        "Formulation, ICML 2024",
        url="https://arxiv.org/abs/2407.12993",
        summary="Climb a lower bound of the 0-1 loss.",
    ),
)
METHODS: Mapping[str, Method] = {m.name: m for m in _BUILT_IN}


def method_table(plugins: Sequence[str] = ()) -> dict[str, Method]:
    """All methods by name: built in, from entry points of the group "flatmin.methods", and from plugin modules.

    A plugin is an importable module with a dict `METHODS` of name -> `Method`; an entry point refers to such a dict.

    Raises:
        ValueError: a plugin that cannot be imported or has no such dict, or a name that is taken.
    """
    from importlib.metadata import entry_points

    table = dict(METHODS)
    for entry in entry_points(group=ENTRY_POINTS):
        _merge(table, entry.load(), f"entry point {entry.value!r}")
    for module in plugins:
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"plugin {module!r} cannot be imported: {error}.") from error
        _merge(table, getattr(found, "METHODS", None), f"plugin {module!r}")
    return table


def _merge(table: dict[str, Method], new: Any, origin: str) -> None:
    if not isinstance(new, Mapping) or not all(isinstance(m, Method) for m in new.values()):
        raise ValueError(f"{origin} needs a dict METHODS of name -> flatmin.recipes.Method.")
    for name, method in new.items():
        if "+" in name or name != method.name:
            raise ValueError(f"{origin}: key {name!r} must equal the method's name and contain no '+'.")
        if name in table and table[name] is not method:
            raise ValueError(f"{origin}: the name {name!r} is taken.")
        table[name] = method


def compose(name: str, table: Mapping[str, Method] | None = None, **params: Any) -> Recipe:
    """The recipe of one or several names joined by "+", each name giving the parts it sets.

    Args:
        name: e.g. "sam", "vasso+bisam-log+asam". The order does not matter.
        table: names to choose from. Default: built-ins, then entry points.
        params: parameters of the parts: `theta=0.8` if exactly one part has it, else qualified by kind:
            `direction=dict(theta=0.8)`, `direction=EMA(theta=0.8)` or `**{"direction.theta": 0.8}`.

    Raises:
        ValueError: unknown name or parameter, two names that set the same part, contradicting parts, bad values.
    """
    names = [n.strip() for n in name.split("+")]
    if table is None:
        table = METHODS if all(n in METHODS for n in names) else method_table()
    chosen: dict[str, Part] = {}
    owner: dict[str, str] = {}
    for n in names:
        if n not in table:
            raise ValueError(f"unknown method {n!r}{suggest(n, table)} (methods: {', '.join(table)})")
        for part in table[n].parts:
            if part.kind in chosen:
                raise ValueError(f"{owner[part.kind]!r} and {n!r} both set the {part.kind}; choose one.")
            chosen[part.kind], owner[part.kind] = part, n
    for kind, changes in _sort_parameters(name, chosen, params).items():
        chosen[kind] = changes if isinstance(changes, Part) else _replace(chosen.get(kind, _DEFAULTS[kind]), changes)
    try:
        return Recipe(name="+".join(names), **chosen)  # type: ignore[arg-type]
    except ValueError as error:
        if len(names) > 1:
            raise ValueError(f"{' and '.join(map(repr, names))} do not go together: {error}") from None
        raise


def _sort_parameters(name: str, chosen: dict[str, Part], params: dict[str, Any]) -> dict[str, Any]:
    """{kind: part or {field: value}} from the three ways of writing a parameter."""
    sorted_: dict[str, Any] = {}
    for key, value in params.items():
        kind, _, fld = key.partition(".")
        if key in KINDS:
            if not isinstance(value, (Part, Mapping)):
                raise ValueError(f"{key} must be a part or a dict of its parameters, got {value!r}.")
            sorted_[key] = value if isinstance(value, Part) else {**sorted_.get(key, {}), **value}
            continue
        if fld:
            if kind not in KINDS:
                raise ValueError(f"unknown part {kind!r} in {key!r}{suggest(kind, KINDS)} (parts: {', '.join(KINDS)})")
        else:
            holders = [k for k, part in chosen.items() if key in part.parameters()]
            if len(holders) > 1:
                both = " or ".join(f"{k}.{key}" for k in holders)
                raise ValueError(f"{name!r} has several parameters {key!r}; write {both}.")
            known = [f for part in chosen.values() for f in part.parameters()]
            if not holders:
                listed = f" (parameters: {', '.join(known)})" if known else " (it has none)"
                raise ValueError(f"{name!r} has no parameter {key!r}{suggest(key, known)}{listed}")
            kind, fld = holders[0], key
        if isinstance(sorted_.get(kind), Part):
            raise ValueError(f"{kind} is given as a part and as {key!r}; choose one.")
        sorted_.setdefault(kind, {})[fld] = value
    return sorted_


def _replace(part: Part, changes: Mapping[str, Any]) -> Part:
    known = part.parameters()
    typed = {}
    for key, value in changes.items():
        if key not in known:
            raise ValueError(f"{part.kind} {part} has no parameter {key!r}{suggest(key, known)}")
        default = known[key]
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(default, (bool, str)) and not isinstance(value, type(default)):
            raise ValueError(f"{part.kind}.{key} must be {type(default).__name__}, got {value!r}.")
        typed[key] = value
    return dataclasses.replace(part, **typed)
