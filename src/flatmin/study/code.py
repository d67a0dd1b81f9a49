"""The code and the data that decide the outcome of a study's run."""

from __future__ import annotations

from flatmin.methods import Recipe
from flatmin.train.config import RunConfig
from flatmin.train.fingerprint import Content, content_of, digest, external_versions, package_digest, user_sources
from flatmin.train.trainer import build_recipe

# The settings that data depend on before labels are made wrong.
_FIELDS = ("data", "data_dir", "train_size", "split_seed", "val_share", "train_on_val", "image_size", "statistics")


def code_of(config: RunConfig) -> str:
    """Digest of flatmin, torch, and the user's modules behind a run.

    Raises:
        ValueError: a module that cannot be found.
    """
    specs = [*config.plugins, *(spec for spec in (config.model, config.data) if ":" in spec)]
    recipes: list[Recipe] = [build_recipe(config)]
    return digest(user_sources(specs, recipes), package_digest(), *external_versions(specs))


class Contents:
    """Digests of the data of runs, each data set read once; or why the data cannot be read here."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], Content | None] = {}
        self._absent: dict[tuple[object, ...], str] = {}

    def of(self, config: RunConfig) -> Content | None:
        """Of a run; None if its data come with a package, or cannot be had here."""
        key = self._key(config)
        if key not in self._found:
            try:
                self._found[key] = content_of(config)
            except Exception as error:  # a user's own function may raise anything; `warnings` has it
                self._found[key] = None
                self._absent[key] = f"{str(error).strip().rstrip('.') or type(error).__name__}"
        return self._found[key]

    def absent(self, config: RunConfig) -> bool:
        """Whether the data of a run cannot be had here."""
        self.of(config)
        return self._key(config) in self._absent

    @property
    def warnings(self) -> list[str]:
        """Notes on the data, in sentences."""
        notes = [note for content in self._found.values() if content is not None for note in content.notes]
        absent = [
            f"data={key[0]} cannot be read here, so it is not known whether finished runs are of the data that their "
            f"workers would read: {why}."
            for key, why in self._absent.items()
        ]
        return list(dict.fromkeys([*notes, *absent]))

    @staticmethod
    def _key(config: RunConfig) -> tuple[object, ...]:
        return tuple(getattr(config, name) for name in _FIELDS)
