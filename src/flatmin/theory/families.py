"""Which family of the theory a method belongs to, read off its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from flatmin import methods as p
from flatmin.methods import Need, Recipe, compose, method_table
from flatmin.theory.rules import PowerRule, Rule
from flatmin.words import suggest

Kind = Literal["gradient", "normalised", "unnormalised", "extragradient", "absolute", "relative", "other"]
Error = Literal["against", "along", "random"]
FRAMEWORKS: dict[str, Kind] = {"igd": "absolute", "igdr": "relative", "extragradient": "extragradient"}
ERRORS = ("against", "along", "random")


@dataclass(frozen=True)
class Family:
    """A method as the theory sees it.

    - gradient: x+ = x - t grad f(x), exactly.
    - normalised: x+ = x - t grad f(x + eps), ||eps|| <= rho, so the error is at most L rho.
    - unnormalised: eps = rho grad f(x), so the error is at most L rho ||grad f(x)||.
    - extragradient: eps = -rho grad f(x), same bound. No recipe: a radius is >= 0. It runs as an instance of igdr.
    - absolute: igd, ||g - grad f(x)|| <= eps_k given as the radius.
    - relative: igdr, ||g - grad f(x)|| <= nu_k ||grad f(x)||, nu_k given as the radius.
    - other: none of them, for the `reason`.

    Attributes:
        name: as it was asked for.
        recipe: of the library; "sgd" for the frameworks, whose error is put into the gradient that it takes.
        climbs: whether the ascent goes exactly along grad f(x), as Theorem 3.2 needs.
        rests: whether eps may be 0 where grad f(x) is not, so that constant rules need not keep a run away.
        factor: a rule that the recipe multiplies the radius with, or None.
        error: of igd and igdr: "against" the gradient, "along" it, or "random", uniform on the sphere.
        reason: of "other".
    """

    name: str
    kind: Kind
    recipe: Recipe
    climbs: bool = False
    rests: bool = False
    factor: Rule | None = None
    error: Error = "against"
    reason: str = ""


def family(method: str | Recipe | Family, *, error: Error = "against", **how: Any) -> Family:
    """The family of a method.

        >>> family("vasso", theta=0.4).kind, family("usam").kind, family("asam").kind
        ('normalised', 'unnormalised', 'other')

    Args:
        method: a name as in `flatmin.compose`, "igd", "igdr", "extragradient", or a recipe.
        error: of igd and igdr. Default "against", the worst for descent.
        how: parameters of the recipe's parts.

    Raises:
        ValueError: an unknown method or error, or parameters that the method does not have.
    """
    if isinstance(method, Family):
        return method
    if error not in ERRORS:
        raise ValueError(f"unknown error {error!r}{suggest(str(error), ERRORS)} (errors: {', '.join(ERRORS)}).")
    if isinstance(method, str) and method in FRAMEWORKS:
        if how:
            raise ValueError(f"{method} has no parameter {next(iter(how))!r}; its radius is a rule of its own.")
        return Family(method, FRAMEWORKS[method], compose("sgd"), error=error)
    if isinstance(method, Recipe):
        recipe = method
    else:
        methods = method_table()
        if "+" not in method and method not in methods:
            names = [*methods, *FRAMEWORKS]
            raise ValueError(f"unknown method {method!r}{suggest(method, names)} (methods: {', '.join(names)}).")
        recipe = compose(method, **how)
    kind, reason = _kind(recipe)
    factor = PowerRule(1.0, recipe.radius.p) if isinstance(recipe.radius, p.PowerRadius) else None
    centred = isinstance(recipe.geometry, p.Centralised)
    climbs = isinstance(recipe.direction, p.Gradient) and not centred
    rests = centred or _cancels(recipe.direction)
    return Family(recipe.name, kind, recipe, climbs=climbs, rests=rests, factor=factor, reason=reason)


def _cancels(direction: p.Part) -> bool:
    """Whether d is the gradient less itself: F-SAM with sigma = 1 and a mean of one gradient."""
    return isinstance(direction, p.FSAM) and direction.sigma == 1 and direction.lam == 0


def _kind(recipe: Recipe) -> tuple[Kind, str]:
    if not recipe.ascends:
        return "gradient", ""
    plain: tuple[tuple[p.Part, type, str], ...] = (
        (recipe.objective, p.SameLoss, "climbs another loss than f"),
        (recipe.schedule, p.Always, "does not ascend at every update"),
        (recipe.mask, p.All, "moves a part of the weights"),
        (recipe.inner_loop, p.OneStep, "takes other points than one ascent and one descent"),
        (recipe.samples, p.EverySample, "descends on a part of the samples"),
        (recipe.combine, p.Descent, "descends along another vector than the gradient at x + eps"),
    )
    for part, wanted, words in plain:
        if not isinstance(part, wanted):
            return "other", f"{recipe.name} {words} ({part})"
    if not isinstance(recipe.radius, (p.ConstantRadius, p.PowerRadius)):
        return "other", f"{recipe.name} sets its own radius ({recipe.radius}); give it as a rule instead"
    if Need.BASE_MOMENTUM in recipe.needs:
        return "other", f"{recipe.name} climbs along the momentum of the base optimizer, which is no part of x+ here"
    if abs(recipe.direction.factor()) > 1:
        return "other", f"{recipe.name} goes further than rho"
    if isinstance(recipe.geometry, (p.L2, p.Centralised)):
        return "normalised", ""
    if isinstance(recipe.geometry, p.Unnormalised) and isinstance(recipe.direction, p.Gradient):
        return "unnormalised", ""
    if isinstance(recipe.geometry, p.Unnormalised):
        return "other", f"{recipe.name} climbs along another direction than the gradient without normalising it"
    return "other", f"{recipe.name} measures eps in a norm that follows the weights, so ||eps|| <= rho may fail"
