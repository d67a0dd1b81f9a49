import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev
from torch.nn import functional as F

from flatmin.measure.operators import Hessian, evaluating


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(n=23):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def dense(model, x, y):
    """The Hessian by torch.func, of the loss over all data at once."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def loss(w):
        parts = w.split([s.numel() for s in shapes])
        given = {name: part.view(s) for name, part, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, given, (x,)), y)

    return jacrev(grad(loss))(flat)


@pytest.mark.parametrize("keep_graph", [True, False])
@pytest.mark.parametrize("size", [23, 10, 9, 1])
def test_equals_the_dense_hessian_with_an_uneven_last_batch(keep_graph, size):
    model, (x, y) = net(), data()
    operator = Hessian(
        model, F.cross_entropy, list(zip(x.split(size), y.split(size), strict=True)), keep_graph=keep_graph
    )
    columns = [operator.matvec(e) for e in torch.eye(operator.size, dtype=torch.float64)]
    torch.testing.assert_close(torch.stack(columns, 1), dense(model, x, y), rtol=0, atol=1e-12)
    assert operator.products == operator.size


def test_a_subset_of_the_parameters():
    model, (x, y) = net(), data()
    last = list(model[2].parameters())
    operator = Hessian(model, F.cross_entropy, [(x, y)], params=last)
    block = dense(model, x, y)[-operator.size :, -operator.size :]
    v = torch.randn(operator.size, dtype=torch.float64)
    torch.testing.assert_close(operator.matvec(v), block @ v, rtol=0, atol=1e-12)


def test_parameters_that_the_loss_does_not_reach_or_reaches_linearly():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(2, 2)}).double()

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner["used"](x)

    x, _ = data()
    linear = Hessian(Wrapper(), lambda out, y: out.mean(), [(x, torch.zeros(len(x)))])
    assert not linear.matvec(torch.ones(linear.size, dtype=torch.float64)).any()


class Moody(nn.Module):
    """Changes a buffer in every forward pass and fails on demand."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.fail = False

    def forward(self, x):
        self.calls += 1
        if self.fail:
            raise OSError("no")
        return self.drop(self.norm(self.linear(x)))


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("keep_graph", [True, False])
def test_flags_buffers_and_gradients_are_put_back(fail, keep_graph):
    model = Moody().double()
    model.norm.eval()  # a flag of its own must survive
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    model.fail = fail
    try:
        operator = Hessian(model, F.cross_entropy, [(x, y)], keep_graph=keep_graph)
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))
        assert not fail
    except OSError:
        assert fail
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_evaluating_switches_and_restores():
    model = Moody()
    with evaluating(model):
        assert not model.training
    assert model.training


def test_works_inside_no_grad():
    model, (x, y) = net(), data()
    with torch.no_grad():
        operator = Hessian(model, F.cross_entropy, [(x, y)])
    assert operator.matvec(torch.ones(operator.size, dtype=torch.float64)).any()


def test_bad_input():
    model, (x, y) = net(), data()
    with pytest.raises(ValueError, match="at least one batch"):
        Hessian(model, F.cross_entropy, [])
    with pytest.raises(ValueError, match="no parameter"):
        Hessian(model, F.cross_entropy, [(x, y)], params=[])
    with pytest.raises(ValueError, match=r"mean over a batch, got shape \(23,\)"):
        Hessian(model, lambda out, t: F.cross_entropy(out, t, reduction="none"), [(x, y)])
    with pytest.raises(ValueError, match="vectors of shape"):
        Hessian(model, F.cross_entropy, [(x, y)]).matvec(torch.ones(3))
