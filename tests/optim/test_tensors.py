"""Tensors out of the ordinary: gradients that are missing, sparse or complex, tied and empty weights."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.methods import Need
from tests.helpers import ENTRY_POINTS, as_on_device, drive, recipe_of, same_bits, wrap_fitting
from tests.optim.loops import LR, RHO, by_hand, close, inputs, sam, weights

every_entry = pytest.mark.parametrize("entry", ENTRY_POINTS)


# Methods that differ in which tensors and passes they look at.
SOME = ["sam", "asam", "vasso", "rsam", "sgdhess", "esam", "ssam-f", "ssam-d", "gsam", "looksam", "n-step", "ae-sam"]


def entries_of(name):
    return ENTRY_POINTS if recipe_of(name).two_pass else ("closure", "passes")


class Parts(nn.Module):
    """Three small nets; a call uses some of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)) for _ in range(3)).double()

    def forward(self, x, used):
        return sum(self.parts[i](x) for i in used)


@pytest.mark.parametrize("name", [*SOME, "stale-sam", "momentum-sam", "only"])
def test_exactly_the_tensors_with_a_gradient_in_the_last_pass_move(name):
    """The first pass uses parts 0 and 1, all later ones `later`."""
    # A rule that decides by value may find in `perturbed()` that the second pass was not needed.
    by_value = Need.DECIDES_BY_VALUE in recipe_of(name).needs
    entries = ("closure", "passes") if by_value else entries_of(name)
    for later, entry in itertools.product(((1, 2), (2,)), entries):
        model, criterion = Parts(), flatmin.Criterion(nn.CrossEntropyLoss())
        base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=0.1)
        optimizer = wrap_fitting(base, recipe_of(name, names="parts.*"), rho=RHO, model=model, criterion=criterion)
        for k in range(6):
            used = []

            def backward(used=used, model=model, optimizer=optimizer, criterion=criterion, k=k, later=later):
                used.append(later if used else (0, 1))
                loss = criterion(model(inputs(k), used[-1]), torch.arange(8) % 3)
                optimizer.backward(loss)
                return loss

            before = [weights(part) for part in model.parts]
            drive(optimizer, backward, entry)
            for i, part in enumerate(model.parts):
                moved = {not torch.equal(a, b) for a, b in zip(before[i], weights(part), strict=True)}
                assert moved == {i in used[-1]}, (later, entry, k, i)


def test_a_tensor_that_joins_a_later_ascent_is_moved_along_its_own_gradient():
    """Of several ascents the first misses the gradient of one tensor; shapes are equal, so nothing would raise."""
    a, b = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in ([1.0, 0.0], [0.0, 1.0]))
    optimizer, points = flatmin.wrap(torch.optim.SGD([a, b], lr=0.0), "n-step", n=2, rho=1.0), []

    def closure():
        points.append((a.detach().clone(), b.detach().clone()))
        optimizer.zero_grad()
        loss = b.square().sum() + (a.square().sum() if len(points) > 1 else 0.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    # Half a step along b, then half a step along (2, 0, 0, 3).
    torch.testing.assert_close(points[1], (a.detach(), torch.tensor([0.0, 1.5], dtype=torch.float64)))
    norm = math.hypot(2.0, 3.0)
    torch.testing.assert_close(points[2][0], torch.tensor([1.0 + 1.0 / norm, 0.0], dtype=torch.float64))
    torch.testing.assert_close(points[2][1], torch.tensor([0.0, 1.5 + 1.5 / norm], dtype=torch.float64))
    assert a.tolist() == [1.0, 0.0] and b.tolist() == [0.0, 1.0]


class Table(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.last = nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 3)
        self.double()

    def forward(self, index):
        return self.last(self.rows(index).mean(1))


def train_table(name, entry, sparse, *, device=False, bad_step=None):
    model, criterion = Table(sparse), flatmin.Criterion(nn.CrossEntropyLoss())
    optimizer = wrap_fitting(
        torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9),
        recipe_of(name, names="rows.*"),
        rho=RHO,
        model=model,
        criterion=criterion,
    )
    as_on_device(optimizer, device)
    for k in range(6):
        index = torch.randint(10, (8, 2), generator=torch.Generator().manual_seed(k))

        def backward(index=index, k=k):
            loss = criterion(model(index), torch.arange(8) % 3)
            optimizer.backward(math.nan * loss if k == bad_step else loss)
            assert (g := model.rows.weight.grad) is None or g.is_sparse == sparse  # None: not needed in this pass
            return loss

        before = weights(model)
        drive(optimizer, backward, entry)
        assert same_bits(before, weights(model)) == (k == bad_step)
    return model


@pytest.mark.parametrize("name", [*SOME, "stale-sam", "momentum-sam", "gam", "c-flat"])
def test_sparse_gradients_train_as_dense_ones(name):
    for entry in entries_of(name):
        device = entry == "passes"
        models = [train_table(name, entry, sparse, device=device) for sparse in (True, False)]
        assert close(*map(weights, models)), entry


@every_entry
def test_a_sparse_gradient_that_is_not_finite_skips_the_step(entry):
    models = [train_table("vasso", entry, sparse, bad_step=3) for sparse in (True, False)]
    assert close(*map(weights, models))
    assert all(bool(w.isfinite().all()) for w in weights(models[0]))


@pytest.mark.parametrize("name", ["sam", "vasso", "gsam", "wsam", "looksam"])
def test_complex_weights_train_as_pairs_of_real_ones(name):
    for entry in ENTRY_POINTS:
        complex_weights(name, entry, device=entry in ("perturbed", "passes"))


def complex_weights(name, entry, device):
    torch.manual_seed(0)
    start = torch.randn(5, 3, dtype=torch.complex128), torch.randn(3, dtype=torch.float64)
    ends = []
    for pairs in (False, True):
        w = nn.Parameter(torch.view_as_real(start[0]).clone() if pairs else start[0].clone())
        b = nn.Parameter(start[1].clone())
        base = torch.optim.SGD([{"params": [w]}, {"params": [b], "rho": 0.1}], lr=0.05, momentum=0.9)
        optimizer = flatmin.wrap(base, name, rho=RHO)
        as_on_device(optimizer, device)
        for k in range(6):

            def backward(w=w, b=b, pairs=pairs, k=k):
                matrix = torch.view_as_complex(w) if pairs else w
                z = torch.complex(inputs(k, width=5), inputs(k + 50, width=5)) @ matrix + b
                loss = (z.abs() - 1).square().mean() + 0.1 * z.real.sin().mean()
                loss.backward()
                return loss

            drive(optimizer, backward, entry)
        ends.append([torch.view_as_complex(w.detach()) if pairs else w.detach(), b.detach()])
    assert close(*ends) and not torch.equal(ends[0][0], start[0])


class Tied(nn.Module):
    """One matrix, there and back."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.there, self.back = nn.Linear(4, 6), nn.Linear(6, 4)
        self.double()
        self.back.weight = nn.Parameter(self.there.weight.detach().T.clone())
        self.there.weight = self.back.weight

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.there.weight.T, self.there.bias)), self.back.weight, self.back.bias)


@every_entry
def test_tied_weights_are_one_tensor(entry):
    """They count once in the norm, in the step and in the checkpoint, also of a copy."""
    model = Tied()
    twin = copy.deepcopy(model)
    optimizer = sam(model)
    assert len(weights(model)) == 3
    for k in range(4):
        away = []

        def backward(k=k, away=away, model=model):
            away.append(weights(model))
            loss = model(inputs(k)).square().mean()
            loss.backward()
            return loss

        drive(optimizer, backward, entry)
        by_hand(twin, list(twin.parameters()), lambda k=k: twin(inputs(k)).square().mean().backward())
        distance = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(*away, strict=True)))
        assert distance == pytest.approx(RHO, rel=1e-12)
        assert close(weights(model), weights(twin))
        model, optimizer = copy.deepcopy((model, optimizer))
        assert model.there.weight is model.back.weight


class WithEmpty(nn.Module):
    """A net with tensors that have no elements, if wanted."""

    def __init__(self, empty):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.nothing = nn.ParameterList(torch.empty(s, dtype=torch.float64) for s in ((0,), (0, 3)) if empty)

    def forward(self, x):
        return sum((p.sum() for p in self.nothing), start=self.net(x))


@pytest.mark.parametrize("name", SOME)
def test_tensors_without_elements_change_nothing(name):
    device = SOME.index(name) % 2 == 1
    recipe = recipe_of(name, names="net.*")
    ends = []
    for empty in (False, True):
        model, criterion = WithEmpty(empty), flatmin.Criterion(nn.CrossEntropyLoss())
        base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        optimizer = wrap_fitting(base, recipe, rho=RHO, model=model, criterion=criterion)
        as_on_device(optimizer, device)
        start = weights(model.net)
        for k in range(6):

            def backward(model=model, optimizer=optimizer, criterion=criterion, k=k):
                loss = criterion(model(inputs(k)), torch.arange(8) % 3)
                optimizer.backward(loss)
                return loss

            drive(optimizer, backward, "passes" if k % 2 else "closure")
        ends.append(weights(model.net))
        assert not any(torch.equal(a, b) for a, b in zip(start, ends[-1], strict=True))
    if Need.RANDOM in recipe.needs:
        # Some methods draw a number for every tensor, so all later draws are others.
        assert all(bool(w.isfinite().all()) for w in ends[1])
    else:
        assert close(*ends)


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("name", ["sam", "vasso", "gsam"])
def test_weights_and_memory_stay_where_they_are(name, flat, device):
    """Over all loops, a step that raises, one that is not finite and one in which a group stays out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model[2].scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = flatmin.wrap(torch.optim.SGD(groups, lr=LR, momentum=0.9), name, rho=RHO, flat=flat)
    as_on_device(optimizer, device)

    def backward(factor=1.0, raising=False):
        y = model(inputs()) * model[2].scale
        loss = factor * y.square().mean()
        loss.backward()
        if raising:
            raise KeyError("planned")
        return loss

    def addresses():
        slots = [
            t for p in model.parameters() for k, t in sorted(optimizer.state[p].items()) if not k.endswith("filled")
        ]
        return [t.data_ptr() for t in (*model.parameters(), *slots)]

    drive(optimizer, backward)
    first = addresses()
    count = len(list(model.parameters()))
    assert len(set(first)) == len(first) == count * (3 if name == "vasso" else 2)
    for entry in ENTRY_POINTS:
        drive(optimizer, backward, entry)
        assert addresses() == first
        drive(optimizer, lambda: backward(math.nan), entry)
        with pytest.raises(KeyError, match="planned"):
            drive(optimizer, lambda: backward(raising=True), entry)
        optimizer.abort()
        optimizer.param_groups[0]["rho"] = 0.0
        drive(optimizer, backward, entry)
        optimizer.param_groups[0]["rho"] = RHO
        assert addresses() == first
