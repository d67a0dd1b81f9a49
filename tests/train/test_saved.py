"""Trained nets that are kept and read back: the same net, on the same data, or a sentence that says why not."""

import argparse
import dataclasses
import json
import os
import shutil
import warnings
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from flatmin.study import pool
from flatmin.study.comparison import comparison
from flatmin.study.executors import execute
from flatmin.study.executors.loop import Task
from flatmin.study.executors.worker import run_task
from flatmin.study.plan import plan
from flatmin.study.store import Run, Store
from flatmin.study.studies import study
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder
from flatmin.train.loop import train
from flatmin.train.saved import SavedRun, load_weights, open_run
from flatmin.train.trainer import Trainer
from tests.helpers import same_bits
from tests.user_side import net

CONFIG = RunConfig(
    method="sam", rho=0.1, epochs=2, batch_size=50, noise=0.3, data="tests.user_side:data", model="tests.user_side:net",
    selection="last",
)  # fmt: skip


def run(label="sam", **changes):
    return Run(label=label, config=dataclasses.replace(CONFIG, **changes), code="c")


def do(one, store, workers=0):
    """Perform a run; its folder."""
    execute([one], store, workers=workers, on_event=lambda event: None)
    return store.folder(one)


def normalised():
    """A net with statistics."""
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


class WithExtraState(nn.Linear):
    """What a module may add to its state dict beside tensors."""

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def extra():
    return WithExtraState(6, 3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(the folder of a finished run, its trained model)"""
    store, kept = Store(tmp_path_factory.mktemp("saved")), []
    folder = do(run(), store)
    train(CONFIG, on_end=kept.append)
    return folder, kept[0]


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run, to damage."""
    return shutil.copytree(finished[0], tmp_path / finished[0].name)


class TestKept:
    def test_the_model_is_the_trained_one(self, finished):
        folder, trained = finished
        saved = open_run(folder)
        assert (saved.name, saved.label, saved.config) == (folder.name, "sam", CONFIG)
        model, x = saved.model(), saved.data().test.x
        assert same_bits(model.state_dict(), trained.state_dict())
        assert torch.equal(model(x), trained(x))
        assert model.training and all(p.requires_grad for p in model.parameters())
        assert not torch.equal(net()(x), trained(x))

    def test_statistics_of_batch_norm_come_back(self, tmp_path):
        one, kept = run(model="tests.train.test_saved:normalised"), []
        model = open_run(do(one, Store(tmp_path))).model()
        train(one.config, on_end=kept.append)
        assert same_bits(model.state_dict(), kept[0].state_dict())
        assert model[1].num_batches_tracked > 0

    def test_the_data_have_the_wrong_labels_that_were_trained_on(self, finished):
        data, want = open_run(finished[0]).data(), Trainer(CONFIG).data
        assert torch.equal(data.train.y, want.train.y) and torch.equal(data.wrong, want.wrong)
        assert int(data.wrong.sum()) == 15

    def test_data_at_hand_are_not_read_again(self, finished, monkeypatch):
        saved = open_run(finished[0])
        data = saved.data()
        monkeypatch.setattr("flatmin.train.saved.load_data", pytest.fail)
        saved.model(data)

    def test_a_worker_keeps_them_too(self, finished, tmp_path, monkeypatch):
        monkeypatch.setattr(pool, "START", "fork")
        there = do(run(), Store(tmp_path), workers=1)
        assert same_bits(open_run(there).model().state_dict(), finished[1].state_dict())

    def test_a_comparison_keeps_them(self, tmp_path):
        words = ["methods=sgd,sam", "baselines=false", "seeds=2", "epochs=1", "batch_size=50", "timing=false"]
        words += ["data=tests.user_side:data", "model=tests.user_side:net", "measure=false"]
        for weights, count in ((True, 4), (False, 0)):
            out = tmp_path / str(weights)
            study(plan(comparison("digits", words), out, weights=weights), workers=0)
            assert len(list(out.glob("runs/*/weights.pt"))) == count
        assert len(list(out.glob("runs/*/result.json"))) == 4

    def test_a_run_that_was_made_elsewhere_is_read_on_the_cpu(self, folder):
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**found, "device": "cuda"}))
        saved = open_run(folder)
        assert saved.config.device == "cuda"
        assert {t.device.type for t in (saved.data().train.x, *saved.model().parameters())} == {"cpu"}

    def test_another_state_than_tensors(self, tmp_path):
        folder = do(run(model="tests.train.test_saved:extra"), Store(tmp_path))
        assert open_run(folder).model().get_extra_state() == {"version": 1}


class TestStore:
    def test_weights_are_left_out_on_request(self, tmp_path):
        folder = do(run(), Store(tmp_path, weights=False))
        assert not list(folder.glob("*weights*")) and (folder / "result.json").exists()
        saved = open_run(folder)
        for use in (saved.check, saved.model):
            with pytest.raises(ValueError, match=r"no weights.*weights=false.*Remove the folder and repeat the run"):
                use()

    def test_a_run_that_is_done_again_has_none_of_the_old(self, folder):
        RunFolder(folder).begin(CONFIG, {})
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "env.json", "metrics.jsonl"]

    def test_a_run_that_fails_has_none(self, tmp_path):
        one, ends = run(lr=1e9, batch_size=8), []
        assert train(one.config, on_end=ends.append).failure is not None
        assert ends == []
        folder = do(one, Store(tmp_path))
        assert not (folder / "weights.pt").exists()
        with pytest.raises(ValueError, match="failed: the training loss was not finite"):
            open_run(folder)

    def test_half_a_file_is_never_left(self, tmp_path, monkeypatch):
        def full(state, file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        one, store = run(), Store(tmp_path)
        outcome = run_task(Task.of(one), store, lambda line: None)
        assert "No space left" in outcome.error
        left = sorted(p.name for p in store.folder(one).iterdir())
        assert left == ["config.json", "data.json", "env.json", "metrics.jsonl"], "the run is not finished either"

    def test_keeping_changes_neither_the_model_nor_the_numbers(self, tmp_path):
        one, results = run(), []
        for weights in (True, False):
            results.append(
                run_task(Task.of(one), Store(tmp_path / str(weights), weights=weights), lambda line: None).result
            )
        assert [dataclasses.replace(r, seconds=0.0) for r in results] == [
            dataclasses.replace(results[0], seconds=0.0)
        ] * 2


class TestRefusals:
    def test_no_run(self, tmp_path):
        for path in (tmp_path, tmp_path / "absent"):
            with pytest.raises(
                ValueError, match=r"is not a run folder: it has no config\.json \(runs are in FOLDER/runs\)"
            ):
                open_run(path)

    def test_an_unfinished_run(self, folder):
        (folder / "result.json").unlink()
        with pytest.raises(ValueError, match=r"is not finished: it has no result\.json"):
            open_run(folder)

    @pytest.mark.parametrize(
        ("file", "content", "reason"),
        [
            ("config.json", '{"label": "sa', "truncated or damaged"),
            ("config.json", "[]", "is not a table"),
            ("config.json", "{}", "method"),
            ("config.json", '{"label": "sam"}', "method"),
            ("config.json", '{"label": "sam", "method": 3}', "method = 3 is an int, expected text"),
            ("config.json", '{"label": "sam", "method": "sam", "epochs": 0}', "epochs"),
            ("result.json", "", "truncated or damaged"),
            ("result.json", "[1]", ""),
            ("result.json", "null", ""),
        ],
    )
    def test_a_damaged_run(self, folder, file, content, reason):
        (folder / file).write_text(content)
        with pytest.raises(ValueError) as error:
            open_run(folder)
        text = str(error.value)
        assert text.startswith(f"the run in {folder} cannot be read: ") and reason in text and text.count("\n") == 0

    def test_entries_that_a_later_version_added_do_not_matter(self, folder):
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**found, "of_tomorrow": 1}))
        assert open_run(folder).config == CONFIG

    def test_weights_of_another_net(self, folder):
        torch.save(nn.Linear(2, 2).state_dict(), folder / "weights.pt")
        with pytest.raises(ValueError, match=r"weights\.pt do not fit the model: missing in the file: '0\.weight'"):
            open_run(folder).model()


class Config:
    """A class that a file must not need, and that must not be made from it."""

    made = 0

    def __init__(self):
        self.rate, self.act = 0.1, nn.functional.relu

    def __setstate__(self, state):
        Config.made += 1


class Ball(dict):
    """A dictionary of a class of its own."""


class Malicious:
    """Calls something when it is read."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


class Compiled(nn.Module):
    """As torch.compile wraps a module."""

    def __init__(self, net):
        super().__init__()
        self._orig_mod = net

    def __reduce__(self):
        return Compiled, (self._orig_mod,)


class Tied(nn.Module):
    """Two names of one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight


class Whole(nn.Module):
    """A net inside another module, as people train it."""

    def __init__(self, net):
        super().__init__()
        self.model, self.criterion = net, nn.CrossEntropyLoss(weight=torch.ones(3))


def prefixed(prefix):
    return lambda net: {prefix + k: v for k, v in net.state_dict().items()}


def smaller(net):
    return {k: 0.5 * v for k, v in net.state_dict().items()}


CONTAINERS = {
    "plain": lambda n: n.state_dict(),
    "state_dict": lambda n: {"state_dict": n.state_dict(), "optimizer": torch.optim.SGD(n.parameters()).state_dict()},
    "model_state_dict": lambda n: {"model_state_dict": n.state_dict(), "args": argparse.Namespace(out=Path("x"))},
    "net of DataParallel": lambda n: {"net": prefixed("module.")(n), "acc": np.float64(0.9), "epoch": 7},
    "compiled": prefixed("_orig_mod."),
    "compiled and parallel": prefixed("module._orig_mod."),
    "deep": lambda n: {"trainer": {"state": {"weights": n.state_dict()}}},
    "Lightning": lambda n: {"state_dict": Whole(n).state_dict(), "hyper_parameters": Ball(lr=0.1), "config": Config()},
    "averaged": lambda n: AveragedModel(n).state_dict(),
    "average alone": lambda n: {"ema": prefixed("module.")(n), "decay": 0.999},
    "two": lambda n: {"model": n.state_dict(), "model_ema": smaller(n)},
    "two by prefix": lambda n: prefixed("online.")(n) | {f"ema_model.{k}": v for k, v in smaller(n).items()},
    "module": lambda n: n,
    "module in a module": lambda n: {"model": Whole(nn.DataParallel(n)), "config": Config()},
    "compiled module": lambda n: Compiled(n),
    "with more": lambda n: {**n.state_dict(), "epoch": 3},
    "history": lambda n: {"model": n.state_dict(), "history": defaultdict(list, loss=[0.1])},
}  # fmt: skip


class TestFiles:
    @pytest.mark.filterwarnings("ignore:.*are used")
    @pytest.mark.parametrize("kind", CONTAINERS)
    def test_checkpoints_as_people_save_them(self, kind, tmp_path):
        """As in pytorch/pytorch#3805, kuangliu/pytorch-cifar and Lightning-AI/pytorch-lightning#2798."""
        torch.manual_seed(0)
        trained, other = net(), net()
        torch.save(CONTAINERS[kind](trained), tmp_path / "a.pt")
        load_weights(other, tmp_path / "a.pt")
        assert same_bits(other.state_dict(), trained.state_dict()) and Config.made == 0

    def test_safetensors(self, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch")
        trained, other = net(), net()
        safetensors.save_file(prefixed("model.")(trained), tmp_path / "a.safetensors")
        load_weights(other, tmp_path / "a.safetensors")
        assert same_bits(other.state_dict(), trained.state_dict())
        (tmp_path / "b.safetensors").write_bytes(b"hello")
        with pytest.raises(ValueError, match=r"b\.safetensors is not a \.safetensors file"):
            load_weights(other, tmp_path / "b.safetensors")

    def test_models_that_are_wrapped_take_plain_weights(self, tmp_path):
        trained = net()
        torch.save(trained.state_dict(), tmp_path / "a.pt")
        for wrap in (nn.DataParallel, Compiled, Whole):
            other = net()
            if wrap is Whole:
                load_weights(nn.Sequential(OrderedDict(net=other)), tmp_path / "a.pt")
            else:
                load_weights(wrap(other), tmp_path / "a.pt")
            assert same_bits(other.state_dict(), trained.state_dict())

    def test_tied_weights_that_were_saved_once(self, tmp_path):
        """As safetensors files of Hugging Face hold them."""
        trained, other = Tied(), Tied()
        torch.save({k: v for k, v in trained.state_dict().items() if k != "b.weight"}, tmp_path / "a.pt")
        load_weights(other, tmp_path / "a.pt")
        assert same_bits(other.state_dict(), trained.state_dict()) and other.a.weight is other.b.weight

    def test_of_several_one_is_chosen_and_the_choice_is_said(self, tmp_path):
        trained, other = net(), net()
        torch.save(CONTAINERS["two"](trained), tmp_path / "a.pt")
        with pytest.warns(UserWarning, match=r"under 'model' are used; those under 'model_ema' fit too"):
            load_weights(other, tmp_path / "a.pt")
        load_weights(other, tmp_path / "a.pt", key="model_ema")
        assert same_bits(other.state_dict(), smaller(trained))
        with pytest.raises(ValueError, match=r"were found under 'swa'; .* under 'model', under 'model_ema'"):
            load_weights(other, tmp_path / "a.pt", key="swa")
        torch.save({"a": trained.state_dict(), "b": smaller(trained)}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"several weights fit the model, under 'a', under 'b'; choose one"):
            load_weights(other, tmp_path / "a.pt")
        torch.save({"a": trained.state_dict(), "b": trained.state_dict()}, tmp_path / "a.pt")
        load_weights(other, tmp_path / "a.pt")
        torch.save(Whole(trained).state_dict(), tmp_path / "a.pt")
        with pytest.warns(UserWarning, match=r"under 'model' are used; other entries are ignored: 'criterion\.weight'"):
            load_weights(other, tmp_path / "a.pt")

    def test_what_is_no_state_dict_of_this_net(self, tmp_path):
        for content, sentence in [
            (torch.zeros(3), "has no state dict, neither at its top level nor in the dictionaries inside it"),
            ([1, 2], "has no state dict"),
            ({"shadow_params": [torch.zeros(1)]}, "has no state dict"),
            ({"model": 3, "epoch": 1}, "has no state dict"),
            ({0: torch.zeros(1)}, "has no state dict"),
            ({}, "do not fit the model: missing in the file: '0.weight', .*'2.bias'"),
            ({"weights": {"a": torch.zeros(1)}}, "do not fit .*under 'weights', missing .*unexpected in the file: 'a'"),
            (
                {**net().state_dict(), "0.bias": torch.zeros(5)},
                r"shapes: '0.bias', \(5,\) in the file and \(16,\) in the",
            ),
            ({**net().state_dict(), "more": torch.zeros(5)}, "do not fit the model: unexpected in the file: 'more'"),
            (
                {f"net.{k}": v for k, v in net().state_dict().items() if k != "2.bias"},
                "do not fit the model: under 'net', missing in the file: '2.bias'.*Build the model with the same",
            ),
        ]:
            torch.save(content, tmp_path / "a.pt")
            with pytest.raises(ValueError, match=sentence) as error:
                load_weights(net(), tmp_path / "a.pt")
            assert "\n" not in str(error.value) and str(tmp_path / "a.pt") in str(error.value)

    def test_no_checkpoint_at_all(self, tmp_path):
        (tmp_path / "a.pt").write_text("hello")
        with pytest.raises(ValueError, match=r"a\.pt was not written") as error:
            load_weights(net(), tmp_path / "a.pt")
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=r"there is no file .*absent"):
            load_weights(net(), tmp_path / "absent")

    def test_code_in_a_checkpoint_is_not_run(self, tmp_path):
        for name, call in (("touch", (os.mkdir, str(tmp_path / "made"))), ("eval", (eval, "1/0"))):
            torch.save({"model": net().state_dict(), "extra": Malicious(*call)}, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match="cannot be read without executing code in it"):
            load_weights(net(), tmp_path / "touch.pt")
        load_weights(net(), tmp_path / "eval.pt")
        assert not (tmp_path / "made").exists()

    def test_a_scripted_model_says_how(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(net()).save(str(tmp_path / "a.pt"))
        with pytest.raises(ValueError, match=r"is a scripted model.*torch\.jit\.load\('.*a\.pt'\)\.state_dict\(\)"):
            load_weights(net(), tmp_path / "a.pt")

    def test_the_net_is_left_alone_by_a_file_without_weights(self, tmp_path):
        torch.save({"model": 3}, tmp_path / "a.pt")
        model = net()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError):
            load_weights(model, tmp_path / "a.pt")
        assert same_bits(model.state_dict(), before)


def test_a_file_is_a_run_without_a_folder(tmp_path):
    torch.save(net().state_dict(), tmp_path / "mine.pt")
    saved = SavedRun(name="mine", label="mine", config=CONFIG, weights=tmp_path / "mine.pt")
    assert saved.model()(saved.data().val.x).shape == (20, 3)
