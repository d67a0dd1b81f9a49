"""Products with second derivatives equal dense matrices, whatever the loop; nothing of the graph outlives the step."""

import dataclasses
import gc
import math
import weakref
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn

import flatmin
from flatmin.methods import Combine, Need, NoAscent, OneStep, Recipe
from flatmin.optim.criterion import Seen
from flatmin.optim.second_order import GraphProducts, PooledProducts
from tests.helpers import batch

TOLERANCE = 1e-10
LOSSES = {
    "entropy": lambda: nn.CrossEntropyLoss(label_smoothing=0.2),
    "mse": nn.MSELoss,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(Combine):
    """Writes into `log` what the product makes of `z`, for the tensors that it is given; hands on the gradient."""

    ascends: ClassVar[bool] = False
    product: str = "hessian"
    limit: int = 100
    every: int = 1
    log: list = dataclasses.field(default_factory=list, repr=False, compare=False)

    def demands(self):
        more = {"gauss_newton": {Need.CRITERION}, "squared_gradients": {Need.PER_SAMPLE}}.get(self.product, set())
        return frozenset({Need.SECOND_ORDER, *more})

    def graph(self, state, c):
        return c.step % self.every == 0

    def __call__(self, g, gs, state, c):
        if c.curvature is None:
            self.log.append(None)
        elif self.product == "squared_gradients":
            self.log.append(c.curvature.squared_gradients(self.limit))
        else:
            self.log.append(getattr(c.curvature, self.product)(vectors(c.w)))
        return gs[0], {}


def vectors(weights):
    """The same z for tensors of the same shape, in the library and in the reference."""
    return [torch.linspace(-1.0, 2.0, w.numel(), dtype=w.dtype).view_as(w).contiguous() for w in weights]


def net(*, inner=nn.Tanh, unused=False, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 4), inner(), nn.Linear(4, 3)).double()
    if unused:
        model.extra = nn.Linear(2, 2).double()
        model.forward = lambda x: model[2](model[1](model[0](x)))
    return model


def data(k=0, loss="entropy"):
    x, y = batch(k, dtype=torch.float64)
    return x, (torch.randn(8, 3, generator=torch.Generator().manual_seed(k), dtype=x.dtype) if loss == "mse" else y)


class Flat:
    """A model's loss and outputs as functions of one flat vector."""

    def __init__(self, model, criterion, x, y):
        named = [(n, p) for n, p in model.named_parameters() if "extra" not in n]
        self.names, tensors = zip(*named, strict=True)
        self.shapes = [t.shape for t in tensors]
        self.w = torch.cat([t.detach().flatten() for t in tensors])
        self.z = torch.cat([z.flatten() for z in vectors([t.detach() for t in tensors])])
        self.model, self.criterion, self.x, self.y = model, criterion, x, y

    def outputs(self, w, x=None):
        parts = w.split([math.prod(s) for s in self.shapes])
        named = {n: p.view(s) for n, p, s in zip(self.names, parts, self.shapes, strict=True)}
        return torch.func.functional_call(self.model, named, (self.x if x is None else x,))

    def loss(self, w):
        return self.criterion(self.outputs(w), self.y)

    def hessian(self):
        return torch.autograd.functional.hessian(self.loss, self.w)

    def gauss_newton(self):
        out = self.outputs(self.w).detach()
        j = torch.autograd.functional.jacobian(lambda w: self.outputs(w).flatten(), self.w)
        h = torch.autograd.functional.hessian(lambda o: self.criterion(o.view_as(out), self.y), out.flatten())
        return j.T @ h @ j

    def squared_gradients(self, limit):
        total = torch.zeros_like(self.w)
        for x, y in list(zip(self.x, self.y, strict=True))[:limit]:

            def one(w, x=x, y=y):
                return self.criterion(self.outputs(w, x[None]), y[None])

            total += torch.autograd.functional.jacobian(one, self.w) ** 2
        return total


def build(model, product="hessian", loss="entropy", rho=0.05, inner_loop=None, **probe):
    criterion = flatmin.Criterion(LOSSES[loss]() if isinstance(loss, str) else loss)
    recipe = Recipe(inner_loop=inner_loop or NoAscent(), combine=Probe(product=product, **probe), name="probe")
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return flatmin.wrap(base, recipe, rho=rho, model=model, criterion=criterion), criterion, recipe.combine.log


def update(optimizer, criterion, model, batches, entry="closure"):
    """OneStep update; several batches are micro-batches."""

    def backward(i):
        x, y = batches[i]
        loss = criterion(model(x), y)
        optimizer.backward(loss)
        return loss

    if entry == "closure":

        def closure(i):
            optimizer.zero_grad()
            return backward(i)

        listed = [partial(closure, i) for i in range(len(batches))]
        return optimizer.step(listed if len(batches) > 1 else listed[0])
    for evaluation in optimizer.passes():
        with evaluation:
            backward(0)
    optimizer.step()
    return None


def joined(tensors):
    return torch.cat([t.flatten() for t in tensors])


def close(got, want, tolerance=TOLERANCE):
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("inner", [nn.Tanh, nn.ReLU, nn.Identity])
@pytest.mark.parametrize("product", ["hessian", "gauss_newton"])
def test_products_are_those_of_the_dense_matrix(product, inner, loss):
    """On two steps in a row, so that nothing of the first is left in the second."""
    entry = "passes" if (inner is nn.Tanh) == (product == "hessian") else "closure"
    model = net(inner=inner)
    optimizer, criterion, log = build(model, product, loss)
    for k in range(2):
        x, y = data(k, loss)
        dense = Flat(model, LOSSES[loss](), x, y)
        update(optimizer, criterion, model, [(x, y)], entry)
        matrix = dense.hessian() if product == "hessian" else dense.gauss_newton()
        assert float(matrix.abs().max()) > 1e-3
        close(joined(log[k]), matrix @ dense.z)
        assert all(not t.requires_grad for t in log[k])


def test_both_matrices_are_one_on_a_linear_net():
    for make, same in ((lambda: nn.Sequential(nn.Linear(6, 3)).double(), True), (net, False)):
        found = []
        for product in ("hessian", "gauss_newton"):
            torch.manual_seed(3)
            model = make()
            optimizer, criterion, log = build(model, product)
            update(optimizer, criterion, model, [data()])
            found.append(joined(log[0]))
        far = float((found[0] - found[1]).abs().max())
        assert far < 1e-12 if same else far > 1e-3


@pytest.mark.parametrize("limit", [1, 3, 8, 100])
@pytest.mark.parametrize("loss", LOSSES)
def test_squared_gradients_are_a_loop_over_samples(loss, limit):
    model = net()
    x, y = data(0, loss)
    dense = Flat(model, LOSSES[loss](), x, y)
    want = dense.squared_gradients(limit)
    optimizer, criterion, log = build(model, "squared_gradients", loss, limit=limit)
    update(optimizer, criterion, model, [(x, y)])
    close(joined(log[0]), want)


@pytest.mark.parametrize("product", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("count", [2, 3])
def test_products_of_micro_batches_are_averaged(product, count):
    model = net()
    batches = [data(k) for k in range(count)]
    dense = [Flat(model, LOSSES["entropy"](), *b) for b in batches]
    matrix = sum(getattr(d, product)() for d in dense) / count
    optimizer, criterion, log = build(model, product)
    update(optimizer, criterion, model, batches)
    close(joined(log[0]), matrix @ dense[0].z)


def test_squared_gradients_of_micro_batches_are_summed():
    """The first samples up to the limit, micro-batch by micro-batch; a batch has eight."""
    model = net()
    batches = [data(k) for k in range(3)]
    want = sum(Flat(model, LOSSES["entropy"](), *b).squared_gradients(n) for b, n in zip(batches, (8, 3), strict=False))
    optimizer, criterion, log = build(model, "squared_gradients", limit=11)
    update(optimizer, criterion, model, batches)
    close(joined(log[0]), want)


def test_losses_of_one_pass_add_up():
    """Gradient accumulation inside a pass: two halves of the loss have the sum of both gradients and Hessians."""
    model = net()
    optimizer, criterion, log = build(model)
    x, y = data()
    dense = Flat(model, LOSSES["entropy"](), x, y)
    want = dense.hessian() @ dense.z

    def closure():
        optimizer.zero_grad()
        for half in (slice(0, 4), slice(4, 8)):
            loss = criterion(model(x[half]), y[half]) / 2
            optimizer.backward(loss)
        return loss

    optimizer.step(closure)
    close(joined(log[0]), want)


# -- where there is nothing to differentiate -------------------------------------------------------------------------


@pytest.mark.parametrize("product", ["hessian", "gauss_newton", "squared_gradients"])
def test_weights_without_gradient_stay_out(product):
    model = net(unused=True)
    x, y = data()
    dense = Flat(model, LOSSES["entropy"](), x, y)
    want = dense.squared_gradients(8) if product == "squared_gradients" else getattr(dense, product)() @ dense.z
    extra = [p.clone() for p in model.extra.parameters()]
    optimizer, criterion, log = build(model, product)
    update(optimizer, criterion, model, [(x, y)])
    close(joined(log[0]), want)
    assert all(map(torch.equal, extra, model.extra.parameters()))
    assert all(p.grad is None for p in model.extra.parameters())


@pytest.mark.parametrize("product", ["hessian", "gauss_newton", "squared_gradients"])
def test_products_asked_for_weights_without_gradient_are_zero(product):
    model = net(unused=True)
    weights = list(model.parameters())
    x, y = data()
    outputs = model(x)
    scores = nn.functional.cross_entropy(outputs, y, reduction="none")
    grads = torch.autograd.grad(scores.mean(), weights, create_graph=True, allow_unused=True)
    assert [g is None for g in grads] == [False] * 4 + [True] * 2
    products = PooledProducts([(0.5, GraphProducts(weights, grads, [Seen(outputs, scores.mean(), scores)]))] * 2)
    index = [5, 2, 4, 0]
    argument = 8 if product == "squared_gradients" else vectors([weights[i] for i in index])
    found = getattr(products, product)(index, argument)
    assert [f.shape for f in found] == [weights[i].shape for i in index]
    assert [bool(f.any()) for f in found] == [False, True, False, True]


@pytest.mark.parametrize("product", ["hessian", "gauss_newton"])
def test_a_weight_used_by_one_micro_batch_only(product):
    model = net()
    model.switch = nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))
    batches = [data(0), data(1)]
    model.forward = lambda x: model[2](model[1](model[0](x))) + (model.switch**2 if x is batches[1][0] else 0.0)
    dense = [Flat(model, LOSSES["entropy"](), *b) for b in batches]
    want = sum(getattr(d, product)() for d in dense) / 2 @ dense[0].z
    optimizer, criterion, log = build(model, product)
    update(optimizer, criterion, model, batches)
    close(joined(log[0]), want)
    assert float(log[0][0].abs().max()) > 1e-3  # the first parameter is the switch


def linear_loss(outputs, target):
    return (outputs * torch.arange(3.0)).mean()


@pytest.mark.parametrize("product", ["hessian", "gauss_newton"])
@pytest.mark.parametrize(
    ("model", "loss", "empty"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 3)), linear_loss, ("hessian", "gauss_newton")),
        (lambda: net(inner=nn.ReLU), linear_loss, ("gauss_newton",)),
        (lambda: net(inner=nn.Tanh), linear_loss, ("gauss_newton",)),
        (lambda: net(inner=nn.ReLU), nn.L1Loss(), ("gauss_newton",)),
    ],
    ids=["linear", "relu", "tanh", "l1"],
)
def test_blocks_that_vanish_are_zero(model, loss, empty, product):
    model = model().double()
    x, y = data(0, "mse")
    dense = Flat(model, loss, x, y)
    want = torch.autograd.functional.hessian(dense.loss, dense.w) @ dense.z if product == "hessian" else 0 * dense.z
    optimizer, criterion, log = build(model, product, loss)
    update(optimizer, criterion, model, [(x, y)])
    close(joined(log[0]), want)
    assert bool(want.any()) is (product not in empty)


@pytest.mark.parametrize("name", ["sgdhess", "eigen-sam"])
def test_an_operation_without_second_derivatives_is_named_with_what_to_do(name):
    w = nn.Parameter(torch.randn(1, 1, 4, 8))
    optimizer = flatmin.wrap(torch.optim.SGD([w], lr=0.1), name, rho=0.05)
    before = w.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.scaled_dot_product_attention(w, w, w).square().sum()
        optimizer.backward(loss)
        return loss

    with pytest.raises(RuntimeError, match=r"has no second derivative \(.*attention.*sdpa_kernel\(SDPBackend.MATH\)"):
        optimizer.step(closure)
    assert torch.equal(w, before)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        optimizer.step(closure)
    assert not torch.equal(w, before)


def test_eigen_sam_climbs_no_noise_where_a_weight_joins_between_power_iterations():
    """Its first gradient comes on step 1, the next refresh on step 100."""
    first, late = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(50, 100))
    base = torch.optim.SGD([first, late], lr=0.01)
    optimizer = flatmin.wrap(base, "eigen-sam", rho=0.05, diagnostics=True)
    for k in range(3):

        def closure(k=k):
            optimizer.zero_grad()
            loss = first.pow(4).sum() + (late.pow(4).sum() if k else 0.0)
            optimizer.backward(loss)
            return loss

        optimizer.step(closure)
        assert optimizer.diagnostics()["epsilon_norm"] <= 0.05 * math.sqrt(1 + 0.2**2) * (1 + 1e-5)


def test_products_away_from_w_are_refused():
    with pytest.raises(
        ValueError, match=r"needs a step that does not perturb the weights.*OneStep.*it perturbs the weights"
    ):
        build(net(), inner_loop=OneStep())


# -- nothing is kept -------------------------------------------------------------------------------------------------


def recorded(model, criterion, x, y, call, kept, *, fails=False):
    outputs = model(x)
    loss = criterion(outputs, y)
    kept += [weakref.ref(outputs), weakref.ref(loss)]
    call(loss)
    if fails:
        raise KeyError
    return loss


@pytest.mark.parametrize(
    ("product", "diagnostics"), [("hessian", True), ("gauss_newton", False), ("squared_gradients", True)]
)
@pytest.mark.parametrize("entry", ["closure", "micro-batches", "passes", "no graph", "abort"])
def test_no_graph_outlives_the_step(entry, product, diagnostics):
    model, kept = net(), []
    every = 2 if entry == "no graph" else 1
    recipe = Recipe(inner_loop=NoAscent(), combine=Probe(product=product, every=every), name="probe")
    criterion = flatmin.Criterion(nn.CrossEntropyLoss())
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = flatmin.wrap(base, recipe, model=model, criterion=criterion, diagnostics=diagnostics)
    x, y = data()
    one = partial(recorded, model, criterion, x, y, optimizer.backward, kept, fails=entry == "abort")
    gc.disable()
    try:
        for _ in range(2):
            optimizer.zero_grad()
            if entry == "passes":
                for evaluation in optimizer.passes():
                    with evaluation:
                        one()
                optimizer.step()
            elif entry == "abort":
                with pytest.raises(KeyError):
                    optimizer.step(one)
            else:
                returned = optimizer.step([one, one] if entry == "micro-batches" else one)
                assert returned.grad_fn is None
        # Not even until the next collection of cycles.
        assert kept and all(ref() is None for ref in kept)
    finally:
        gc.enable()
    assert all(p.grad is None or p.grad.grad_fn is None for p in model.parameters())
    assert criterion.seen == [] and criterion.calls == 0
