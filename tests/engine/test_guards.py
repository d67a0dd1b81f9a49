"""BatchNorm statistics, dropout masks and the batch are the same for all passes of a step."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn

import flatmin
from flatmin.engine.guards import FrozenStatistics
from tests.helpers import batch

DOORS = ["closure", "perturbed", "two calls", "passes"]


class OwnNorm(nn.Module):
    """A normalisation layer that torch does not know."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.running_mean.mul_(0.9).add_(0.1 * x.detach().mean(tuple(i for i in range(x.ndim) if i != 1)))
        return x - self.running_mean.view(1, -1, *[1] * (x.ndim - 2))


def layers():
    return {
        "BatchNorm1d": (nn.BatchNorm1d(4), (8, 4)),
        "BatchNorm2d": (nn.BatchNorm2d(4), (8, 4, 3, 3)),
        "momentum=None": (nn.BatchNorm1d(4, momentum=None), (8, 4)),
        "InstanceNorm": (nn.InstanceNorm1d(4, track_running_stats=True, affine=True), (8, 4, 5)),
        "own": (OwnNorm(), (8, 4)),
    }


def one_step(model, opt, x, door, fail_in_second=False):
    def backward():
        loss = model(x).square().mean()
        loss.backward()
        return loss

    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        opt.zero_grad()
        loss = backward()
        if calls == 2 and fail_in_second:
            raise KeyError("planned")
        return loss

    if door == "closure":
        opt.step(closure)
    elif door == "perturbed":
        opt.zero_grad()
        backward()
        with opt.perturbed():
            backward()
            if fail_in_second:
                raise KeyError("planned")
        opt.step()
    elif door == "two calls":
        backward()
        opt.first_step(zero_grad=True)
        backward()
        opt.second_step(zero_grad=True)
    else:
        for evaluation in opt.passes():
            with evaluation:
                backward()
                if fail_in_second and evaluation.index == 1:
                    raise KeyError("planned")
        opt.step()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", layers())
def test_statistics_are_touched_by_the_first_pass_only(name, door):
    torch.manual_seed(0)
    layer, shape = layers()[name]
    model = nn.Sequential(
        nn.Conv1d(4, 4, 1) if len(shape) == 3 else nn.Identity(), layer, nn.Flatten(), nn.LazyLinear(2)
    )
    model(torch.randn(shape))
    single = copy.deepcopy(model)
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    for _ in range(3):
        x = torch.randn(shape)
        single.load_state_dict(model.state_dict())
        single(x)
        one_step(model, opt, x, door)
        for (k, a), b in zip(model.named_buffers(), single.buffers(), strict=True):
            assert torch.equal(a, b), k


def test_without_the_guard_they_are_touched_twice():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, freeze_batchnorm=False)
    one_step(model, opt, torch.randn(8, 4), "closure")
    assert int(model[1].num_batches_tracked) == 2


@pytest.mark.parametrize("door", ["closure", "perturbed", "passes"])
def test_an_exception_in_pass_2_leaves_weights_and_layers_usable(door):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError, match="planned"):
        one_step(model, opt, torch.randn(8, 4), door, fail_in_second=True)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model[1].track_running_stats and int(model[1].num_batches_tracked) == 1
    one_step(model, opt, torch.randn(8, 4), door)
    assert int(model[1].num_batches_tracked) == 2


def test_freezing_nests_in_any_order_and_leaves_no_trace():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True))
    keys = [set(m.__dict__) for m in model]
    a, b = FrozenStatistics(model), FrozenStatistics(model)
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    model(torch.randn(8, 4, 3))
    assert int(model[0].num_batches_tracked) == 0
    b.__exit__(None, None, None)
    assert [set(m.__dict__) for m in model] == keys
    model(torch.randn(8, 4, 3))
    assert int(model[0].num_batches_tracked) == 1 and bool(model[1].running_mean.any())


def test_frozen_layers_in_eval_mode_still_use_their_statistics():
    layer = nn.BatchNorm1d(4)
    layer.running_mean.fill_(3.0)
    layer.eval()
    x = torch.randn(8, 4)
    want = layer(x)
    with FrozenStatistics(layer):
        assert torch.equal(layer(x), want)


class Recorder(nn.Module):
    """Dropout that remembers its masks."""

    def __init__(self):
        super().__init__()
        self.lin, self.masks = nn.Linear(4, 4), []

    def forward(self, x):
        mask = (torch.rand_like(x) > 0.5).float()
        if torch.is_grad_enabled() and self.training:
            self.masks.append(mask)
        return self.lin(x * mask)


@pytest.mark.parametrize("door", DOORS)
def test_both_passes_draw_the_same_mask_and_the_stream_goes_on(door):
    torch.manual_seed(0)
    model = Recorder()
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    for _ in range(3):
        torch.rand(5)  # a data loader draws between the steps
        one_step(model, opt, torch.randn(64, 4), door)
    pairs = list(zip(model.masks[::2], model.masks[1::2], strict=True))
    assert len(pairs) == 3 and all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(pairs[0][0], pairs[1][0])


def test_replay_can_be_switched_off():
    torch.manual_seed(0)
    model = Recorder()
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, replay_rng=False)
    one_step(model, opt, torch.randn(64, 4), "closure")
    assert not torch.equal(*model.masks)


def test_an_evaluation_between_the_passes_does_not_disturb_the_mask():
    torch.manual_seed(0)
    model = Recorder()
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    x = torch.randn(64, 4)
    model(x).sum().backward()
    with opt.perturbed():
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()
        model(x).sum().backward()
    opt.step()
    assert torch.equal(*model.masks)


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


@pytest.mark.parametrize("door", ["closure", "perturbed"])
def test_a_different_batch_in_pass_2_is_noticed(door):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, replay_rng=False)
    batches = iter([torch.randn(8, 4), torch.randn(8, 4)])

    def closure():
        opt.zero_grad()
        loss = model(next(batches)).sum()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="saw different batches"):
        if door == "closure":
            opt.step(closure)
        else:
            closure()
            with opt.perturbed():
                closure()


def test_a_loss_cached_before_pass_2_is_refused():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    before = model.weight.detach().clone()
    loss = model(torch.randn(8, 4)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="detached or cached"), opt.perturbed():
        loss.backward()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("pass_compiled", [True, False])
def test_a_compiled_model_does_not_recompile_across_steps(pass_compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiles = 0

    def backend(graph, inputs):
        nonlocal compiles
        compiles += 1
        return graph.forward

    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    opt = flatmin.SAM(torch.optim.SGD(net.parameters(), lr=0.1), model=compiled if pass_compiled else net)
    for k in range(8):
        # Inside a compiled net no forward is seen: masks of a manual loop differ, and that is said.
        unseen = not pass_compiled and k == 1
        with pytest.warns(UserWarning, match="outside a call of model=") if unseen else contextlib.nullcontext():
            one_step(compiled, opt, torch.randn(16, 4), DOORS[k % 4])
        if k == 3:
            warm = compiles
    assert compiles == warm <= 4
    assert int(net[1].num_batches_tracked) == 8


def test_gradients_that_a_closure_drops_are_warned_about_once():
    """A loop that accumulates over batches and ends with step(closure) would train on the last one only."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = flatmin.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "sam", model=model)

    def backward(k):
        loss = nn.functional.cross_entropy(model(batch(k)[0]), batch(k)[1])
        loss.backward()
        return loss

    def closure():
        optimizer.zero_grad()
        return backward(2)

    optimizer.step(closure)
    model(batch(0)[0])  # a forward without gradients is nobody's loss
    optimizer.step(closure)
    optimizer.zero_grad()
    backward(0)
    with pytest.warns(
        UserWarning, match=r"drops the gradients of the forward before it.*list of closures, or use passes"
    ):
        optimizer.step(closure)
    backward(1)
    optimizer.step(closure)
