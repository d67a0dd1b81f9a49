"""Weights that another optimizer trains have the gradient of one pass."""

import copy
import itertools

import pytest
import torch
from torch import nn

import flatmin
from tests.helpers import ENTRY_POINTS
from tests.optim.loops import one_step


def gradient_of_one_pass(entry, clears, method):
    if method == "n-step" and entry in ("perturbed", "two calls"):
        return
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    body, head = list(model[0].parameters()), list(model[2].parameters())
    given = None if entry == "closure" and method == "sam" else model
    opt = flatmin.wrap(torch.optim.SGD(body, lr=0.0), method, rho=0.3, model=given)
    plain = torch.optim.SGD(head, lr=0.0)
    x, places = torch.randn(16, 4).double(), []

    class Forward:
        def __call__(self, given):
            places.append([p.detach().clone() for p in body])
            if clears and (entry in ("closure", "passes") or len(places) == 1):
                plain.zero_grad()
            return model(given)

    before = 0.0 if clears else 1.0  # what another loss has left on the head
    for _ in range(2):
        places.clear()
        for p in head if before else ():
            p.grad = torch.full_like(p, before)
        one_step(Forward(), opt, x, entry)
        taken = [p.grad.clone() for p in head]
    at = places[-1 if entry in ("closure", "passes") else 0]
    with torch.no_grad():
        for p, w in zip(body, at, strict=True):
            p.copy_(w)
    wanted = torch.autograd.grad(model(x).square().mean(), head)
    assert all(torch.allclose(a, b + before, atol=1e-12) for a, b in zip(taken, wanted, strict=True))


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_weights_of_another_optimizer_have_the_gradient_of_one_pass(entry):
    """Added to what was there, unless the loop clears it.

    Also without `model=` in a closure that returns the loss, whose graph tells of them.
    """
    for method, clears in itertools.product(("sam", "n-step"), (True, False)):
        gradient_of_one_pass(entry, clears, method)


@pytest.mark.parametrize(("method", "rho"), [("ae-sam", 0.3), ("sgdhess", 0.3), ("sam", 0.0)])
@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_weights_of_another_optimizer_have_a_gradient_where_a_pass_is_missing_or_keeps_its_graph(entry, method, rho):
    if method == "sgdhess" and entry in ("perturbed", "two calls"):
        pytest.skip("not a step of two passes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    head, x = list(model[2].parameters()), torch.randn(16, 4).double()
    opt = flatmin.wrap(torch.optim.SGD(model[0].parameters(), lr=0.0), method, rho=rho, model=model)

    class Backward:
        def __call__(self, given):
            self.loss = model(given)
            return self

        def square(self):
            return self

        def mean(self):
            return self

        def backward(self):
            opt.backward(self.loss.square().mean())

    at_w = torch.autograd.grad(model(x).square().mean(), head)
    for _ in range(4):
        one_step(Backward(), opt, x, entry)
        if rho == 0 or method == "sgdhess":
            assert all(torch.allclose(p.grad, g, atol=1e-12) for p, g in zip(head, at_w, strict=True))
        ratio = head[0].grad.norm() / at_w[0].norm()
        assert 0.5 < ratio < 1.9, "the sum of two passes, or none"
        for p in head:
            p.grad = None


def test_an_update_given_up_inside_a_pass_leaves_no_trace():
    """Also of weights that another optimizer trains."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    opt = flatmin.SAM(torch.optim.SGD(model[0].parameters(), lr=0.1), rho=0.3, model=model)
    before = [p.detach().clone() for p in model.parameters()]
    for last in (0, 1):
        for evaluation in opt.passes():
            with evaluation:
                model(torch.ones(2, 4)).square().mean().backward()
                if evaluation.index == last:
                    opt.abort()
        assert all(map(torch.equal, before, model.parameters())) and opt.counts()["updates"] == 0
    one_step(model, opt, torch.ones(2, 4), "passes")
    assert opt.counts()["updates"] == 1


def test_two_optimizers_may_perturb_at_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    twin, x = copy.deepcopy(model), torch.randn(16, 4).double()
    a, b = (flatmin.SAM(torch.optim.SGD(m.parameters(), lr=0.1), rho=0.3, model=model) for m in (model[0], model[2]))
    model(x).square().mean().backward()
    a.first_step()
    b.first_step()
    model(x).square().mean().backward()
    a.second_step()
    b.second_step()
    halves = [list(twin[0].parameters()), list(twin[2].parameters())]
    start = copy.deepcopy(twin.state_dict())
    twin(x).square().mean().backward()
    with torch.no_grad():
        for half in halves:
            norm = torch.cat([p.grad.flatten() for p in half]).norm()
            for p in half:
                p.add_(p.grad, alpha=0.3 / float(norm))
    g = torch.autograd.grad(twin(x).square().mean(), list(twin.parameters()))
    twin.load_state_dict(start)
    for p, q, d in zip(model.parameters(), twin.parameters(), g, strict=True):
        torch.testing.assert_close(p, q - 0.1 * d)


def test_a_forward_of_another_optimizers_step_is_not_taken_for_the_first_pass():
    """The generator's step runs the discriminator, and `zero_grad` of the module clears what it left."""
    torch.manual_seed(0)
    g, d = nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    sam, plain = flatmin.SAM(torch.optim.SGD(d.parameters(), lr=0.1), model=d), torch.optim.SGD(g.parameters(), lr=0.1)
    masks, data = [], []
    d[1].register_forward_hook(lambda module, given, out: masks.append(out != 0))
    for _ in range(3):
        data.append(torch.randn(4, 4))

        def backward(x=data[-1]):
            d(x).square().mean().backward()

        d.zero_grad()
        masks.clear()
        backward()
        with sam.perturbed():
            backward()
        sam.step()
        assert torch.equal(*masks)
        plain.zero_grad()
        d(g(torch.randn(4, 2))).mean().backward()
        plain.step()
    assert not torch.equal(data[1], data[2])


def test_a_gan_whose_discriminator_begins_from_cleared_gradients_gives_no_warning():
    """The generator's loss leaves gradients on the discriminator, which its closure clears; with a gradient penalty."""
    torch.manual_seed(0)
    g, d = nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    for model in (d, nn.ModuleList([g, d])):
        sam = flatmin.SAM(torch.optim.Adam(d.parameters()), rho=0.05, model=model)
        plain = torch.optim.Adam(g.parameters())
        for _ in range(3):
            real, fake = torch.randn(8, 4), g(torch.randn(8, 2)).detach()

            def closure(real=real, fake=fake, sam=sam):
                sam.zero_grad()
                mixed = torch.lerp(fake, real, torch.rand(8, 1)).requires_grad_()
                (slope,) = torch.autograd.grad(d(mixed).sum(), mixed, create_graph=True)
                loss = d(fake).mean() - d(real).mean() + (slope.norm(dim=1) - 1).square().mean()
                loss.backward()
                return loss

            sam.step(closure)
            plain.zero_grad()
            (-d(g(torch.randn(8, 2))).mean()).backward()
            plain.step()
