"""The code that decides the outcome of a study's run."""

from __future__ import annotations

from flatmin.recipes import Recipe
from flatmin.train.config import RunConfig
from flatmin.train.fingerprint import digest, external_versions, package_digest, user_sources
from flatmin.train.trainer import build_recipe


def code_of(config: RunConfig) -> str:
    """Digest of flatmin, torch, and the user's modules behind a run; a named data set is known by its name.

    Raises:
        ValueError: a module that cannot be found.
    """
    specs = [*config.plugins, *(spec for spec in (config.model, config.data) if ":" in spec)]
    recipes: list[Recipe] = [build_recipe(config)]
    return digest(user_sources(specs, recipes), package_digest(), *external_versions(specs))
