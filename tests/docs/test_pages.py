"""What the pages claim: their Python runs, their commands parse, their links lead somewhere."""

import dataclasses
import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import flatmin
from flatmin.cli.main import app
from flatmin.data.dataset import as_data
from flatmin.originals.projects import PROJECTS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    loader = [(torch.randn(12, 6), torch.randint(3, (12,))) for _ in range(3)]
    before = [p.detach().clone() for p in model.parameters()]
    names = {
        "torch": torch,
        "flatmin": flatmin,
        "model": model,
        "loader": loader,
        "loss_fn": torch.nn.CrossEntropyLoss(),
        "base": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "__name__": "page",
    }
    for block in blocks(page):
        model.zero_grad()  # each block is a loop of its own
        exec(compile(block, page.name, "exec"), names)
    if page.name == "your-own.md":
        data = as_data(names["load"](), "load")
        assert names["build"](data.num_classes)(data.train.x[:5]).shape == (5, 2)
    if page.name == "README.md":
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_saved_run_is_measured_as_the_page_says(tmp_path, monkeypatch):
    """The page's only block that needs a run, so it is no block that runs with the others."""
    from flatmin.measure import Problem

    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["train", "smoke", "epochs=1", "--name", "NAME"]).exit_code == 0
    page = (ROOT / "docs/measure/index.md").read_text(encoding="utf-8")
    names = {"torch": torch, "Problem": Problem}
    exec(re.search(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1], names)
    with torch.no_grad():
        train = names["data"].train
        mean = torch.nn.functional.cross_entropy(names["model"].eval()(names["run"].transform(train.x)), train.y)
    assert names["problem"].value() == pytest.approx(mean.item(), rel=1e-5)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_paper_is_cited_once_and_as_an_entry_of_its_own():
    """A merge that loses the first line of an entry leaves keys twice, of which readers of YAML keep the last."""
    _, *entries = re.split(r"^  - ", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    keys = [re.findall(r"^(?: {4})?([\w-]+):", entry, re.MULTILINE) for entry in entries]
    papers = [entry for entry, found in zip(entries, keys, strict=True) if "title" in found]
    assert all(len(found) == len(set(found)) for found in keys)
    assert all(entry.startswith("type: ") for entry in papers) and papers
    titles = re.findall(r"^    title: (.+)$", "\n".join(papers), re.MULTILINE)
    assert len(titles) == len(set(titles)) == len(papers)


def test_commands_are_understood():
    """Every indented `flatmin compare` line resolves to settings that can be planned."""
    from flatmin.study.comparison import comparison
    from flatmin.study.expand import grid_points

    text = re.sub(r" \\\n +", " ", "\n".join(page.read_text(encoding="utf-8") for page in PAGES))
    for line in re.findall(r"^    flatmin compare(.*)$", text, re.MULTILINE):
        words = shlex.split(line.split("#")[0])
        methods = tuple(value for word, value in itertools.pairwise(words) if word in ("-m", "--method"))
        overrides = [word for word in words if re.fullmatch(r"[a-z_.-]+=\S+", word)]
        grid_points(comparison(overrides=overrides, methods=None if "--plugin" in words else methods or None))


def test_studies_are_understood(tmp_path, monkeypatch):
    """Every indented line of a study unfolds, with what it adds, and so does the study that the page writes out."""
    from flatmin.study.baselines import with_baselines
    from flatmin.study.dimensions import read_dimension
    from flatmin.study.executors import executor_settings
    from flatmin.study.expand import grid_points
    from flatmin.study.reading import read_study

    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/studies/your-own.md").read_text(encoding="utf-8")
    Path("my_study.toml").write_text(re.search(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE).group(1))
    for page in PAGES:
        for line in re.findall(r"^    flatmin study (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            name, *words = shlex.split(line.split("#")[0])
            pairs = list(itertools.pairwise(words))
            on = [value for word, value in pairs if word == "--on"]
            if ("--executor", "ray") not in pairs:  # it is in an environment of its own
                executor_settings("slurm" if on else "local", on)
            if name != "list":
                overrides = [word for word in words if "=" in word and word not in on]
                spec = read_study(name, overrides, demo="--demo" in words)
                chosen = tuple(key for word, keys in pairs if word == "--choose" for key in keys.split(","))
                spec = dataclasses.replace(spec, choose=chosen or spec.choose)
                assert grid_points(with_baselines(spec) if "--baselines" in words else spec)
        for line in re.findall(r"^    flatmin search (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            name, *words = shlex.split(line.split("#")[0])
            assert [read_dimension(word) for word in words if ".." in word] and grid_points(read_study(name))
    rows = {row.label: row.config for row in grid_points(read_study("my_study.toml"))}
    assert len(rows) == 8 and rows["SGD model=mlp"].lr == 0.05 and rows["SGD model=conv"].lr == 0.1
    assert rows["SGD for twice as long model=conv"].epochs == 2 * rows["SGD model=conv"].epochs


def test_the_page_of_studies_has_every_study():
    from flatmin.train.settings import preset_names

    text = (ROOT / "docs/studies/list.md").read_text(encoding="utf-8")
    listed = set()
    for line in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", line)
        listed |= {first, *(first.partition("-")[0] + word if word[0] == "-" else word for word in others)}
    assert listed == set(preset_names("study"))


def test_the_pages_of_the_papers_have_the_cost_of_their_studies():
    from flatmin.study.costs import Sizes
    from flatmin.study.expand import grid_points
    from flatmin.study.reading import read_study

    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/papers").glob("*.md"))
    lines = re.findall(r"^\|.*\| `(?:flatmin study )?([\w-]+)` \| (\d+)[^|]*\| ([\d,]+)\b", text, re.MULTILINE)
    assert len(lines) == 25
    sizes = Sizes()
    for name, runs, evaluations in lines:
        spec = read_study(name)
        configs = [row.config for row in grid_points(spec)]
        cost = len(spec.seeds) * sum(sizes.cost(config) for config in configs)
        assert (runs, evaluations) == (str(len(configs) * len(spec.seeds)), f"{cost:,.0f}"), name


def test_command_lines_of_the_originals_become_what_the_page_says(tmp_path, monkeypatch):
    """Every block of the page is a session: the command, which is run with --dry-run, and what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    page = (ROOT / "docs/papers/command-lines.md").read_text(encoding="utf-8")
    sessions = "".join(re.findall(r"^```console\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    found = re.findall(r"^\$ flatmin (.*)\n((?:(?!\$ ).*\n)+)", sessions, re.MULTILINE)
    assert len(found) == sessions.count("$ flatmin") >= 8
    for line in re.findall(
        r"^    flatmin (original .*)$", "\n".join(p.read_text(encoding="utf-8") for p in PAGES), re.MULTILINE
    ):
        found.append((line.split("#")[0], None))
    for line, printed in found:
        result = CliRunner().invoke(app, [*shlex.split(line), "--dry-run"])
        assert result.exit_code == 0, line
        assert printed in (None, result.output), line
    assert not list(tmp_path.iterdir())


def test_the_page_of_the_originals_has_every_flag():
    page = (ROOT / "docs/papers/command-lines.md").read_text(encoding="utf-8")
    for name, project in PROJECTS.items():
        part = page.partition(f"## `{name}`")[2].partition("\n## ")[0]
        table = [cell for line in part.splitlines() if line.startswith("| `--") for cell in line.split("|")[1:2]]
        flags = re.findall(r"`--(\w+)`", " ".join(table))
        assert sorted(flags) == sorted(field.name for field in dataclasses.fields(project.flags)), name


def test_makefile_has_the_commands_that_are_named():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"\bmake ([a-z-]+)\b", page.read_text(encoding="utf-8")):
            assert target in targets, f"{page.name}: make {target}"
