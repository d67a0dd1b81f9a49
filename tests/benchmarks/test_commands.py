"""The command line of the benchmarks: files, exit codes, and what it says without a GPU."""

import json
import re
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import equiv, gpu, step
from benchmarks.__main__ import _parser, main
from benchmarks.loops import Setting
from benchmarks.nets import NETS
from benchmarks.results import BenchmarkResult, Gate, Spread

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def test_a_run_leaves_one_json_line_and_a_page(tmp_path, capsys):
    path, page = tmp_path / "new" / "runs.jsonl", tmp_path / "page.md"
    for _ in range(2):
        assert main(["equiv", "--gate", "--json", str(path), "--page", str(page)]) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2
    assert {"date", "torch", "python", "cpu", "load"} <= set(lines[0]["environment"])
    assert lines[0]["raw"]["sam"][1] < 1e-10
    assert "| flatmin sam |" in page.read_text()
    assert "flatmin asam" in capsys.readouterr().out


@no_gpu
def test_a_page_without_a_name_is_dated(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.__main__.RESULTS", tmp_path)
    assert main(["equiv", "--page"]) == 0
    assert [re.sub(r"\d", "0", p.name) for p in tmp_path.iterdir()] == ["0000-00-00-cpu.md"]


def test_a_failed_gate_is_the_exit_code_only_if_asked(monkeypatch, capsys):
    bad = BenchmarkResult("equiv", gates=[Gate("planted", "2", "<= 1", False)])
    monkeypatch.setattr(equiv, "run", lambda options: bad)
    assert main(["equiv"]) == 0
    assert main(["equiv", "--gate"]) == 1
    assert "failed: planted" in capsys.readouterr().err


@no_gpu
@pytest.mark.parametrize(
    "words", [["gpu", "out"], ["kernels"], ["step", "--device", "cuda"], ["train", "--device", "cuda"]]
)
def test_without_a_gpu_it_says_so(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("This machine has no CUDA device")
    assert not list(tmp_path.iterdir())


def test_a_gpu_run_keeps_what_ended_before_a_part_was_stopped(tmp_path, monkeypatch, capsys):
    page = tmp_path / ".first.md"
    jobs = [
        gpu.Job("first", [sys.executable, "-c", f"open({str(page)!r}, 'w').write('# x\\n\\n## table\\n')"], 60, page),
        gpu.Job("endless", [sys.executable, "-c", "import time; time.sleep(60)"], 0.5),
        gpu.Job("broken", [sys.executable, "-c", "raise SystemExit(3)"], 60),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda: {"date": "2026-01-02T03:04:05", "gpu": "Planted"})
    monkeypatch.setattr(gpu, "jobs", lambda options: jobs)
    assert main(["gpu", str(tmp_path)]) == 1
    text = (tmp_path / "gpu.md").read_text()
    assert "# flatmin on Planted, 2026-01-02" in text
    assert "| first | done |" in text
    assert "| endless | stopped at its limit of 0.5 s |" in text
    assert "| broken | exit code 3 |" in text
    assert "## table" in text
    assert "endless: stopped" in capsys.readouterr().out


def gpu_jobs(monkeypatch, *words):
    """The jobs that the command line asks for."""
    asked = []
    monkeypatch.setattr(gpu, "run", asked.append)
    main(["gpu", *words])
    return {job.name: job for job in gpu.jobs(asked[0])}


def test_the_parts_of_a_gpu_run_have_their_own_limits(tmp_path, monkeypatch):
    jobs = gpu_jobs(monkeypatch, str(tmp_path))
    assert list(jobs) == list(gpu.PARTS)
    assert (jobs["perturb"].limit, jobs["train"].limit, jobs["train-small"].limit) == (180, 240, 120)
    assert jobs["train"].command[2:7] == ["benchmarks", "train", "--device", "cuda", "--seconds"]
    for name in ("train", "train-small", "train-compile"):
        assert float(jobs[name].command[7]) < jobs[name].limit
    assert jobs["train"].page != jobs["train-small"].page
    assert gpu_jobs(monkeypatch, str(tmp_path), "--limit", "60", "--parts", "train")["train"].limit == 60


def test_every_part_is_a_command_that_exists(tmp_path, monkeypatch):
    for job in gpu_jobs(monkeypatch, str(tmp_path)).values():
        if job.command[2] == "benchmarks":
            _parser().parse_args(job.command[3:])


def test_training_runs_come_after_the_parts_and_keep_their_folder_without_large_files(tmp_path, monkeypatch):
    first, second = "smoke method=sgd epochs=1", "smoke seed=1"
    words = (
        str(tmp_path),
        "--parts",
        "--train",
        first,
        "--train",
        second,
        "--train-limit",
        "9",
        "--study",
        "smoke seed=0",
    )
    jobs = gpu_jobs(monkeypatch, *words)
    assert list(jobs) == ["study", "run 1", "run 2"]
    assert jobs["study"].command[1:5] == ["-m", "flatmin", "study", "smoke"]
    assert jobs["run 1"].command[1:] == ["-m", "flatmin", "train", *first.split(), "--out", str(tmp_path / "train")]
    assert {jobs["run 1"].limit, jobs["run 2"].limit} == {9}
    run = tmp_path / "train" / "runs" / "sgd-smoke"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("metrics.jsonl", "result.json", "weights.pt", "checkpoints/step-1.pt"):
        (run / name).touch()
    gpu.pack(tmp_path)
    with tarfile.open(tmp_path / "train.tar.gz") as archive:
        files = {Path(entry.name).name for entry in archive if entry.isfile()}
    assert files == {"metrics.jsonl", "result.json"}
    assert not (tmp_path / "study.tar.gz").exists()


@pytest.mark.slow
def test_a_training_run_of_a_gpu_run_is_a_run(tmp_path, monkeypatch):
    job = gpu_jobs(monkeypatch, str(tmp_path), "--parts", "--train", "smoke epochs=1 method=sgd")["run 1"]
    ended, _ = gpu.run_job(job, tmp_path / "log.txt")
    assert ended == "done", (tmp_path / "log.txt").read_text()
    gpu.pack(tmp_path)
    with tarfile.open(tmp_path / "train.tar.gz") as archive:
        files = {Path(entry.name).name for entry in archive if entry.isfile()}
    assert {"config.json", "env.json", "metrics.jsonl", "result.json"} <= files
    assert "weights.pt" not in files


def test_steps_are_sampled_beside_the_floor():
    setting = Setting(NETS["mlp20"])
    samples = step.sample(setting, ["sam"], rounds=3, repeats=1)
    assert {step.CONTROL, step.SGD, "sam", "plain per-tensor loop"} <= set(samples)
    assert all(len(rows) == 3 and all(len(row) == 3 for row in rows) for rows in samples.values())
    result = BenchmarkResult("step")
    step.judge(setting, samples, result)
    assert "apart" in result.notes[0]


def test_a_noisy_control_makes_the_run_inconclusive():
    quiet, noisy = [[1.0, 1.0, 1.0]] * 4, [[1.0, x, 1.0] for x in (0.7, 0.9, 1.2, 1.6)]
    result = BenchmarkResult("step")
    rows = {step.CONTROL: noisy, step.SGD: quiet, "sam": [[1.0, 2.0, 1.0]] * 4}
    step.judge(Setting(NETS["mlp200"]), rows, result)
    assert "inconclusive" in result.notes[0]
    assert result.gates[0].value == "inconclusive"
    result = BenchmarkResult("step")
    step.judge(Setting(NETS["mlp200"]), {**rows, step.CONTROL: quiet}, result)
    assert [g.passed for g in result.gates] == [False]


def test_spread():
    spread = Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (spread.median, spread.q25, spread.q75) == (3.0, 2.0, 4.0)
    assert spread.relative_iqr == pytest.approx(2 / 3)
