"""Digests of the code and the data that determine the outcome of a run."""

from __future__ import annotations

from flatmin.data.dataset import Data
from flatmin.data.named import DATASETS, Progress
from flatmin.methods import method_table
from flatmin.train.config import RunConfig
from flatmin.train.fingerprint import Content, content_of, external_versions, user_sources
from flatmin.train.package import digest, package_digest
from flatmin.train.sources import load_clean
from flatmin.train.trainer import build_recipe
from flatmin.words import ended, explained, reason

# The settings that determine the data, before label noise is added.
_FIELDS = ("data", "data_dir", "train_size", "split_seed", "val_share", "train_on_val", "image_size", "statistics")


def code_of(config: RunConfig) -> str:
    """Digest of flatmin, torch and the user's modules that a run uses.

    A plugin counts only if it defines the run's method or one of its parts.

    Raises:
        ValueError: a module cannot be found.
    """
    recipe, specs = build_recipe(config), _specs(config)
    return digest(user_sources(specs, [recipe]), package_digest(), *external_versions(specs))


def modules_of(config: RunConfig) -> list[str]:
    """Names of the modules and packages besides flatmin and torch that a run depends on.

    Raises:
        ValueError: a module cannot be found.
    """
    parts = [type(part).__module__ for part in build_recipe(config).parts.values()]
    named = [spec.partition(":")[0] for spec in _specs(config)]
    return list(dict.fromkeys([*named, *(name for name in parts if name.partition(".")[0] != "flatmin")]))


def _specs(config: RunConfig) -> dict[str, str]:
    """The user's own sources of a run, each with its setting: plugins that define its method, its network, its data."""
    methods = set(build_recipe(config).name.split("+"))
    built_in = method_table()
    plugins = [name for name in config.plugins if methods & (method_table([name]).keys() - built_in.keys())]
    own = {getattr(config, key): key for key in ("model", "data")}
    return {**dict.fromkeys(plugins, "plugins"), **{spec: key for spec, key in own.items() if ":" in spec}}


class Contents:
    """Digests of the data of runs, or the reason why the data cannot be read here. Each data set is read once.

    Args:
        download: download missing data where that is possible.
        progress: see `flatmin.data.named.Reading`.
    """

    def __init__(self, *, download: bool = False, progress: Progress | None = None) -> None:
        self._download, self._progress = download, progress
        self._found: dict[tuple[object, ...], Content | None] = {}
        self._absent: dict[tuple[object, ...], str] = {}

    def of(self, config: RunConfig) -> Content | None:
        """The digest for a run; None if its data come with a package or cannot be read here."""
        key = self._key(config)
        if key not in self._found:
            try:
                self._found[key] = content_of(config, self._downloaded(config))
            except Exception as error:  # a user's own function may raise anything; `warnings` and `check` report it
                self._found[key] = None
                self._absent[key] = (str(error) if explained(error) else reason(error)).strip().rstrip(".")
        return self._found[key]

    def _downloaded(self, config: RunConfig) -> Data | None:
        """The data, if they may have to be downloaded; otherwise they are read where they are needed."""
        if not self._download or config.data not in _downloadable():
            return None
        return load_clean(config, download=True, progress=self._progress)

    def absent(self, config: RunConfig) -> bool:
        """Whether the data of a run cannot be read here."""
        self.of(config)
        return self._key(config) in self._absent

    def check(self, config: RunConfig) -> None:
        """Raise ValueError if the data of a run cannot be read here; the message says what to do."""
        if not self.absent(config):
            return
        known = config.data in DATASETS
        place = f" in data_dir={config.data_dir}" if known else ""
        way = " Name their folder with data_dir=FOLDER" if known else ""
        if config.data in _downloadable():
            way += "" if self._download else ", or add --download"
        elif known and self._download:
            way += f"; --download works for {', '.join(_downloadable())} only"
        raise ValueError(
            f"data={config.data} cannot be read{place}, so no run was started: "
            f"{ended(self._absent[self._key(config)])}{way}{'.' if way else ''}"
        )

    @property
    def warnings(self) -> list[str]:
        """Warnings about the data, as sentences."""
        notes = [note for content in self._found.values() if content is not None for note in content.notes]
        absent = [
            f"data={key[0]} cannot be read here ({why}), so finished runs are not checked against the data that new "
            "runs would read."
            for key, why in self._absent.items()
        ]
        return list(dict.fromkeys([*notes, *absent]))

    @staticmethod
    def _key(config: RunConfig) -> tuple[object, ...]:
        return tuple(getattr(config, name) for name in _FIELDS)


def _downloadable() -> list[str]:
    return [name for name, one in DATASETS.items() if one.downloads]
