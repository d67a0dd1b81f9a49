"""The radius of a method for which the user sets none."""

from __future__ import annotations

from collections.abc import Mapping

from flatmin.methods import Method, Recipe, compose


def radius_of(method: str, recipe: Recipe, radii: Mapping[str, float], table: Mapping[str, Method]) -> float | None:
    """The radius of a method from a preset's table of radii.

    The first of these that exists: the method's entry in the table; its own default, if a part other than the geometry
    defines one; the first entry of a method with the same geometry; the default of the geometry. A method that does not
    perturb the weights but has a factor in place of the radius (sgdhess) gets no other method's entry, and its entry is
    used for no other method. None for a method that has neither radius nor factor.

    Args:
        method: composed name of the method.
        recipe: recipe of that name.
        radii: radii by composed name.
        table: the methods, to look up the names in `radii`.
    """
    if not recipe.ascends:
        return None
    if method in radii:
        return radii[method]
    stated = any(part.default_rho is not None for part in recipe.parts.values() if part is not recipe.geometry)
    if recipe.moves and not stated:
        for name, radius in radii.items():
            if all(word in table for word in name.split("+")):
                other = compose(name, table)
                if other.moves and other.geometry == recipe.geometry:
                    return radius
    return recipe.default_rho
