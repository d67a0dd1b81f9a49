"""skorch calls `optimizer.step(closure)`: its nets against a loop written by hand."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from tests.helpers import noisy_net, same_bits

pytest.importorskip("skorch", reason="needs skorch: run make test-frameworks")
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import GradientNormClipping, LRScheduler

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = ("sam", "vasso", "every-k", "momentum-sam", "n-step")


def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(48, 6, generator=g), torch.randint(3, (48,), generator=g)


class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def net(cls=NeuralNetClassifier, module=Plain, method="sam", **options):
    """By name: the optimizer is built by skorch."""
    by_name = {
        "optimizer": flatmin.SAM,
        "optimizer__base_optimizer": torch.optim.SGD,
        "optimizer__recipe": method,
        "optimizer__rho": 0.1,
        "optimizer__momentum": 0.9,
    }
    torch.manual_seed(0)
    return cls(
        module,
        criterion=nn.CrossEntropyLoss,
        lr=0.1,
        batch_size=8,
        train_split=None,
        verbose=0,
        **{"max_epochs": 2, **by_name, **options},
    )


def by_hand(start, method="sam", *, epochs=2, random=None, with_model=False, **options):
    model = start
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = flatmin.wrap(base, method, rho=0.1, model=model if with_model else None, **options)
    losses = []
    if random is not None:
        torch.set_rng_state(random)
    for _ in range(epochs):
        of_epoch = []
        for x, y in DataLoader(TensorDataset(*data()), batch_size=8):

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            of_epoch.append(optimizer.step(closure).item())
        losses.append(sum(of_epoch) / len(of_epoch))
    return model, losses


def start_of(found):
    """A copy of an initialised net's module, and the random state with which its training starts."""
    found.initialize()
    return copy.deepcopy(found.module_), torch.get_rng_state()


@pytest.mark.parametrize("method", METHODS)
def test_the_optimizer_by_name(method):
    found = net(method=method)
    model, random = start_of(found)
    found.partial_fit(*data())
    model, losses = by_hand(model, method, random=random)
    assert same_bits(found.module_.state_dict(), model.state_dict())
    assert found.history[:, "train_loss"] == pytest.approx(losses, abs=1e-6), "at w"


class WithModel(NeuralNetClassifier):
    """The three lines of docs/loops/skorch.md for nets with BatchNorm."""

    def initialize_optimizer(self, *args, **kwargs):
        super().initialize_optimizer(*args, **kwargs)
        self.optimizer_ = flatmin.wrap(self.optimizer_, "sam", rho=0.1, model=self.module_)
        return self


class Noisy(nn.Sequential):
    def __init__(self):
        super().__init__(*noisy_net())


def test_batchnorm_needs_the_model():
    options = {"optimizer": torch.optim.SGD, "optimizer__momentum": 0.9}
    torch.manual_seed(0)
    found = WithModel(
        Noisy, criterion=nn.CrossEntropyLoss, lr=0.1, batch_size=8, max_epochs=2, train_split=None, verbose=0, **options
    )
    model, random = start_of(found)
    found.partial_fit(*data())
    assert same_bits(found.module_.state_dict(), by_hand(model, random=random, with_model=True)[0].state_dict())


def test_clip_norm_is_of_what_the_base_takes_and_the_callback_of_each_pass():
    nets = {}
    for kind, options in {
        "clip_norm": {"optimizer__clip_norm": 0.3},
        "callback": {"callbacks": [GradientNormClipping(0.3)]},
    }.items():
        nets[kind] = net(method="gsam", **options)
        nets[kind].fit(*data())
    found = net(method="gsam")
    model, random = start_of(found)
    model = by_hand(model, "gsam", random=random, clip_norm=0.3)[0]
    assert same_bits(nets["clip_norm"].module_.state_dict(), model.state_dict())
    assert not same_bits(nets["callback"].module_.state_dict(), model.state_dict())


def test_rho_is_a_parameter_of_the_estimator():
    x, y = data()
    search = GridSearchCV(net(), {"optimizer__rho": [0.0, 0.2]}, cv=2, refit=True, scoring="accuracy")
    search.fit(x.numpy(), y.numpy())
    assert search.best_estimator_.optimizer_.param_groups[0]["rho"] in (0.0, 0.2)
    found = clone(net()).initialize()
    found.set_params(optimizer__rho=0.3, lr=0.5)
    assert found.optimizer_.param_groups[0]["rho"] == 0.3 and found.optimizer_.param_groups[0]["lr"] == 0.5


def test_schedulers():
    found = net(callbacks=[LRScheduler("StepLR", step_size=1, gamma=0.1)])
    found.fit(*data())
    assert found.optimizer_.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert found.optimizer_.counts()["updates"] == 12


def test_resume_and_pickle_are_exact(tmp_path):
    files = {"f_params": tmp_path / "p.pt", "f_optimizer": tmp_path / "o.pt"}
    whole = net(method="vasso", max_epochs=1).fit(*data())
    whole.save_params(**files)
    random = torch.get_rng_state()
    copied = pickle.loads(pickle.dumps(whole))
    whole.partial_fit(*data())
    rest = net(method="vasso", max_epochs=1).initialize()
    rest.load_params(**files)
    for other in (rest, copied):
        torch.set_rng_state(random)
        other.partial_fit(*data())
        assert same_bits(whole.module_.state_dict(), other.module_.state_dict())
        assert same_bits(whole.optimizer_.state_dict(), other.optimizer_.state_dict())
    assert np.isfinite(rest.predict_proba(data()[0])).all()
