"""What is remembered of a weight follows it, and is forgotten when the weight is replaced."""

import copy
import weakref

import pytest
import torch
from torch import nn

import flatmin
from tests.helpers import ENTRY_POINTS, drive
from tests.optim.loops import train

REMEMBERING = ("vasso", "fsam", "stale-sam", "looksam", "ssam-d", "ae-sam", "momentum-sam")


ROWS = ([*range(10), 0, 1, 2, 3], slice(0, 14, 2), [0] * 9)


class Points:
    """Points and their weights, as in graphdeco-inria/gaussian-splatting, in double precision."""

    def __init__(self, recipe, base, rows=10, **params):
        torch.manual_seed(0)
        self.base = base
        shapes = ((rows, 3), (rows, 1))
        groups = [{"params": [nn.Parameter(torch.randn(s, dtype=torch.float64))]} for s in shapes]
        self.optimizer = flatmin.wrap(base(groups), recipe, rho=0.05, diagnostics=True, **params)

    @property
    def weights(self):
        return [group["params"][0] for group in self.optimizer.param_groups]

    def step(self):
        a, b = self.weights

        def closure():
            self.optimizer.zero_grad()
            loss = ((a - 1.0) * b).square().mean()
            loss.backward()
            return loss

        self.optimizer.step(closure)

    def replace(self, rows):
        """New tensors of the rows chosen, with the base's state of them, by the code of that project."""
        for group in self.optimizer.param_groups:
            old = group["params"][0]
            new, kept = nn.Parameter(old.detach()[rows].clone()), self.optimizer.state.get(old, None)
            if kept is not None:
                for key in set(kept) & {"exp_avg", "exp_avg_sq", "momentum_buffer"}:
                    kept[key] = kept[key][rows]
                del self.optimizer.state[old]
                self.optimizer.state[new] = kept
            group["params"][0] = new

    def swap(self, rows):
        """The same tensors with other data."""
        for w in self.weights:
            w.data, w.grad = w.data[rows].clone(), None
            for key, value in self.optimizer.base.state[w].items():
                if isinstance(value, torch.Tensor) and value.ndim:
                    self.optimizer.base.state[w][key] = value[rows]


def momentum(groups):
    return torch.optim.SGD(groups, lr=0.01, momentum=0.9)


def adam(groups):
    return torch.optim.Adam(groups, lr=0.01)


@pytest.mark.parametrize(("base", "how"), [(momentum, "replace"), (adam, "swap")])
@pytest.mark.parametrize("recipe", REMEMBERING)
def test_weights_that_grow_and_shrink_begin_their_memory_anew(recipe, base, how):
    """graphdeco-inria/gaussian-splatting: what follows is what a new optimizer does, given weights and base state."""
    run = Points(recipe, base)
    run.replace([*range(10)])  # before the first step there is no state to move
    for rows in ROWS:
        run.step()
        run.step()
        getattr(run, how)(rows)
    fresh = Points(recipe, base, rows=9)
    fresh.optimizer.load_state_dict(flatmin.base_state_dict(copy.deepcopy(run.optimizer.state_dict())))
    for w, value in zip(fresh.weights, run.weights, strict=True):
        w.data.copy_(value.data)
    if recipe in ("looksam", "ae-sam", "ssam-d"):  # counters, draws and numbers of all weights together stay
        assert not any(bool(v) for w in run.weights for k, v in run.optimizer.state[w].items() if k.endswith(".filled"))
    for _ in range(2):
        run.step()
        fresh.step()
    if recipe not in ("looksam", "ae-sam", "ssam-d"):
        assert all(torch.equal(a, b) for a, b in zip(run.weights, fresh.weights, strict=True))
    assert all(w.isfinite().all() for w in run.weights)
    assert run.optimizer.diagnostics().get("epsilon_norm", 0.0) <= 0.05 + 1e-9
    assert set(run.optimizer.state) <= set(run.weights)  # nothing of the replaced ones is held


def test_a_weight_that_stays_keeps_its_memory():
    """Only the tensor that was replaced begins anew; one that leaves its group is forgotten, one that comes is new."""
    run = Points("vasso", momentum)
    run.step()
    first, second = run.weights
    ema = run.optimizer.state[second]["flatmin.direction.ema"].clone()
    run.optimizer.param_groups[0]["params"][0] = nn.Parameter(first.detach()[:10].clone())
    del run.optimizer.state[first]
    run.step()
    assert not torch.equal(run.optimizer.state[second]["flatmin.direction.ema"], ema)
    assert first not in run.optimizer.state
    with pytest.raises(KeyError):
        del run.optimizer.state[first]


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_layers_come_and_freeze_and_an_ended_step_holds_nothing(entry):
    """A layer that is appended is another's to train; gradients live no longer than the loop holds them."""
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    x, made = torch.randn(8, 4), []

    def backward():
        loss = model(x).square().mean()
        loss.backward()
        made.extend(weakref.ref(p.grad) for p in model.parameters() if p.grad is not None)
        return loss

    for _ in range(4):
        drive(optimizer, backward, entry)
    optimizer.zero_grad()
    assert not [g for g in made if g() is not None]
    model.append(nn.Linear(3, 2))
    before = model[0].weight.detach().clone()
    drive(optimizer, backward, entry)
    assert not torch.equal(before, model[0].weight)
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"no weight received a gradient|no gradients: call loss\.backward"):
        drive(optimizer, lambda: model(x).square().mean(), entry)


def small_vasso(dtype=torch.float32):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)
    return net, flatmin.wrap(torch.optim.SGD(net.parameters(), lr=0.1), "vasso")


@pytest.mark.filterwarnings("ignore:weights in half precision")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_memory_follows_the_precision_of_its_weight(dtype):
    """And a checkpoint goes on in another one."""
    net, optimizer = small_vasso()
    train(net, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    net.to(dtype)
    optimizer.zero_grad()
    train(net, optimizer, 2)
    assert {optimizer.state[w]["flatmin.direction.ema"].dtype for w in net.parameters()} == {dtype}
    net, optimizer = small_vasso(dtype)
    optimizer.load_state_dict(saved)
    train(net, optimizer, 2)
    assert all(w.isfinite().all() for w in net.parameters())


def test_entries_of_the_state_are_written_to_where_they_belong():
    """As moving them to another device in a loop over `optimizer.state.values()` does."""
    net, optimizer = small_vasso()
    train(net, optimizer, 2)
    for entries in optimizer.state.values():
        for key, value in list(entries.items()):
            entries[key] = torch.full_like(value, 7.0)
        entries.pop("nothing", None)
        entries.update(mine=torch.ones(1))
    for w in net.parameters():
        assert "mine" in optimizer.base.state[w]
        assert bool((optimizer.state[w]["flatmin.direction.ema"] == 7.0).all())
    assert type(copy.deepcopy(optimizer.state[w])) is dict
