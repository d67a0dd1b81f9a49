"""What runs write down beside their result, and reports of their networks, as columns of a table."""

import json
import math

import pytest
import torch

from flatmin.study.events import Planned, ReportDone, RunDone, Warned
from flatmin.study.executors import RunOutcome
from flatmin.study.finished import FinishedRun
from flatmin.study.plan import plan
from flatmin.study.reading import read_study
from flatmin.study.record import Record
from flatmin.study.stored_reports import report_path
from flatmin.study.studies import study
from flatmin.study.tables import body, comma_separated, header, troubles
from flatmin.train.folder import RunFolder

STUDY = """
title = "Three clouds"
train = "smoke"
seeds = [0, 1]
baseline = "SGD"
columns = ["test_acc", "cosine@first", "cosine@last", "lambda_1"]
[settings]
data = "tests.user_side:data"
model = "tests.user_side:net"
epochs = 2
batch_size = 4
device = "cpu"
[[arms]]
label = "SGD"
method = "sgd"
[[arms]]
label = "SAM"
method = "sam"
[record]
log_every = 1
diagnostics = true
[measure]
what = "model,hessian"
examples = 40
settings = { top = 2 }
[[published]]
label = "SAM"
metric = "lambda_1"
value = 12.5
source = "a paper"
"""


def spec_of(tmp_path, text=STUDY):
    path = tmp_path / "clouds.toml"
    path.write_text(text, encoding="utf-8")
    return read_study(str(path))


def run(tmp_path, text=STUDY):
    events = []
    table = study(plan(spec_of(tmp_path, text), tmp_path / "out"), workers=0, on_event=events.append)
    return table, events


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    return folder, *run(folder)


def test_columns_are_those_of_the_study(done):
    _, table, _ = done
    assert table.metrics == ("test_acc", "cosine@first", "cosine@last", "lambda_1")
    assert [name for name in header(table) if "@" in name] == ["cosine@first ±95 %", "cosine@last ±95 %"]
    sam = table.rows[1]
    for seed, one in sam.runs.items():
        values = [step["cosine"] for step in one.steps]
        tenth = len(values) // 10
        assert len(values) > 20 and tenth >= 2
        assert one.number("cosine@first") == pytest.approx(math.fsum(values[:tenth]) / tenth)
        assert one.number("cosine@last") == pytest.approx(math.fsum(values[-tenth:]) / tenth)
        assert sam.columns["cosine@first"].stat.values[seed] == one.number("cosine@first")
    assert table.rows[0].columns["cosine@first"].stat.n == 0, "plain training has no second gradient"
    assert body(table)[1][header(table).index("published lambda_1")] == "12.5"
    assert "lambda_1_mean" in comma_separated(table).splitlines()[0]


def test_reports_are_measured_once_and_belong_to_their_weights(done):
    folder, table, events = done
    assert next(e for e in events if isinstance(e, Planned)).nets == 4
    assert sum(isinstance(e, ReportDone) for e in events) == 4
    sam = table.rows[1]
    assert all(one.number("lambda_1") > one.number("lambda_2") for one in sam.runs.values())
    again, events = run(folder)
    assert events[-1].reused == 4 and events[-1].nets == 0 and len(events) == 1, "nothing is trained or measured again"
    assert [row.columns["lambda_1"].stat for row in again.rows] == [row.columns["lambda_1"].stat for row in table.rows]


def test_another_view_is_another_report(done):
    folder, _, _ = done
    _, events = run(folder, STUDY.replace("examples = 40", "examples = 30"))
    assert next(e for e in events if isinstance(e, Planned)).nets == 4


def test_a_run_that_is_done_again_loses_its_report_and_a_damaged_one_is_measured_again(tmp_path):
    run(tmp_path)
    todo = plan(spec_of(tmp_path), tmp_path / "out")
    first, *rest = dict.fromkeys(run.name for run in todo.runs.values())
    paths = {run.name: report_path(todo.store.folder(run), todo.spec.measure) for run in todo.runs.values()}
    paths[rest[0]].write_text('{"sect', encoding="utf-8")
    (todo.store.runs / first / "result.json").unlink()
    kept = (todo.store.runs / rest[0] / "result.json").stat()
    todo = plan(spec_of(tmp_path), tmp_path / "out")
    assert [one.name for one in todo.missing] == [first] and [one.name for one in todo.unmeasured] == [rest[0]]
    _, events = run(tmp_path)
    assert {e.run for e in events if isinstance(e, ReportDone)} == {first, rest[0]}
    assert events[0].sentence.startswith("4 runs, 2 finished before, 2 networks to measure")
    assert (todo.store.runs / rest[0] / "result.json").stat().st_mtime_ns == kept.st_mtime_ns, "not trained again"
    assert "sections" in json.loads(paths[rest[0]].read_text())


def test_runs_that_have_not_recorded_it_are_done_again_and_others_reuse_them(tmp_path):
    plain = STUDY.replace("log_every = 1\ndiagnostics = true", "").replace(
        'columns = ["test_acc", "cosine@first", "cosine@last", "lambda_1"]', ""
    )
    plain = plain.replace('metric = "lambda_1"', 'metric = "test_acc"')
    before, _ = run(tmp_path, plain)
    todo = plan(spec_of(tmp_path), tmp_path / "out")
    assert len(todo.missing) == 4 and "lacks records that this study needs" in todo.warnings[0]
    after, _ = run(tmp_path)
    assert [row.columns["test_acc"].stat for row in after.rows] == [row.columns["test_acc"].stat for row in before.rows]
    assert not plan(spec_of(tmp_path, plain), tmp_path / "out").missing, "more than asked for is enough"


def test_a_network_that_cannot_be_measured_takes_nothing_else_away(tmp_path, monkeypatch):
    todo = plan(spec_of(tmp_path), tmp_path / "out")
    run(tmp_path)
    first = next(iter(todo.runs.values()))
    folder = todo.store.folder(first)
    report_path(folder, todo.spec.measure).unlink()
    torch.save({"nonsense": torch.ones(1)}, folder / "weights.pt")
    table, events = run(tmp_path)
    assert [row.columns["lambda_1"].stat.n for row in table.rows] == [1, 2] and table.rows[0].n == 2
    (warned,) = (event.text for event in events if isinstance(event, Warned))
    assert warned.startswith(f"{first.name} could not be measured: ")
    assert list(table.errors) == ["SGD, seed 0, not measured"]
    # Of another one a part fails: the rest of its report is kept, and --retry measures it again.
    second = list(todo.runs.values())[1]
    report_path(todo.store.folder(second), todo.spec.measure).unlink()

    def broken(*_, **__):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("flatmin.measure.session.spectrum", broken)
        table, events = run(tmp_path)
    assert [row.columns["lambda_1"].stat.n for row in table.rows] == [0, 2]
    assert table.rows[0].runs[1].number("loss") > 0
    (why,) = (why for what, why in table.errors.items() if what == "Curvature is missing for SGD, seed 1")
    assert why.startswith("MemoryError: no room") and any("no room" in remark for remark in troubles(table))
    assert second not in plan(spec_of(tmp_path), tmp_path / "out").unmeasured
    again = study(plan(spec_of(tmp_path), tmp_path / "out", retry=True), workers=0, on_event=lambda event: None)
    assert [row.columns["lambda_1"].stat.n for row in again.rows] == [1, 2]


def test_a_run_without_weights_is_done_again_where_they_are_to_be_measured(tmp_path):
    table, _ = run(tmp_path)
    todo = plan(spec_of(tmp_path), tmp_path / "out")
    folder = todo.store.folder(next(iter(todo.runs.values())))
    (folder / "weights.pt").unlink()
    assert not plan(spec_of(tmp_path), tmp_path / "out").missing, "its report is there"
    report_path(folder, todo.spec.measure).unlink()
    assert len(plan(spec_of(tmp_path), tmp_path / "out", make=False).missing) == 1
    again, events = run(tmp_path)
    assert sum(isinstance(event, RunDone) for event in events) == 1
    assert [row.columns["lambda_1"].stat for row in again.rows] == [row.columns["lambda_1"].stat for row in table.rows]


def test_two_studies_that_record_differently_do_not_take_turns(tmp_path):
    for every in (2, 3, 2, 3):
        text = STUDY.replace("log_every = 1", f"log_every = {every}")
        _, events = run(tmp_path, text)
    assert not any(isinstance(event, RunDone) for event in events)


class TestRecord:
    def test_word_is_empty_for_nothing(self):
        assert Record().word == "" and Record().kept_in({})
        assert Record(log_every=6).kept_in({"record": Record(log_every=3).word})
        assert not Record(log_every=6, diagnostics=True).kept_in({"record": Record(log_every=3).word})
        assert Record(measure_every=2).kept_in({"record": Record(measure_every=2, log_every=1).word})
        assert not Record(measure_every=2).kept_in({"record": Record(measure_every=4).word})
        assert not Record(log_every=2).kept_in({"record": Record(log_every=3).word})

    @pytest.mark.parametrize("other", [{"measure_m": 4}, {"measure_rho": 0.1}, {"measure_m": 8, "measure_rho": 0.1}])
    def test_those_that_measure_otherwise_are_others(self, other):
        mine = Record(measure_every=2, measures="sharpness", measure_m=8)
        theirs = Record(**{"measure_every": 2, "measures": "sharpness", "measure_m": 8} | other)
        assert mine != theirs and mine.word != theirs.word
        assert not mine.kept_in({"record": theirs.word}) and mine.kept_in({"record": mine.word})
        assert Record.of({"record": mine.word}) == mine and mine.options().measure_m == 8
        assert mine.with_also(theirs) == mine and Record(log_every=3).with_also(theirs) == Record(
            **{"log_every": 3, "measure_every": 2, "measures": "sharpness", "measure_m": 8} | other
        )
        assert Record(log_every=3).kept_in({"record": mine.with_also(Record(log_every=3)).word})

    def test_what_was_written_down_before_there_were_groups_counts_as_without(self):
        old = '{"log_every": 0, "measure_every": 2, "measure_examples": 50, "measures": "sharpness"}'
        plain = Record(measure_every=2, measure_examples=50, measures="sharpness")
        assert plain.kept_in({"record": old})
        assert not Record(measure_every=2, measure_examples=50, measures="sharpness", measure_m=5).kept_in(
            {"record": old}
        )

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ("log_every = -1", "log_every must be at least 0"),
            ("log_every = 0\ndiagnostics = true", "diagnostics=true needs log_every"),
            ("measures = 'nonsense'", "what must be of"),
            ("log_evry = 1", "unknown option 'log_evry'; did you mean 'log_every'"),
            ("measure_m = -1", "measure_m must be at least 0, got -1"),
            ("measure_rho = 0.0", r"measure_rho must be above 0, got 0\.0"),
            ("measure_m = 101\nmeasure_examples = 100", "measure_m=101 is more than the 100"),
            ("measure_m = 8\nmeasures = 'hessian'", "measure_m=8 needs the section sharpness"),
        ],
    )
    def test_bad_entries(self, tmp_path, entry, message):
        text = STUDY.replace("log_every = 1\ndiagnostics = true", entry).replace(
            'columns = ["test_acc", "cosine@first", "cosine@last", "lambda_1"]', 'columns = ["lambda_1"]'
        )
        with pytest.raises(ValueError, match=message):
            spec_of(tmp_path, text)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('"cosine@first"', '"cosine@middle"', "unknown column 'cosine@middle'; expected NAME@first"),
            ("diagnostics = true", "", "unknown column 'cosine@first'"),
            ("examples = 40", "example = 40", "measure has no 'example'; did you mean 'examples'"),
            ("examples = 40", "examples = '40'", "measure.examples = '40' is not a whole number"),
            ("examples = 40", "split = 'all'", "split must be train, val or test"),
            ("top = 2", "topp = 2", "unknown option 'topp'"),
            ('"model,hessian"', '"hessien"', "what must be of"),
        ],
    )
    def test_bad_columns_and_views(self, tmp_path, old, new, message):
        with pytest.raises(ValueError, match=message):
            spec_of(tmp_path, STUDY.replace(old, new))

    def test_a_number_without_its_file(self):
        result = run_result()
        assert (
            FinishedRun(result=result).number("lambda_1") is None
            and FinishedRun(result=result).number("cosine@last") is None
        )


def test_top_five_is_a_column_where_a_study_names_it(tmp_path):
    from tests.study.made import made_result, made_table

    text = 'title = "T"\ntrain = "smoke"\nseeds = [0]\ncolumns = ["test_top5"]\n[[arms]]\nlabel = "A"\nmethod = "sgd"\n'

    def result_of(cell, seed):
        point = {"epoch": 1, "val_acc": 50.0, "test_acc": 51.0, "test_top5": 80.0}
        return RunOutcome(result=made_result(cell.configs[seed], 51.0, chosen=point))

    table = made_table(text, tmp_path, result_of)
    assert table.metrics == ("test_top5",) and "80.00" in body(table)[0]
    assert "test top-5 % ±95 %" in header(table)


def run_result():
    from tests.study.made import made_result

    config = type("Config", (), {"method": "sgd", "rho": None, "seed": 0, "epochs": 1})
    return made_result(config, 50.0)


def test_measurements_while_training_are_kept(tmp_path):
    asked = "measure_every = 1\nmeasures = 'sharpness'\nmeasure_examples = 20\nmeasure_m = 5\nmeasure_rho = 0.1\n"
    table, _ = run(tmp_path, STUDY.replace("[measure]", f"{asked}[measure]"))
    folder = next((tmp_path / "out" / "runs").iterdir())
    lines = RunFolder(folder).measures()
    assert [line["epoch"] for line in lines] == [1, 2] and table.rows[0].n == 2
    assert all(line["m_sharpness"] > line["worst_case"] > 0 for line in lines), "smaller groups, higher rises"
    assert [one.measures for row in table.rows for one in row.runs.values() if one.measures == lines] == [lines]
