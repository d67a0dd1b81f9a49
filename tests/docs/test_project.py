"""What an open project owes besides its code: workflows that run anywhere, forms that parse, one version."""

from pathlib import Path

import pytest

from tools.release_check import declared_version

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path):
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # `on` stays a word


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_a_workflow_needs_no_secret_and_may_only_read(path):
    workflow = read(path)
    assert "secrets." not in path.read_text(encoding="utf-8")
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["group"]
    for name, job in workflow["jobs"].items():
        assert int(job["timeout-minutes"]) <= 60
        # Only the upload asks for more: a token of one run, in an environment, and never in forks.
        assert ("permissions" in job) == (name == "publish")
        assert all("@" in step["uses"] for step in job["steps"] if "uses" in step)
    if "publish" in workflow["jobs"]:
        assert workflow["jobs"]["publish"]["permissions"] == {"id-token": "write"}
        assert workflow["jobs"]["publish"]["if"].startswith("vars.")


def test_workflows_call_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in WORKFLOWS:
        for job in read(path)["jobs"].values():
            for step in job["steps"]:
                words = step.get("run", "").split()
                if words[:1] == ["make"] and "$" not in words[1] and words[1] != "docs":
                    assert f"\n{words[1]}: " in makefile, f"{path.name}: make {words[1]}"


@pytest.mark.parametrize("path", [p for p in FORMS if p.name != "config.yml"], ids=lambda p: p.name)
def test_a_form_has_what_github_asks_of_it(path):
    form = read(path)
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert form["name"] and form["description"] and len(ids) == len(set(ids))
    assert all(field["attributes"].get("label") or field["type"] == "markdown" for field in form["body"])


def test_every_file_names_the_same_version():
    assert declared_version(ROOT)


def test_another_version_is_named_with_its_file(tmp_path):
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md", "src/flatmin/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    citation = (tmp_path / "CITATION.cff").read_text(encoding="utf-8").replace("\nversion: ", "\nversion: 9")
    (tmp_path / "CITATION.cff").write_text(citation, encoding="utf-8")
    with pytest.raises(ValueError, match=r"CITATION\.cff has 9"):
        declared_version(tmp_path)
