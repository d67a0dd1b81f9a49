"""Runs read back at every stage, their numbers and differences, and the page and the text made of them."""

import dataclasses
import io
import math
import re

import pytest
from rich.console import Console

from flatmin.report import html as page
from flatmin.report.runs import figures as history_figures
from flatmin.report.runs.curves import charts
from flatmin.report.runs.history import FAILED, FINISHED, RUNNING, STOPPED, read, read_all
from flatmin.report.runs.numbers import differences, quantities_of, troubles, typed
from flatmin.report.runs.page import render
from flatmin.report.runs.terminal import BLOCKS, print_runs, sparkline
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder
from flatmin.train.lock import hold
from flatmin.train.result import Epoch, Result
from tests.pages import Outline

CONFIG = RunConfig(method="sam", rho=0.1, epochs=3, noise=0.4)
LAMBDA = {"value": 2.5, "residual": 1e-3, "products": 20, "converged": True}


def line(epoch, **changes):
    values = dict(
        epoch=epoch, lr=0.1 / epoch, rho=0.1, train_loss=2.0 / epoch, perturbed_loss=2.5 / epoch,
        train_acc=30.0 * epoch, val_acc=(50.0, 80.0, 70.0)[epoch - 1], val_loss=1.0 / epoch, test_acc=None,
        memorised=epoch / 2, seconds=epoch, images_per_second=1000.0 * epoch, peak_memory=epoch * 2**30,
    )  # fmt: skip
    return Epoch(**(values | changes))


def result(**changes):
    values = dict(
        method="sam", rho=0.1, gradient_evaluations=2.0, seed=0, epochs=3, noise=0.4, trained=True,
        last={"epoch": 3, "test_acc": None, "val_acc": 70.0, "memorised": 1.5, "train_loss": 0.7},
        best={"epoch": 2, "test_acc": 78.0, "val_acc": 80.0}, train_ce=0.5, lambda_max=LAMBDA, seconds=6.0,
        chosen={
            "selection": "val", "epoch": 2, "val_acc": 80.0, "test_acc": 78.0, "test_top5": 99.0, "test_loss": 0.625
        },
    )  # fmt: skip
    return Result(**(values | changes))


def failed(reason="the training loss was not finite in step 7"):
    nothing = dict.fromkeys(("last", "best", "train_ce", "lambda_max", "chosen"))
    return result(**nothing, trained=False, failure=reason)


def make(folder, *, epochs=3, config=CONFIG, ended=None, environment=None, label="sam", **changes):
    """A run on disk."""
    run = RunFolder(folder)
    run.begin(config, environment or {"versions": {"torch": "2.13"}, "threads": 1}, label=label)
    for epoch in range(1, epochs + 1):
        run.add_line(line(epoch, **changes))
    if ended is not None:
        run.finish(ended)
    return folder


@pytest.fixture
def finished(tmp_path):
    return make(tmp_path / "one", ended=result())


@pytest.fixture
def several(tmp_path, finished):
    """Finished, failed, stopped before its first epoch."""
    other = dataclasses.replace(CONFIG, method="vasso", params={"direction.theta": 0.8}, lr=0.05)
    make(tmp_path / "two", epochs=1, config=other, ended=failed())
    make(tmp_path / "three", epochs=0, config=dataclasses.replace(CONFIG, method="sgd", rho=None, seed=1))
    return [finished, tmp_path / "two", tmp_path / "three"]


class TestReading:
    def test_a_finished_run(self, finished):
        run = read(finished)
        assert (run.name, run.label, run.state, run.config) == ("one", "sam", FINISHED, CONFIG)
        assert run.lines == (line(1), line(2), line(3)) and run.result == result()
        assert (run.chosen.epoch, run.chosen.test_acc, run.chosen.final) == (2, 78.0, True)
        assert run.chosen.text == "2, best on validation"

    def test_a_run_that_goes_on(self, tmp_path):
        folder = make(tmp_path / "a", epochs=2)
        with hold(folder):
            run = read(folder)
        assert (run.state, len(run.lines), run.chosen.text) == (RUNNING, 2, "2, best on validation so far")
        assert read(folder).state == STOPPED

    def test_a_line_that_is_being_written(self, tmp_path):
        folder = make(tmp_path / "a", epochs=2)
        for name in ("metrics.jsonl", "steps.jsonl", "measures.jsonl"):
            with (folder / name).open("a") as file:
                file.write('{"epoch": 3, "lr": 0.')
        run = read(folder)
        assert len(run.lines) == 2 and run.steps == run.measures == ()

    def test_a_failed_run(self, several):
        run = read(several[1])
        assert (run.state, run.failure, len(run.lines)) == (FAILED, "the training loss was not finite in step 7", 1)
        assert run.chosen.epoch == 1 and not run.chosen.final

    def test_a_run_before_its_first_epoch(self, several):
        run = read(several[2])
        assert (run.state, run.lines, run.chosen) == (STOPPED, (), None)

    @pytest.mark.parametrize(
        ("selection", "test", "epoch"), [("val", None, 2), ("last", None, 3), ("max-test", (9.0, 5.0, 9.0), 1)]
    )
    def test_what_would_be_chosen_follows_the_rule_of_the_run(self, tmp_path, selection, test, epoch):
        folder = make(tmp_path / "a", epochs=0, config=dataclasses.replace(CONFIG, selection=selection))
        for number in (1, 2, 3):
            RunFolder(folder).add_line(line(number, test_acc=test and test[number - 1]))
        assert read(folder).chosen.epoch == epoch and read(folder).chosen.rule == selection

    def test_a_result_of_before_there_was_a_choice(self, tmp_path):
        folder = make(tmp_path / "a", ended=result(chosen=None))
        assert (read(folder).chosen.epoch, read(folder).chosen.rule) == (3, "last")

    def test_what_a_later_version_adds_does_not_matter(self, finished):
        text = (finished / "metrics.jsonl").read_text().replace('"epoch"', '"of_tomorrow": 1, "epoch"')
        (finished / "metrics.jsonl").write_text(text)
        assert read(finished).lines == (line(1), line(2), line(3))

    @pytest.mark.parametrize(
        ("file", "content", "sentence"),
        [
            ("metrics.jsonl", '{"epoch": 1\n', r"line 1 of .*metrics\.jsonl is damaged"),
            ("metrics.jsonl", '{"epoch": 1}\n', r"line 1 of .*metrics\.jsonl is damaged: it is not an epoch"),
            ("metrics.jsonl", "\xff\n", r"line 1 of .*metrics\.jsonl is damaged"),
            ("steps.jsonl", '{"step": 1}\n[]\n', r"line 2 of .*steps\.jsonl is damaged"),
            (
                "measures.jsonl",
                '{"step": "x"}\n',
                r"line 1 of .*measures\.jsonl is damaged: it is not a table of numbers",
            ),
            ("result.json", "{", r"result\.json cannot be read: truncated or damaged"),
            ("config.json", "{", r"cannot be read: truncated or damaged"),
            ("config.json", "[]", r"cannot be read: config\.json is not a table"),
        ],
    )
    def test_damage(self, finished, file, content, sentence):
        (finished / file).write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=sentence) as error:
            read(finished)
        assert "\n" not in str(error.value)

    def test_the_environment_is_not_needed(self, finished):
        (finished / "env.json").write_text("{")
        assert read(finished).environment == {}

    def test_no_run(self, tmp_path):
        with pytest.raises(ValueError, match="there is no folder"):
            read(tmp_path / "absent")
        with pytest.raises(ValueError, match=r"is not a run folder: it has no config\.json"):
            read(tmp_path)

    def test_each_once_and_with_names_that_differ(self, tmp_path, finished):
        twin = make(tmp_path / "other" / "one", ended=result())
        runs = read_all([finished, twin, tmp_path / "other" / ".." / "one"])
        assert [run.name for run in runs] == [str(finished), str(twin)]


def numbers(run, runs=None):
    return {q.name: q.text(run) for q in quantities_of(runs or [run]) if q.text(run) is not None}


class TestNumbers:
    def test_of_a_finished_run(self, finished):
        assert numbers(read(finished)) == {
            "state": "finished", "method": "sam", "rho": "0.1", "model": "conv", "data": "digits",
            "wrong labels, %": "40", "seed": "0", "epochs": "3 of 3", "weights of epoch": "2, best on validation",
            "val %": "80.00", "test %": "78.00", "test top-5 %": "99.00", "test loss": "0.6250", "train loss": "0.5000",
            "memorised, %": "1.0", "lambda_max": "2.5", "gradients / step": "2", "s / epoch": "2",
            "samples / s": "2,000", "peak memory, GiB": "3.00",
        }  # fmt: skip

    def test_of_runs_at_other_stages(self, several):
        two, three = read_all(several)[1:]
        assert numbers(two)["method"] == "vasso (theta 0.8)" and numbers(two)["val %"] == "50.00"
        assert "test %" not in numbers(two) and "lambda_max" not in numbers(two)
        assert "val %" not in numbers(three) and numbers(three)["epochs"] == "0 of 3"

    def test_skipped_updates(self, tmp_path):
        assert numbers(read(make(tmp_path / "a", skipped=2)))["skipped updates"] == "6"

    def test_differences(self, several):
        assert differences(read_all(several)) == {
            "method": ["sam", "vasso", "sgd"],
            "rho": ["0.1", "0.1", "none"],
            "direction.theta": ["not set", "0.8", "not set"],
            "lr": ["0.1", "0.05", "0.1"],
            "seed": ["0", "0", "1"],
        }

    def test_where_the_data_are_is_no_difference(self, tmp_path):
        folders = [
            make(tmp_path / name, config=dataclasses.replace(CONFIG, data_dir=name, workers=i))
            for i, name in enumerate("ab")
        ]
        assert differences(read_all(folders)) == {}

    def test_another_machine_is_one(self, tmp_path):
        folders = [
            make(tmp_path / version, environment={"versions": {"torch": version}, "cpu_count": 2})
            for version in ("2.12", "2.13")
        ]
        assert differences(read_all(folders)) == {"(torch)": ["2.12", "2.13"]}

    @pytest.mark.parametrize(
        ("value", "text"),
        [(True, "true"), (None, "none"), (0.1234567890123, "0.1234567890123"), ([1, 0.5], "1,0.5"), ([], "none")],
    )
    def test_settings_are_shown_as_they_are_typed(self, value, text):
        assert typed(value) == text

    def test_troubles(self, several, tmp_path):
        runs = read_all(several)
        assert troubles(runs) == [
            "two failed: the training loss was not finite in step 7.",
            "Each setting has a single run. Seeds can differ more than methods do; `flatmin compare` runs several "
            "seeds.",
        ]
        odd = result(
            trained=False, train_ce=2.3, chance=2.302, lambda_max={**LAMBDA, "converged": False, "residual": 0.2}
        )
        best = dataclasses.replace(CONFIG, selection="max-test")
        assert troubles([read(make(tmp_path / "odd", ended=odd, config=best))]) == [
            "odd has not learned: the training loss of the kept weights is at chance level (2.300; chance is 2.302).",
            "odd chose its weights on the test part, so its test accuracy is a biased estimate.",
            "lambda_max of odd has not converged (relative residual 2e-01).",
        ]

    def test_seeds_of_one_kind_are_no_trouble(self, tmp_path):
        folders = [make(tmp_path / f"s{seed}", config=dataclasses.replace(CONFIG, seed=seed)) for seed in (0, 1)]
        assert troubles(read_all(folders)) == []


@pytest.fixture(autouse=True)
def small_plotly(monkeypatch):
    monkeypatch.setattr(page, "_plotly_js", lambda: "/* plotly.js */")


def headings(text):
    return re.findall(r"<h2>([^<]*)</h2>", text)


class TestPage:
    def test_one_run(self, finished):
        text = render([read(finished)], command=["flatmin", "show", "<one>"])
        outline, everything = Outline(text), "\n".join(Outline(text).text)
        assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
        assert headings(text) == [
            "Losses", "Accuracy", "Memorisation of wrong labels", "Learning rate", "Radius", "Time", "Speed",
            "Settings", "How this was made",
        ]  # fmt: skip
        for expected in ("sam, rho 0.1: conv on digits, 3 of 3 epochs, finished.", "78.00", "flatmin show '<one>'"):
            assert expected in everything
        assert "batch_size" in everything and "2.13" in everything and str(finished) in everything
        assert not [value for name, value in outline.attributes if name in ("src", "href")] and "nan" not in everything
        assert "legend" not in [value for name, value in outline.attributes if name == "class"]

    def test_the_curves_of_one_run(self, finished):
        specs = Outline(render([read(finished)])).specs
        losses = {trace["name"]: trace["y"] for trace in specs[0]["data"]}
        assert losses == {
            "training": [2.0, 1.0, 2 / 3], "at perturbed weights": [2.5, 1.25, 2.5 / 3], "validation": [1.0, 0.5, 1 / 3]
        }  # fmt: skip
        assert specs[0]["layout"]["showlegend"] and specs[0]["layout"]["margin"]["t"] > 16
        assert len({trace["line"]["color"] for trace in specs[0]["data"]}) == 3
        star = specs[1]["data"][1]
        assert (star["x"], star["y"], star["marker"]["symbol"]) == ([2], [80.0], "star")
        assert "best on validation: validation 80.00 %" in star["hovertext"][0]
        assert [specs[i]["data"][0]["y"] for i in (2, 3, 4, 5, 6)] == [
            [0.5, 1.0, 1.5], [0.1, 0.05, 0.1 / 3], [0.1] * 3, [1, 2, 3], [1000.0, 2000.0, 3000.0]
        ]  # fmt: skip

    def test_several_runs(self, several):
        text = render(read_all(several))
        outline, everything = Outline(text), "\n".join(Outline(text).text)
        assert headings(text)[0] == "Differences" and "Common settings" in headings(text)
        assert "3 runs: 1 finished, 1 failed, 1 stopped." in everything
        assert "two failed: the training loss was not finite in step 7." in everything
        assert "direction.theta" in everything and "not set" in everything
        shown = [value for name, value in outline.attributes if name == "value"]
        assert shown == ["one", "two"], "a run without curves is not in the legend"
        assert {trace["legendgroup"] for spec in outline.specs for trace in spec["data"]} == {"one", "two"}
        dashes = [(t["legendgroup"], t["line"]["dash"]) for t in outline.specs[0]["data"]]
        kinds = ("solid", "dash", "dot")  # training, at perturbed weights, validation
        assert dashes == [(run, kind) for run in ("one", "two") for kind in kinds]
        assert "Solid: training; dashed: at perturbed weights; dotted: validation." in everything
        assert "showlegend" not in outline.specs[0]["layout"] or not outline.specs[0]["layout"]["showlegend"]

    def test_more_runs_than_columns_fit(self, tmp_path):
        folders = [make(tmp_path / f"r{i}", config=dataclasses.replace(CONFIG, seed=i, lr=0.1 + i)) for i in range(12)]
        text = render(read_all(folders))
        assert text.count('<th scope="col"') < 40 and "r11" in text
        assert "Differences" in headings(text)

    def test_runs_with_the_same_settings(self, tmp_path):
        text = render(read_all([make(tmp_path / "a"), make(tmp_path / "b")]))
        assert "The settings are the same in all runs." in text

    def test_before_the_first_epoch(self, several):
        text = render([read(several[2])])
        assert "No epoch is finished yet" in text and "plotly.js" not in text

    def test_diagnostics_and_measurements(self, finished):
        folder = RunFolder(finished)
        for step in range(1, 6):
            folder.add_step(
                {"step": step, "epoch": 1, "lr": 0.1, "rho": 0.1, "loss": 2.0, "seconds": 0.1, "images": 9,
                 "cosine": 0.5, "gradient_norm": 3.0 * step, "perturbed_gradient_norm": 4.0, "new_one": 1e9}
            )  # fmt: skip
        folder.add_measures(
            {"epoch": 1, "step": 2, "lambda_1": 3.0, "lambda_2": 2.0, "lambda_-1": -1.0, "sam_gap": 0.1}
        )
        folder.add_measures({"epoch": 2, "step": 4, "lambda_1": 300.0, "lambda_2": math.nan, "sam_gap": 0.2})
        text = render([read(finished)])
        found = headings(text)
        for title in (
            "Losses of updates", "Norms of the gradients", "Angle of the two gradients", "new_one",
            "Largest eigenvalues", "Measured: lambda_-1", "Measured: sam_gap",
        ):  # fmt: skip
            assert title in found
        assert "Norm of the perturbation" not in found, "there are no values for it"
        specs = dict(
            zip([h for h in found if h not in ("Settings", "How this was made")], Outline(text).specs, strict=True)
        )
        eigen = {trace["name"]: (trace["x"], trace["y"]) for trace in specs["Largest eigenvalues"]["data"]}
        assert eigen == {"lambda_1": ([1, 2], [3.0, 300.0]), "lambda_2": ([1], [2.0])}
        assert specs["Largest eigenvalues"]["layout"]["yaxis"]["type"] == "log"
        assert specs["Norms of the gradients"]["data"][0]["y"] == [3.0, 6.0, 9.0, 12.0, 15.0]

    def test_long_curves_are_means(self, finished, monkeypatch):
        folder = RunFolder(finished)
        for step in range(1, 11):
            folder.add_step({"step": step, "loss": float(step)})
        monkeypatch.setattr(history_figures, "POINTS", 4)
        (trace,) = next(one for one in charts([read(finished)]) if one.title == "Losses of updates").series
        assert (trace.x, trace.y) == ([2.0, 5.0, 8.0, 10.0], [2.0, 5.0, 8.0, 10.0])

    def test_hostile_names_stay_text(self, tmp_path):
        hostile = "<img src=x onerror=alert(1)>$x$"
        config = dataclasses.replace(CONFIG, model=hostile, data="</script><b>")
        folders = [
            make(tmp_path / "a<b>", config=config, ended=failed("</script>")),
            make(tmp_path / "c'd", config=dataclasses.replace(config, seed=1)),
        ]
        text = render(read_all(folders), command=[hostile])
        outline = Outline(text)
        assert "img" not in outline.tags and "b" not in outline.tags
        assert hostile in "".join(outline.text)
        assert not [name for name, _ in outline.attributes if name.startswith("on")]
        hovers = [words for spec in outline.specs for trace in spec["data"] for words in trace["hovertext"]]
        assert all("a<b>" not in words for words in hovers)

    def test_colours_come_from_the_style_sheet(self, several):
        text = render(read_all(several))
        names = set(re.findall(r'"var:([a-z0-9-]+)"', text))
        assert names and all(text.count(f"--{name}:") == 2 for name in names), "each colour in light and in dark"

    def test_no_run_at_all(self):
        with pytest.raises(ValueError, match="there is no run to show"):
            render([])


def said(runs, width=100):
    console = Console(width=width, file=io.StringIO())
    print_runs(runs, console)
    return console.file.getvalue()


class TestTerminal:
    def test_one_run(self, finished):
        text = said([read(finished)])
        assert text.startswith("sam, rho 0.1: conv on digits, 3 of 3 epochs, finished.\n")
        assert re.search(r"^test % +78\.00 *$", text, re.MULTILINE)
        assert re.search(r"^train loss +2\.000 +█▃▁ +0\.667 *$", text, re.MULTILINE)
        assert re.search(r"^val % +50\.0 +▁█▆ +70\.0 *$", text, re.MULTILINE)
        assert "differences" not in text

    def test_several_runs(self, several):
        text = said(read_all(several))
        assert re.search(r"^ +one +two +three *$", text, re.MULTILINE)
        assert re.search(r"^differences +one +two +three *$", text, re.MULTILINE)
        assert re.search(r"^direction\.theta +not set +0\.8 +not set *$", text, re.MULTILINE)
        assert "two failed: the training loss was not finite in step 7." in " ".join(text.split())

    @pytest.mark.parametrize("width", [60, 80, 100, 200])
    def test_it_fits(self, tmp_path, width):
        folders = [make(tmp_path / f"a-rather-long-name-{i}", ended=result()) for i in range(5)]
        text = said(read_all(folders), width)
        assert max(map(len, text.splitlines())) <= width
        assert all(f"a-rather-long-name-{i}" in text for i in range(5))

    def test_before_the_first_epoch(self, several):
        assert "No epoch is finished yet." in said([read(several[2])])

    def test_all_runs_of_a_quantity_share_a_scale(self):
        assert sparkline([0.0, 1.0], low=0.0, high=2.0, width=10, longest=4) == BLOCKS[0] + BLOCKS[4]
        assert sparkline([3.0, 3.0], low=3.0, high=3.0, width=10, longest=2) == BLOCKS[0] * 2

    @pytest.mark.parametrize("count", [1, 7, 48, 49, 100, 301])
    @pytest.mark.parametrize("longest", [301, 1000])
    def test_a_long_line_is_as_wide_as_its_share(self, count, longest):
        found = sparkline([1.0] * count, low=0, high=1, width=48, longest=longest)
        assert set(found) == {BLOCKS[-1]} and len(found) == math.ceil(count / (longest / 48)) <= 48

    def test_every_epoch_counts_once(self):
        values = [float(i % 7 == 0) for i in range(100)]
        found = sparkline(values, low=0, high=1, width=100, longest=100)
        assert found == "".join(BLOCKS[-1] if v else BLOCKS[0] for v in values)

    def test_a_terminal_of_ascii(self):
        assert sparkline([0.0, 1.0], low=0, high=1, width=9, longest=2, encoding="ascii").isascii()
