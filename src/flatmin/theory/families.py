"""The families of methods in the theory, and the family of a recipe."""

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
    """The family of a method in the convergence theory.

    - gradient: x+ = x - t grad f(x).
    - normalised: x+ = x - t grad f(x + eps), ||eps|| <= rho, so the error is at most L rho.
    - unnormalised: eps = rho grad f(x), so the error is at most L rho ||grad f(x)||.
    - extragradient: eps = -rho grad f(x), same bound. No recipe has a negative radius, so it runs as an instance of
      igdr.
    - absolute: igd, ||g - grad f(x)|| <= eps_k, where eps_k is given as the radius.
    - relative: igdr, ||g - grad f(x)|| <= nu_k ||grad f(x)||, where nu_k is given as the radius.
    - other: none of these; see `reason`.

    Attributes:
        name: name of the method.
        kind: the family.
        recipe: the recipe; "sgd" for igd, igdr and extragradient, whose error is added to its gradient.
        climbs: whether the perturbation is along grad f(x), as Theorem 3.2 requires.
        rests: whether eps may be 0 where grad f(x) is not, so that constant rules do not exclude convergence.
        factor: a rule by which the recipe multiplies the radius, or None.
        error: direction of the error of igd and igdr: "against" the gradient, "along" it, or "random", uniform on the
            sphere.
        reason: why the method is in no other family, for "other".
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
        error: direction of the error of igd and igdr. Default: "against", the worst for descent.
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
            raise ValueError(f"{method} has no parameter {next(iter(how))!r}; set the size of its error as the radius.")
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
    """Whether d is the gradient minus itself, as for F-SAM with sigma = 1 and lambda = 0."""
    return isinstance(direction, p.FSAM) and direction.sigma == 1 and direction.lam == 0


def _kind(recipe: Recipe) -> tuple[Kind, str]:
    if not recipe.ascends:
        return "gradient", ""
    plain: tuple[tuple[p.Part, type, str], ...] = (
        (recipe.objective, p.SameLoss, "perturbs along the gradient of a different loss than f"),
        (recipe.schedule, p.Always, "does not perturb at every update"),
        (recipe.mask, p.All, "perturbs only a part of the weights"),
        (recipe.inner_loop, p.OneStep, "uses more points than x and x + eps"),
        (recipe.samples, p.EverySample, "descends on a part of the samples"),
        (recipe.combine, p.Descent, "does not descend along the gradient at x + eps"),
    )
    for part, wanted, words in plain:
        if not isinstance(part, wanted):
            return "other", f"{recipe.name} {words} ({part})"
    if not isinstance(recipe.radius, (p.ConstantRadius, p.PowerRadius)):
        return "other", f"{recipe.name} sets its own radius ({recipe.radius}); give it as a rule instead"
    if Need.BASE_MOMENTUM in recipe.needs:
        return "other", f"{recipe.name} perturbs along the momentum of the base optimizer, which the theory leaves out"
    if abs(recipe.direction.factor()) > 1:
        return "other", f"{recipe.name} perturbs by more than rho"
    if isinstance(recipe.geometry, (p.L2, p.Centralised)):
        return "normalised", ""
    if isinstance(recipe.geometry, p.Unnormalised) and isinstance(recipe.direction, p.Gradient):
        return "unnormalised", ""
    if isinstance(recipe.geometry, p.Unnormalised):
        return "other", f"{recipe.name} perturbs along a direction other than the gradient, without normalising it"
    return "other", f"{recipe.name} measures eps in a norm that depends on the weights, so ||eps|| <= rho may fail"
