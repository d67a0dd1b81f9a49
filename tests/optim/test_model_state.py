"""What else a forward changes advances once a step, and nothing is left on the model."""

import contextlib
import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

import flatmin
from tests.helpers import ENTRY_POINTS, sam_by_hand
from tests.optim.loops import OwnNorm, Recorder, one_step


class Contrast(nn.Module):
    """What forwards of published models change: queue, key encoder, codebook, power iterations, counters."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.old = nn.utils.spectral_norm(nn.Linear(4, 4))
        self.new = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.norm = OwnNorm()
        self.register_buffer("queue", torch.randn(4, 24))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.register_buffer("codebook", torch.randn(3, 4))
        self.scale, self.calls, self.lost = torch.ones(4), 0, []

    def forward(self, x):
        q = self.norm(self.new(self.old(self.query(x))))
        with torch.no_grad():
            for k, p in zip(self.key.parameters(), self.query.parameters(), strict=True):
                k.data = 0.9 * k.data + 0.1 * p.data  # facebookresearch/moco writes it so
            at = int(self.pointer)
            self.queue[:, at : at + len(x)] = self.key(x).T
            self.pointer[0] = (at + len(x)) % 24
            self.codebook = 0.9 * self.codebook + 0.1 * q.mean(0)
            self.scale.mul_(0.9)
        self.calls += 1
        return q + self.queue.mean() + self.codebook.sum() * self.scale

    def held(self):
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        return [
            *(v.clone() for n, v in self.state_dict().items() if n not in trained),
            self.scale.clone(),
            torch.tensor(self.calls),
        ]


@pytest.mark.parametrize("method", ["sam", "n-step"])
@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_whatever_a_forward_changes_advances_once_a_step(entry, method):
    """facebookresearch/moco and others whose forward moves more than BatchNorm statistics."""
    if method == "n-step" and entry in ("perturbed", "two calls"):
        pytest.skip("not a step of two passes")
    torch.manual_seed(0)
    model = Contrast()
    single = copy.deepcopy(model)
    opt = flatmin.wrap(torch.optim.SGD(model.parameters(), lr=0.0), method, rho=0.5, model=model)
    for _ in range(3):
        x = torch.randn(6, 4)
        single(x)
        one_step(model, opt, x, entry)
        assert all(torch.equal(a, b) for a, b in zip(model.held(), single.held(), strict=True))
    opt = flatmin.wrap(torch.optim.SGD(model.parameters(), lr=0.0), method, model=model, freeze_state=False)
    one_step(model, opt, torch.randn(6, 4), entry)
    assert model.calls > single.calls + 1


class Moving(nn.Linear):
    """Changes its state as `change` says."""

    def __init__(self, change):
        super().__init__(4, 1)
        self.register_buffer("slow", torch.zeros(1))
        self.register_buffer("later", None)
        self.target = nn.Parameter(torch.zeros(1))
        self.change, self.count = change, [0]

    def forward(self, x):
        self.count[0] += 1
        self.change(self, self.count[0])
        return super().forward(x)


@torch.no_grad()
def silently(m, count):
    m.slow.data += 1  # as averages and codebooks are often written; no version counter shows it


@torch.no_grad()
def averages(m, count):
    m.target += 1  # a target network that nobody has frozen


def anew(m, count):
    m.later = torch.zeros(1) if m.later is None else m.later + 1
    m.made = getattr(m, "made", 0) + 1


@pytest.mark.parametrize(
    ("change", "read"),
    [
        (silently, lambda m: m.slow),
        (averages, lambda m: m.target),
        (anew, lambda m: m.later + 1),
        (anew, lambda m: m.made),
    ],
)
def test_state_of_any_kind_advances_once(change, read):
    """.data, unfrozen targets, buffers and attributes that the first forward makes."""
    for entry in ENTRY_POINTS:
        model = Moving(change)
        opt = flatmin.SAM(torch.optim.SGD([model.weight, model.bias], lr=0.1), model=model)
        for _ in range(6):
            one_step(model, opt, torch.randn(8, 4), entry)
        assert int(read(model)) == 6


def test_what_only_a_second_forward_changes_is_put_back_and_what_the_loop_changes_stays():
    model = Moving(lambda m, count: m.slow.add_(1) if count % 2 == 0 and count > 10 else None)
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    model.beta = 0.0
    for k in range(8):
        x = torch.randn(8, 4)
        model(x).square().mean().backward()
        unforeseen = pytest.warns(
            UserWarning, match="slow changed in the second forward of a step but not in the first"
        )
        with unforeseen if k == 5 else contextlib.nullcontext(), opt.perturbed():
            model(x).square().mean().backward()
            model.beta += 0.5
        opt.step()
        opt.zero_grad()
    assert (int(model.slow), model.beta) == (1, 4.0)


class Flat(nn.Module):
    """Its weights are views of one buffer, and it keeps what it has computed."""

    def __init__(self):
        super().__init__()
        self.lin, self.features = nn.Linear(4, 3), None
        self.register_buffer("flat", torch.cat([p.detach().flatten() for p in self.lin.parameters()]))
        self.lin.weight.data, self.lin.bias.data = self.flat[:12].view(3, 4), self.flat[12:]

    def forward(self, x):
        self.features = self.lin(x)
        return self.features


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_state_that_is_a_view_of_the_weights_is_left_to_them(entry):
    torch.manual_seed(0)
    model, twin = Flat(), nn.Linear(4, 3)
    twin.load_state_dict(model.lin.state_dict())
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
    base = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(8, 4)
        one_step(model, opt, x, entry)
        sam_by_hand(twin.parameters(), 0.3, lambda x=x: twin(x).square().mean().backward(), base)
    torch.testing.assert_close(model.flat[:12].view(3, 4), twin.weight.detach())


def test_what_the_loop_writes_between_the_calls_stays():
    """A target that the loop averages through `.data`, and a head whose own optimizer steps so."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    model.register_buffer("target", torch.zeros(3))
    opt = flatmin.SAM(torch.optim.SGD(model[0].parameters(), lr=0.0), rho=0.3, model=model)
    head, x = model[1].weight.detach().clone(), torch.randn(8, 4)
    for _ in range(5):
        model(x).square().mean().backward()
        opt.first_step()
        model(x).square().mean().backward()
        model.target.data.add_(1)
        model[1].weight.data.add_(1)
        opt.second_step(zero_grad=True)
    assert torch.equal(model.target, torch.full((3,), 5.0))
    torch.testing.assert_close(model[1].weight.detach(), head + 5)


def test_layers_that_are_replaced_are_followed():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    opt = flatmin.SAM(torch.optim.SGD(model[0].parameters(), lr=0.1), model=model)
    for k in range(4):
        if k in (0, 2):
            model[1] = nn.BatchNorm1d(4)  # as `convert_sync_batchnorm` and quantisation do
        one_step(model, opt, torch.randn(8, 4), ENTRY_POINTS[k])
    assert int(model[1].num_batches_tracked) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_with_a_way_of_their_own_run_their_own_weights(copied):
    """LightningModule, DistributedDataParallel and GraphModule copy their attributes themselves."""

    class Own(nn.Linear):
        def __getstate__(self):
            return dict(self.__dict__)

        def __reduce__(self):
            return _made, (dict(self.__dict__),)

    def run(m):
        m._parameters = {"weight": torch.zeros(1, 4), "bias": torch.ones(1)}
        return m(torch.randn(2, 4))

    global _made
    _made = lambda state: (m := Own(4, 1), m.__dict__.update(state))[0]  # noqa: E731
    _made.__qualname__ = "_made"
    model = Own(4, 1)
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    assert torch.equal(run(copied(model)), torch.ones(2, 1)) and opt.model is model


def test_copies_of_the_model_are_not_watched_and_pairs_stay_paired():
    torch.manual_seed(0)
    model = Recorder()
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    ema = copy.deepcopy(model)
    assert not ema._forward_pre_hooks and pickle.loads(pickle.dumps(model)).__dict__.keys() == ema.__dict__.keys()
    for pair in (copy.deepcopy((model, opt)), copy.deepcopy((opt, model))[::-1]):
        twin, twin_opt = pair
        assert twin_opt.model is twin and twin_opt.param_groups[0]["params"][0] is twin.lin.weight
        twin.masks.clear()
        one_step(twin, twin_opt, torch.randn(64, 4), "perturbed")
        assert torch.equal(*twin.masks)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_nothing_is_left_on_a_model_and_it_can_be_exported_while_it_is_trained():
    """pytorch/pytorch#53421; federated rounds make an optimizer per round and client."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(8, 4)
    before = [set(m.__dict__) for m in model.modules()]
    for _ in range(50):
        opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    one_step(model, opt, x, "perturbed")
    model.eval()
    file = io.BytesIO()
    torch.save(model, file)
    assert b"flatmin" not in file.getvalue()
    exports = [torch.jit.script(model), torch.jit.trace(model, x), torch.export.export(model, (x,)).module()]
    for out in (*exports, copy.deepcopy(model), torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        torch.testing.assert_close(out(x), model(x))
    del opt
    gc.collect()
    assert [set(m.__dict__) - {"__overloads__"} for m in model.modules()] == before  # that is torch.jit.script's
