"""What holds for every family, on a small instance of it, in double precision."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.models.nets import CLASSES, DROPOUT, SMALL, images, labels, make

every = pytest.mark.parametrize("name", SMALL)


def loss(name, model):
    return F.cross_entropy(model(images(name)), labels())


@every
def test_logits_follow_from_the_seed(name):
    first, again, other = make(name, 3), make(name, 3), make(name, 4)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first(images(name)), other(images(name)))
    assert first(images(name, n=1)).isfinite().all()
    assert first(images(name, n=2)).shape == first.eval()(images(name, n=2)).shape == (2, CLASSES)


@every
def test_gradients_reach_every_parameter(name):
    for training in (True, False):
        model = make(name).train(training)
        loss(name, model).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
            assert training or parameter.grad.any(), key  # BatchNorm in training takes the biases before it out


@every
def test_evaluating_changes_nothing_and_draws_nothing(name):
    """Also with other weights, by a functional call."""
    model, other = make(name, 0).eval(), make(name, 1).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    assert torch.equal(model(images(name)), model(images(name)))
    assert torch.equal(functional_call(model, other.state_dict(), (images(name),)), other(images(name)))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@every
def test_training_counts_batches_and_draws_for_dropout_only(name):
    """And the state that it leaves is copied whole."""
    model, other = make(name, 0), make(name, 1)
    random_state = torch.get_rng_state()
    model(images(name))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 1 and norm.running_mean.any() for norm in norms)
    assert bool(norms) == (name not in ("conv", "mlp", "vit"))
    assert torch.equal(torch.get_rng_state(), random_state) == (name not in DROPOUT)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images(name)), other.eval()(images(name)))


@every
def test_functional_gradient(name):
    model = make(name).eval()
    buffers = dict(model.named_buffers())

    def value(weights):
        return F.cross_entropy(functional_call(model, {**weights, **buffers}, (images(name),)), labels())

    weights = {key: parameter.detach() for key, parameter in model.named_parameters()}
    got = torch.func.grad(value)(weights)
    loss(name, model).backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(got[key], parameter.grad)


@every
def test_channels_last(name):
    model, x = make(name).eval(), images(name)
    expected = model(x)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected)


@every
def test_the_hessian_is_symmetric(name):
    for training in (True, False):
        model = make(name).train(training)
        weights = list(model.parameters())
        gradient = torch.autograd.grad(loss(name, model), weights, create_graph=True)
        u, v = ([torch.randn_like(w) for w in weights] for _ in range(2))

        def dot(a, b):
            return sum((x * y).sum() for x, y in zip(a, b, strict=True))

        Hu, Hv = (
            torch.autograd.grad(dot(gradient, d), weights, retain_graph=True, materialize_grads=True) for d in (u, v)
        )
        assert all(product.isfinite().all() for product in Hv) and dot(v, Hv) != 0
        torch.testing.assert_close(dot(u, Hv), dot(v, Hu), rtol=1e-7, atol=1e-9)


@every
def test_second_derivative_is_that_of_the_gradient(name):
    """Against central differences along the last layer, in which the loss is smooth: no ReLU comes after it."""
    model = make(name).eval()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1].weight
    v, eps = torch.randn_like(last), 1e-5
    weights = list(model.parameters())
    gradient = torch.autograd.grad(loss(name, model), weights, create_graph=True)
    product = torch.autograd.grad(gradient, last, grad_outputs=[torch.ones_like(g) for g in gradient])[0]
    slopes = []
    for sign in (1, -1):
        with torch.no_grad():
            last.add_(v, alpha=sign * eps)
        slopes.append(sum(g.sum() for g in torch.autograd.grad(loss(name, model), weights)))
        with torch.no_grad():
            last.sub_(v, alpha=sign * eps)
    torch.testing.assert_close((product * v).sum(), (slopes[0] - slopes[1]) / (2 * eps), rtol=1e-5, atol=1e-8)
