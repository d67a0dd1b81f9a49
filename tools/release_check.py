"""Build the sdist and the wheel, check them, and try the wheel in a new environment.

    python tools/release_check.py [--dist DIST]

Needs `build` and `twine`. The checks, in this order:

1. `pyproject.toml`, `flatmin.__version__`, `CITATION.cff` and `CHANGELOG.md` name the same version.
2. The sdist and the wheel build, and `twine check --strict` accepts their metadata.
3. The sdist holds tracked files only. The wheel holds every file of `src/flatmin` and nothing else.
4. The wheel installs into a new environment, and `flatmin compare --preset smoke` runs there, outside of the checkout.

Both files are left in DIST (default: `dist`). The exit code is 0 if everything passes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A few files that users miss at once if they are not packed; the comparison with `git ls-files` covers the others.
PACKED = ("py.typed", "presets/study/smoke.toml", "presets/train/digits.toml", "report/templates/page.html")
VERSIONS = {
    "src/flatmin/__init__.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (\S+)$",
    "CHANGELOG.md": r"^## \[(\d[^\]]*)\]",
}


def main(words: list[str] | None = None) -> int:
    """Run the checks; print the first one that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder for the sdist and the wheel")
    dist: Path = parser.parse_args(words).dist.resolve()
    try:
        version = declared_version()
        sdist, wheel = build(dist, version)
        check_sdist(sdist)
        check_wheel(wheel)
        try_wheel(wheel, version)
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"release check failed: {error}", file=sys.stderr)
        return 1
    print(f"release check passed: {sdist.name} and {wheel.name} in {dist}")
    return 0


def declared_version(root: Path = ROOT) -> str:
    """The version of `pyproject.toml`.

    Raises:
        ValueError: another file names another version.
    """
    version: str = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for name, pattern in VERSIONS.items():
        found = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE)
        if found is None or found[1] != version:
            stated = found[1] if found else "none"
            raise ValueError(f"pyproject.toml has version {version}, {name} has {stated}; write {version} there")
    return version


def build(dist: Path, version: str) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it.

    Raises:
        ValueError: a build that does not give exactly these two files.
        CalledProcessError: a failed build, or metadata that a package index would refuse.
    """
    for old in [*dist.glob("flatmin-*.tar.gz"), *dist.glob("flatmin-*.whl")]:
        old.unlink()
    run(sys.executable, "-m", "build", "--outdir", dist, ROOT)
    sdist, wheel = dist / f"flatmin-{version}.tar.gz", dist / f"flatmin-{version}-py3-none-any.whl"
    for file in (sdist, wheel):
        if not file.is_file():
            raise ValueError(f"the build did not write {file.name}")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def check_sdist(sdist: Path) -> None:
    """Raise ValueError if the sdist holds a file that git does not track."""
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    if extra := sorted(files - tracked(ROOT) - {"PKG-INFO", ""}):
        raise ValueError(f"{sdist.name} holds files that git does not track: {', '.join(extra)}; commit or remove them")


def check_wheel(wheel: Path) -> None:
    """Raise ValueError unless the wheel holds the files of `src/flatmin`, its metadata and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {name.removeprefix("src/") for name in tracked(ROOT) if name.startswith("src/flatmin/")}
    if missing := sorted((wanted | {f"flatmin/{name}" for name in PACKED}) - files):
        raise ValueError(f"{wheel.name} lacks {', '.join(missing)}")
    if extra := sorted(files - wanted):
        raise ValueError(f"{wheel.name} holds files that are not tracked in src/flatmin: {', '.join(extra)}")


def try_wheel(wheel: Path, version: str) -> None:
    """Install the wheel into a new environment and run its smoke test in a temporary folder.

    Raises:
        ValueError: the installed command reports another version.
        CalledProcessError: the installation or the smoke test fails.
    """
    with tempfile.TemporaryDirectory(prefix="flatmin-release-") as folder:
        environment = Path(folder) / "venv"
        venv.create(environment, with_pip=True)
        scripts = environment / ("Scripts" if os.name == "nt" else "bin")
        pins = ROOT / "constraints.txt"
        run(scripts / "python", "-m", "pip", "install", "--quiet", "-c", pins, f"{wheel}[demo]", cwd=folder)
        reported = run(scripts / "flatmin", "--version", cwd=folder, capture=True).strip()
        if reported != f"flatmin {version}":
            raise ValueError(f"the installed command reports {reported!r}, expected 'flatmin {version}'")
        run(scripts / "flatmin", "doctor", cwd=folder)
        run(scripts / "flatmin", "compare", "--preset", "smoke", "--out", "smoke", cwd=folder)


def tracked(root: Path) -> set[str]:
    """The files that git tracks, as paths from the root."""
    return set(run("git", "ls-files", "-z", cwd=root, capture=True).split("\0")) - {""}


def run(*command: str | Path, cwd: str | Path = ROOT, capture: bool = False) -> str:
    """Run a command without the checkout on its path; what it printed, if captured.

    Raises:
        CalledProcessError: it fails.
    """
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [str(word) for word in command]
    if not capture:
        print("$", " ".join(words), flush=True)
    done = subprocess.run(
        words, cwd=cwd, env=environ, check=True, text=True, stdout=subprocess.PIPE if capture else None
    )
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
