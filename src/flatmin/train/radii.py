"""Which radius a method gets that names none."""

from __future__ import annotations

from collections.abc import Mapping

from flatmin.methods import Method, Recipe, compose


def radius_of(method: str, recipe: Recipe, radii: Mapping[str, float], table: Mapping[str, Method]) -> float | None:
    """The radius of a method: its own entry, its own default, that of the first one in its geometry, or the geometry's.

    Its own default is one that a part other than the geometry states; it is taken whatever others in its geometry have.
    A method that never leaves w has a factor in place of the radius (sgdhess), which says nothing about lengths: no
    other entry tells it, and it tells no other method; None for one that has neither.

    Args:
        method: composed name.
        recipe: of that name.
        radii: by composed name.
        table: of methods, for the names in `radii`.
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
