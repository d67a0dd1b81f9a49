import sys

import pytest
import torch
from torch import nn

from flatmin.train.config import RunConfig
from flatmin.train.sources import build_model, check_fit, load_clean, load_data

USER = """
import torch
from torch import nn

def pairs(n=(12, 6, 6), classes=3):
    g = torch.Generator().manual_seed(0)
    return tuple((torch.randn(k, 4, generator=g), torch.arange(k) % classes) for k in n)

def noisy():
    from flatmin.data.dataset import as_data
    data = as_data(pairs(), "x")
    return data.with_labels((data.train.y + 1) % 3)

def net(num_classes):
    return nn.Linear(4, num_classes)

def plain():
    return nn.Linear(4, 3)

built = nn.Linear(4, 3)

def needy(width):
    return nn.Linear(4, width)

def nothing():
    return 3

def frozen():
    return nn.Linear(4, 3).requires_grad_(False)

number = 3
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    (tmp_path / "my_sources.py").write_text(USER)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield
    sys.modules.pop("my_sources", None)


def config(**changes):
    return RunConfig(**{"method": "sgd", "data": "my_sources:pairs", "model": "my_sources:net", **changes})


@pytest.mark.usefixtures("user")
class TestUsersOwn:
    def test_data_from_the_working_directory(self):
        data = load_data(config())
        assert data.num_classes == 3
        assert data.name == "my_sources:pairs"

    def test_noise_depends_on_the_runs_seed(self):
        one, two, again = (load_data(config(noise=0.5, seed=s)) for s in (0, 1, 0))
        assert int(one.wrong.sum()) == int(two.wrong.sum()) == 6
        assert torch.equal(one.train.y, again.train.y)
        assert not torch.equal(one.train.y, two.train.y)
        assert torch.equal(one.val.y, two.val.y)

    def test_noise_on_noisy_data(self):
        assert load_data(config(data="my_sources:noisy")).wrong.all()
        with pytest.raises(ValueError, match="already contains label noise; set noise=0"):
            load_data(config(data="my_sources:noisy", noise=0.1))

    @pytest.mark.parametrize("model", ["my_sources:net", "my_sources:plain"])
    def test_models_with_and_without_the_number_of_classes(self, model):
        run = config(model=model)
        data = load_data(run)
        check_fit(build_model(run, data), data)

    def test_initialisation_is_seeded_and_leaves_the_global_state(self):
        data = load_data(config())
        before = torch.get_rng_state()
        one, two, again = (build_model(config(seed=s), data) for s in (0, 1, 0))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(one.weight, again.weight)
        assert not torch.equal(one.weight, two.weight)

    def test_models_that_do_not_work(self):
        for changes, words in [
            (
                {"model": "my_sources:needy"},
                "callable without arguments, but it requires 'width'; name a",
            ),
            ({"model": "my_sources:built"}, "my_sources:built is a module; name a function that builds the module"),
            ({"model": "my_sources:nothing"}, "returned a int, expected a torch.nn.Module"),
            ({"model": "my_sources:frozen"}, "no parameter that requires a gradient"),
            ({"model": "my_sources:nett"}, "no function 'nett'; did you mean 'net'"),
            ({"model": "my_sources:number"}, "has no function 'number'"),
            ({"model": "my_source:net"}, "model: there is no module 'my_source'"),
            ({"model": "my_broken:net"}, "importing 'my_broken' failed: ZeroDivisionError"),
            ({"model": "my_sources:"}, "does not have the form package.module:function"),
            ({"model": "konv"}, "unknown model 'konv'; did you mean 'conv'"),
        ]:
            data = load_data(config())
            with pytest.raises(ValueError, match=words):
                build_model(config(**changes), data)

    def test_a_model_that_does_not_fit_the_data(self):
        data = load_data(config())
        with pytest.raises(ValueError, match=r"does not take inputs of shape \(4,\) from my_sources:pairs"):
            check_fit(nn.Linear(5, 3), data)
        with pytest.raises(ValueError, match=r"returned \(2, 2\) for 2 inputs, expected logits \(2, 3\)"):
            check_fit(nn.Linear(4, 2), data)


def test_unknown_data():
    with pytest.raises(ValueError, match="unknown data 'digit'; did you mean 'digits'"):
        load_clean(RunConfig(method="sgd", data="digit"))
