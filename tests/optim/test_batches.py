"""The passes of a step see one batch; a loop that does otherwise is told."""

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import flatmin
from flatmin.optim.containers import leaves
from tests.helpers import batch
from tests.optim.loops import one_step


@pytest.mark.parametrize("entry", ["closure", "perturbed"])
def test_a_different_batch_in_pass_2_is_noticed(entry):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, replay_rng=False)
    batches = iter([torch.randn(8, 4), torch.randn(8, 4)])

    def closure():
        opt.zero_grad()
        loss = model(next(batches)).sum()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="used different batches"):
        if entry == "closure":
            opt.step(closure)
        else:
            closure()
            with opt.perturbed():
                closure()


@pytest.mark.parametrize("through", [lambda x: x, lambda x: x[slice(None)]], ids=["itself", "view"])
def test_a_model_that_overwrites_its_input_is_noticed(through):
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x.sub_(1))

    model, x = Centred(4, 1), torch.randn(8, 4)
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)

    def closure():
        opt.zero_grad()
        loss = model(through(x)).sum()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="used different batches"):
        opt.step(closure)


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
        UserWarning, match=r"drops the gradients that were there before it.*list of closures, or use passes"
    ) as caught:
        optimizer.step(closure)
    assert [w.filename for w in caught] == [__file__]
    backward(1)
    optimizer.step(closure)


def test_a_forward_too_many_in_the_first_pass_is_said():
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    x = torch.randn(8, 4)
    model(x)
    model(x).square().mean().backward()
    with (
        pytest.warns(UserWarning, match="the model ran 2 times before the weights were perturbed") as caught,
        opt.perturbed(),
    ):
        model(x).square().mean().backward()
    assert [w.filename for w in caught] == [__file__]


@dataclasses.dataclass
class Batch:
    x: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [lambda x: {"a": x}, lambda x: [x, "text"], lambda x: (1, (x,)), Batch, lambda x: SimpleNamespace(x=x)],
    ids=["dict", "list", "tuple", "dataclass", "object"],
)
def test_a_different_batch_is_noticed_in_any_container(wrap):
    class Any(nn.Linear):
        def forward(self, batch):
            (x,) = leaves(batch)
            return super().forward(x)

    model = Any(4, 1)
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    x = torch.randn(64, 4)
    one_step(model, opt, wrap(x), "perturbed")
    other = x.clone()
    other[37, 2] += 1

    def step(second):
        model(wrap(x)).sum().backward()
        with opt.perturbed():
            model(wrap(second)).sum().backward()
        opt.step()

    step(x.clone())
    with pytest.warns(UserWarning, match="used different batches; run the second pass on the batch of the first"):
        step(other)


def test_accumulation_that_leaves_micro_batches_out_of_the_second_pass_is_said():
    model = nn.Linear(4, 1)
    for given in (model, None):
        opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=given)
        parts = torch.randn(2, 8, 4)
        for x in parts:
            model(x).square().mean().backward()
        with pytest.warns(UserWarning, match="added up or changed 1 times.*run all of them in"), opt.perturbed():
            model(parts[1]).square().mean().backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize(
    "form", [lambda x: {"loss": x, "n": 3}, lambda x: (x, "note"), lambda x: SimpleNamespace(loss=x)]
)
def test_what_a_closure_returns_comes_back_without_graphs(form):
    model, graphs = nn.Linear(4, 1), []
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1))

    def closure():
        opt.zero_grad()
        assert all(graph() is None for graph in graphs), "a graph outlives its pass"
        loss = model(torch.ones(2, 4)).square().mean()
        graphs.append(weakref.ref(loss))
        loss.backward()
        return form(loss)

    first = opt.step(closure)
    loss = first["loss"] if isinstance(first, dict) else first[0] if isinstance(first, tuple) else first.loss
    assert type(first) is type(form(loss)) and (isinstance(first, SimpleNamespace) or not loss.requires_grad)
    if not isinstance(first, SimpleNamespace):
        mean = opt.step([closure, closure])
        assert mean.ndim == 0 and not mean.requires_grad


@pytest.mark.parametrize("kept", [False, True])
def test_a_loss_cached_before_the_step_is_named(kept):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    loss = model(torch.ones(2, 4)).square().mean()

    def closure():
        loss.backward(retain_graph=kept)
        return loss

    with pytest.raises(RuntimeError, match="the loss was cached"):
        opt.step(closure)
