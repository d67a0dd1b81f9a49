"""`optimizer.diagnostics()` against numbers computed by hand from what the loop itself saw in each pass."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import flatmin
from tests.helpers import (
    BASES,
    CHUNKS,
    ENTRY_POINTS,
    Session,
    as_on_device,
    batch,
    drive,
    noisy_net,
    recipe_of,
    same_bits,
)

RATIOS = {"ratio_above_1", "ratio_0_to_1", "ratio_minus_1_to_0", "ratio_below_minus_1", "ratio_larger"}
GRADIENTS = {"gradient_norm", "perturbed_gradient_norm", "cosine", "same_sign", *RATIOS}
LOSSES, SAMPLES = {"loss", "loss_perturbed"}, {"misclassified", "flipped"}
REALISED = {"epsilon_norm", "epsilon_asked", "epsilon_projection", "epsilon_cosine", "epsilon_unmoved"}
EPSILON = {*REALISED, "ascent_cosine"}
ALL = {"weight_norm", *EPSILON, *GRADIENTS, *LOSSES, *SAMPLES}
OF_ASCENT = ALL - {"loss", "weight_norm", "gradient_norm"}
TWO_PASS = ["sam", "asam", "vasso", "bisam-log", "gsam", "wsam", "looksam", "sam-direction", "every-k"]


class Witness:
    """A loop that writes down what it sees: weights, loss, gradient and predictions of every pass."""

    def __init__(self, method, *, criterion=True, dtype=torch.float64, rho=0.5, device=False, fused=None, **options):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 1, bias=False))
        self.net = net.to(dtype)
        self.net.forward = lambda x: net[2](net[1](net[0](x)))  # the last layer gets no gradient
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.criterion = flatmin.Criterion(self.loss) if criterion else self.loss
        groups = [{"params": list(net[0].parameters()), "rho": rho}, {"params": list(net[2].parameters())}, net[3]]
        groups[2] = {"params": list(net[3].parameters())}
        base = torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=fused)
        self.optimizer = flatmin.wrap(
            base,
            recipe_of(method) if isinstance(method, str) else method,
            rho=0.2 * rho,
            model=self.net,
            criterion=self.criterion if criterion else None,
            diagnostics=True,
            **options,
        )
        as_on_device(self.optimizer, device)
        self.seen, self.ascents = [], []

    def backward(self, k, chunk=None, accumulate=1):
        x, y = batch(k, dtype=next(self.net.parameters()).dtype)
        if chunk is not None:
            x, y = x.chunk(CHUNKS)[chunk], y.chunk(CHUNKS)[chunk]
        weights = list(self.net.parameters())
        with torch.no_grad():
            right = self.net(x).argmax(1) == y
        loss = self.criterion(self.net(x), y)
        self.optimizer.backward(loss)
        copies = [w.detach().double().clone() for w in weights]
        grads = [None if w.grad is None else w.grad.double().clone() for w in weights]
        self.seen.append((copies, float(loss.detach()), grads, right))
        return loss

    def steps(self, count, entry="closure"):
        for k in range(count):
            self.seen = []
            home = torch.cat([w.detach().flatten() for w in self.net.parameters()])
            drive(self.optimizer, partial(self.backward, k), entry)
            eps = torch.cat([w.flatten() for w in self.seen[-1][0]]) - home
            self.ascents += [eps] if eps.any() else []
        return self

    def expected(self, first=0, last=-1):
        """Every number of the last step, from its passes."""
        (w, loss, g, right), (moved, loss_there, gs, right_there) = self.seen[first], self.seen[last]
        eps = torch.cat([(b - a).flatten() for a, b in zip(w, moved, strict=True)])
        g, gs = (torch.cat([t.flatten() for t in grads if t is not None]) for grads in (g, gs))
        r = [b / a for a, b in zip(g.tolist(), gs.tolist(), strict=True)]
        classes = {
            "ratio_above_1": sum(v > 1 for v in r) / len(r),
            "ratio_0_to_1": sum(0 < v <= 1 for v in r) / len(r),
            "ratio_minus_1_to_0": sum(-1 <= v < 0 for v in r) / len(r),
            "ratio_below_minus_1": sum(v < -1 for v in r) / len(r),
            "ratio_larger": sum(abs(v) > 1 for v in r) / len(r),
            "same_sign": sum(v > 0 for v in r) / len(r),
        }
        return {
            **classes,
            "loss": loss,
            "loss_perturbed": loss_there,
            "gradient_norm": float(g.norm()),
            "perturbed_gradient_norm": float(gs.norm()),
            "weight_norm": math.sqrt(sum(float((t**2).sum()) for t in w)),
            "epsilon_norm": float(eps.norm()),
            "epsilon_asked": float(eps.norm()),
            "epsilon_projection": 1.0,
            "epsilon_cosine": 1.0,
            "epsilon_unmoved": 0.0,
            "ascent_cosine": float(F.cosine_similarity(*self.ascents[-2:], dim=0)) if self.ascents[1:] else math.nan,
            "cosine": float(g @ gs / (g.norm() * gs.norm())),
            "misclassified": float((~right_there).sum()),
            "flipped": float((right & ~right_there).sum()),
        }

    def check(self, keys=None, tolerance=1e-10, **expected):
        found, want = self.optimizer.diagnostics(), {**self.expected(), **expected}
        assert all(type(v) is float for v in found.values())
        assert set(found) == (ALL if keys is None else keys)
        for name, value in found.items():
            assert value == pytest.approx(want[name], rel=tolerance, abs=tolerance), name
        return found


@pytest.mark.parametrize("method", TWO_PASS)
def test_every_number_is_that_of_the_last_step(method):
    """Step 5 ascends with every rule; the numbers of one sample of passes are not those of another."""
    for entry in ENTRY_POINTS:
        steps = 6 if method in ("looksam", "every-k") else 3
        device = (TWO_PASS.index(method) + ENTRY_POINTS.index(entry)) % 2 == 1
        witness = Witness(method, device=device).steps(steps, entry)
        found = witness.check()
        assert len(witness.seen) == 2
        assert found["loss"] != found["loss_perturbed"] and found["epsilon_norm"] > 0.05
        assert found["ratio_larger"] == pytest.approx(found["ratio_above_1"] + found["ratio_below_minus_1"])
        assert sum(found[name] for name in RATIOS - {"ratio_larger"}) == pytest.approx(1.0)


def test_every_kind_of_entry_and_sample_occurs():
    """Far enough away that each class has entries, and right samples turn wrong."""
    found = Witness("sam", rho=6.0).steps(3).check()
    assert all(found[name] > 0 for name in ALL - {"epsilon_unmoved", "ascent_cosine"})


@pytest.mark.parametrize("entry", ["closure", "perturbed", "passes"])
def test_without_a_criterion(entry):
    """Only a closure returns its loss; nobody sees logits."""
    keys = ALL - SAMPLES - (set() if entry == "closure" else LOSSES)
    Witness("sam", criterion=False).steps(2, entry).check(keys)


@pytest.mark.parametrize("entry", ["closure", "passes"])
def test_micro_batches_show_the_last_one_and_count_all_samples(entry):
    witness = Witness("micro-sam").steps(3, entry)
    assert len(witness.seen) == 4
    counts = {name: witness.expected(0, 1)[name] + witness.expected(2, 3)[name] for name in SAMPLES}
    witness.check(**{**witness.expected(2, 3), **counts})


@pytest.mark.parametrize("entry", ["closure", "passes"])
@pytest.mark.parametrize("method", ["momentum-sam", "stale-sam"])
def test_without_a_pass_at_w(method, entry):
    witness = Witness(method).steps(1, entry)
    keys = {"loss_perturbed", "perturbed_gradient_norm", "weight_norm", "misclassified", *EPSILON}
    found = witness.optimizer.diagnostics() if witness.steps(3, entry) else {}
    want = witness.expected()
    assert set(found) == keys
    for name in keys - {*REALISED, "weight_norm"}:
        assert found[name] == pytest.approx(want[name], rel=1e-10), name
    # The loop sees w + eps only.
    assert 0.0 < found["epsilon_norm"] <= 0.5 + 1e-9


@pytest.mark.parametrize("method", ["every-k", "looksam", "sgd", "ae-sam"])
def test_a_step_without_ascent_has_no_ascent_to_show(method):
    for entry in ("closure", "perturbed", "passes"):
        witness = Witness(method).steps(2, entry)
        found = witness.optimizer.diagnostics()
        assert found["loss"] == pytest.approx(witness.expected()["loss"], rel=1e-12)
        assert not set(found) & (OF_ASCENT - {"loss_perturbed", "perturbed_gradient_norm"})


@pytest.mark.parametrize("entry", ["closure", "perturbed", "passes"])
@pytest.mark.parametrize("method", ["every-k", "looksam", "sgd"])
def test_a_step_without_ascent_shows_nothing_as_perturbed(method, entry):
    found = Witness(method).steps(2, entry).optimizer.diagnostics()
    assert not set(found) & OF_ASCENT


@pytest.mark.parametrize("entry", ["closure", "passes"])
def test_several_ascents_show_the_first_and_the_last_point(entry):
    witness = Witness("n-step").steps(2, entry)
    assert len(witness.seen) == 4
    witness.check()


@pytest.mark.parametrize("entry", ["closure", "passes"])
def test_a_moved_start_is_not_w(entry):
    witness = Witness("rsam").steps(2, entry)
    found = witness.optimizer.diagnostics()
    assert found["misclassified"] == witness.expected()["misclassified"]
    assert "loss" not in found


def test_other_outputs_than_class_logits():
    model, criterion = nn.Linear(6, 3), flatmin.Criterion(nn.MSELoss())
    optimizer = flatmin.wrap(BASES["sgd"](model.parameters()), "sam", criterion=criterion, diagnostics=True)
    x, _ = batch(0)

    def backward():
        loss = criterion(model(x), x[:, :3])
        loss.backward()
        return loss

    drive(optimizer, backward)
    assert set(optimizer.diagnostics()) == ALL - SAMPLES - {"ascent_cosine"}, "nothing to compare the first ascent with"


@pytest.mark.filterwarnings("ignore:weights in half precision")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_gradients_have_signs(dtype):
    """Entries around 1e-4, whose product float16 cannot hold."""
    w = nn.Parameter(torch.linspace(0.5, 1.5, 100).to(dtype))
    optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.1), "sam", rho=0.5, diagnostics=True)

    def backward():
        loss = (w.float() ** 2).sum() * 1e-4
        loss.backward()
        return loss

    drive(optimizer, backward)
    found = optimizer.diagnostics()
    assert found["same_sign"] == 1.0
    assert found["ratio_above_1"] + found["ratio_0_to_1"] == 1.0


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_recording_takes_every_gradient_that_a_step_takes(kind):
    if kind == "sparse":
        table = nn.Embedding(5, 3, sparse=True)
        weights, loss = list(table.parameters()), lambda: table(torch.tensor([1, 2, 2])).square().sum()
    else:
        w = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
        weights, loss = [w], lambda: w.abs().square().sum()
    for diagnostics in (False, True):
        optimizer = flatmin.wrap(torch.optim.SGD(weights, lr=0.1), "sam", diagnostics=diagnostics)

        def backward(loss=loss):
            found = loss()
            found.backward()
            return found

        drive(optimizer, backward)
    assert optimizer.diagnostics()["cosine"] == pytest.approx(1.0, abs=0.1)


# -- the switch ------------------------------------------------------------------------------------------------------


def test_off_by_default():
    model = noisy_net()
    optimizer = flatmin.wrap(BASES["sgd"](model.parameters()), "sam")
    with pytest.raises(RuntimeError, match="diagnostics=True"):
        optimizer.diagnostics()
    assert flatmin.wrap(BASES["sgd"](model.parameters()), "sam", diagnostics=True).diagnostics() == {}


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
@pytest.mark.parametrize("switch", [False, True])
def test_copies_keep_the_switch_and_record_for_themselves(switch, copied):
    model = nn.Linear(6, 3)
    optimizer = flatmin.SAM(BASES["sgd"](model.parameters()), diagnostics=switch)

    def backward(weights, scale):
        loss = sum((scale * w**2).sum() for w in weights)
        loss.backward()
        return loss

    drive(optimizer, lambda: backward(model.parameters(), 1.0))
    new = copy.deepcopy(optimizer) if copied == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    weights = [w for group in new.param_groups for w in group["params"]]
    if not switch:
        with pytest.raises(RuntimeError, match="diagnostics=True"):
            new.diagnostics()
        return
    before = optimizer.diagnostics()
    assert new.diagnostics() == {}
    drive(new, lambda: backward(weights, 3.0))
    assert new.diagnostics()["loss"] != before["loss"] and optimizer.diagnostics() == before


def test_an_update_without_end_leaves_the_numbers_readable():
    witness = Witness("sam").steps(2)
    before = witness.optimizer.diagnostics()
    passes = witness.optimizer.passes()
    with next(passes):
        witness.backward(3)
    assert witness.optimizer.diagnostics() == before
    with next(passes):
        witness.backward(3)
    assert witness.optimizer.diagnostics() == before
    witness.optimizer.step()
    assert witness.optimizer.diagnostics() != before


@pytest.mark.parametrize("method", ["sam", "asam", "gsam", "micro-sam", "looksam", "wsam", "esam", "n-step", "rsam"])
def test_recording_changes_no_bit(method):
    base = "adamw" if len(method) % 2 else "sgd"
    plain, recorded = (Session(method, base, diagnostics=on).run(range(6)) for on in (False, True))
    assert same_bits(recorded.model.state_dict(), plain.model.state_dict())
    assert same_bits(recorded.optimizer.base.state_dict()["state"], plain.optimizer.base.state_dict()["state"])
    assert recorded.optimizer.diagnostics()["weight_norm"] > 0


class Synchronisations(TorchDispatchMode):
    """Counts what would wait for an accelerator: reading a value, or a shape that depends on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.WAITS
        return func(*args, **(kwargs or {}))


class Mixed(nn.Module):
    """Weights of two dtypes: for them the engine has no shortcut of ordinary CPU tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3).double()

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)).double())


@pytest.mark.parametrize(
    ("method", "entry"),
    [
        *(("sam", "closure"), ("asam", "passes"), ("vasso", "passes"), ("gsam", "closure"), ("micro-sam", "closure")),
        *(("micro-sam", "passes"), ("n-step", "passes"), ("looksam", "closure"), ("sam-magnitude", "passes")),
    ],
)
def test_recording_does_not_synchronise_and_reading_does_once(method, entry, monkeypatch):
    model, criterion = Mixed(), flatmin.Criterion(nn.CrossEntropyLoss())
    base = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    optimizer = flatmin.wrap(base, recipe_of(method), criterion=criterion, diagnostics=True)
    as_on_device(optimizer, True)
    x, y = batch(0)

    def backward(chunk=0):
        loss = criterion(model(x[chunk:]), y[chunk:])
        optimizer.backward(loss)
        return loss

    def listed(tensor, original=torch.Tensor.tolist):
        counter.count += 1
        return original(tensor)

    drive(optimizer, backward, entry)  # a tensor's first state is decided on the host
    monkeypatch.setattr(torch.Tensor, "tolist", listed)
    with Synchronisations() as counter:
        for _ in range(5):
            drive(optimizer, backward, entry)
        assert counter.count == 0
        assert optimizer.diagnostics()["weight_norm"] > 0
        assert counter.count == 1
        float(x.sum())
        assert counter.count == 2
