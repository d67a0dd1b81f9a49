"""Flat-LoRA: its noise is that of the formula, comes from nowhere else, and leaves nothing behind."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.optim import FlatLoRA


class Adapted(nn.Module):
    """y = x (W + s B A)^T with a frozen W, as a user may write it."""

    def __init__(self, weight, a, b, s=2.0):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.a, self.b, self.s = nn.Parameter(a), nn.Parameter(b), s

    def forward(self, x):
        return x @ self.weight.T + self.s * (x @ self.a.T) @ self.b.T

    def lora_weight(self):
        return self.weight, self.s * self.b @ self.a


def example():
    """The numbers of the closed form: rows of W + s B A are (1, 4, 2) and (0, 3, 4)."""
    w = torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]])
    return Adapted(w, torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[1.0], [0.0]]))


def net(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    layers = [Adapted(draw(8, 4), draw(2, 4), draw(8, 2)), nn.Tanh(), Adapted(draw(3, 8), draw(2, 8), draw(3, 2))]
    return nn.Sequential(*layers).to(dtype)


def train(flat_of, method=None, steps=4, dtype=torch.float32):
    """Adapters after some steps; `flat_of(model)` gives the context, or None."""
    model = net(dtype)
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    optimizer = base if method is None else flatmin.wrap(base, method, rho=0.1, model=model)
    g = torch.Generator().manual_seed(1)
    flat = flat_of(model)
    for _ in range(steps):
        x, y = torch.randn(16, 4, generator=g).to(dtype), torch.randint(3, (16,), generator=g)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if flat is None:
            optimizer.step(closure)
        else:
            with flat:
                optimizer.step(closure)
    return list(model.parameters())


def equal(a, b):
    return all(map(torch.equal, a, b))


def test_the_deviations_are_those_of_the_closed_form():
    model = example()
    flat = FlatLoRA(model, 0.05, total=0)
    wanted = [0.05 * math.sqrt(21 / 3), 0.05 * 5 / math.sqrt(3)]
    torch.testing.assert_close(flat.deviations()[""].tolist(), wanted)
    assert [round(x, 4) for x in wanted] == [0.1323, 0.1443]
    draws = []
    for _ in range(1500):
        before = model.weight.clone()
        with flat:
            draws.append(model.weight - before)
        assert torch.equal(model.weight, before)
    noise = torch.stack(draws)
    assert noise.std((0, 2)).tolist() == pytest.approx(wanted, rel=0.04)
    assert noise.mean((0, 2)).abs().max() < 0.01
    squared = noise.pow(2).sum((1, 2)).mean().item()
    assert squared == pytest.approx(0.05**2 * (21 + 25), rel=0.05)  # f^2 rho^2 |W + s B A|^2


def test_the_scale_is_a_cosine_from_0_to_1_that_stays():
    flat, seen = FlatLoRA(example(), total=4), []
    for _ in range(6):
        seen.append(flat.scale)
        with flat:
            pass
    assert seen == pytest.approx([0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1, 1])


@pytest.mark.parametrize("method", [None, "sam"])
def test_rho_0_is_the_training_without_it_bit_for_bit(method):
    plain = train(lambda model: None, method)
    assert equal(plain, train(lambda model: FlatLoRA(model, 0.0, total=0), method))
    assert not equal(plain, train(lambda model: FlatLoRA(model, 0.05, total=0), method))


def test_the_gradient_is_taken_at_the_noisy_weights():
    model, x = example(), torch.tensor([[1.0, -2.0, 0.5]])
    with FlatLoRA(model, 0.3, total=0):
        noisy = model.weight.clone()
        F.cross_entropy(model(x), torch.tensor([1])).backward()
    other = Adapted(noisy, model.a.detach().clone(), model.b.detach().clone())
    F.cross_entropy(other(x), torch.tensor([1])).backward()
    assert torch.equal(model.a.grad, other.a.grad) and torch.equal(model.b.grad, other.b.grad)
    assert not torch.equal(noisy, model.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_frozen_weights_are_the_same_to_the_bit_after_every_end(dtype):
    model = net(dtype)
    before = [p.clone() for p in model.parameters()]
    flat = FlatLoRA(model, 0.05, total=0)
    with flat:
        assert not equal(before, model.parameters())
    assert flat.updates == 1
    with pytest.raises(ZeroDivisionError), flat:
        raise ZeroDivisionError
    assert flat.updates == 1 and equal(before, model.parameters())
    model[2].lora_weight = lambda: 1 / 0  # the second layer fails when the first one has its noise
    with pytest.raises(ZeroDivisionError), flat:
        pytest.fail("entered")
    assert equal(before, model.parameters())
    frozen = [p for p in train(lambda model: FlatLoRA(model, total=4), "sam", dtype=dtype) if not p.requires_grad]
    assert equal(frozen, [p for p in before if not p.requires_grad])


def test_noise_in_bf16_is_right_in_the_mean_where_it_is_far_below_the_spacing():
    model = Adapted(torch.ones(64, 64), torch.zeros(1, 64), torch.zeros(64, 1)).bfloat16()
    flat, moved = FlatLoRA(model, 1e-3, total=0), []
    for _ in range(50):
        with flat:
            moved.append(model.weight.float() - 1)
    changes = torch.stack(moved)
    # Towards a neighbour at 2^-8 or 2^-7 with a probability that keeps the mean of |E|; to nearest, nothing moves.
    expected = 1e-3 * math.sqrt(2 / math.pi)
    assert changes.abs().mean().item() == pytest.approx(expected, rel=0.05)
    assert abs(changes.mean().item()) < 0.05 * expected


def test_draws_follow_from_the_seed_and_the_update_alone():
    """The global generator is neither read nor moved; a resumed run and another process draw the same."""

    def draws(flat, updates):
        made = []
        for _ in range(updates):
            torch.randn(int(torch.randint(1, 9, ())))
            state = torch.get_rng_state()
            with flat:
                made.append([flat._layers[0].weight().clone(), flat._layers[1].weight().clone()])
            assert torch.equal(torch.get_rng_state(), state)
        return made

    first = draws(FlatLoRA(net(), total=3, seed=5), 4)
    resumed = FlatLoRA(net(), total=3)
    half = FlatLoRA(net(), total=3, seed=5)
    half_draws = draws(half, 2)
    resumed.load_state_dict(half.state_dict())
    assert all(equal(a, b) for a, b in zip(first, half_draws + draws(resumed, 2), strict=True))
    assert not equal(first[3], draws(FlatLoRA(net(), total=0, seed=6), 4)[3])
    assert not torch.equal(first[2][0], first[3][0])


def test_a_backward_outside_of_the_context_raises():
    model = net()
    with FlatLoRA(model, total=0):
        loss = model(torch.ones(2, 4)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_leaves_layers_out():
    model = net()
    assert list(FlatLoRA(model, total=1, only="2*").deviations()) == ["2"]


def test_the_weight_must_be_the_tensor_that_the_module_holds():
    """Noise on a copy reaches nothing; a view is no copy, and a detached weight is trained all the same."""

    def giving(change, added=lambda w: torch.zeros_like(w)):
        model = example()
        model.lora_weight = lambda: (change(model.weight), added(model.weight))
        return model

    for copy in (lambda w: w.double(), lambda w: w + 0, lambda w: w.clone()):
        with pytest.raises(ValueError, match="the model must return the weight itself, not a copy"):
            FlatLoRA(giving(copy), total=1)
    for hidden in (torch.Tensor.detach, lambda w: w.data):
        model = giving(hidden)
        model.weight.requires_grad_()
        with pytest.raises(ValueError, match="is trained, but Flat-LoRA restores it"):
            FlatLoRA(model, total=1)
    for added in (lambda w: 0, lambda w: w[0], lambda w: w.T):
        with pytest.raises(ValueError, match=r"as a tensor of the weight's shape \(2, 3\); got"):
            FlatLoRA(giving(lambda w: w, added), total=1)
    whole = giving(lambda w: w[:1], lambda w: torch.zeros(1, 3))
    before = whole.weight.clone()
    with FlatLoRA(whole, total=0):
        assert torch.equal(whole.weight[1], before[1]) and not torch.equal(whole.weight[0], before[0])
    assert torch.equal(whole.weight, before)


def test_what_is_refused_is_said(monkeypatch):
    shared = nn.Sequential(example(), example())
    shared[1].weight = shared[0].weight
    tied = net()
    tied.register_module("head", nn.Linear(4, 8))
    tied.head.weight = tied[0].weight
    assert list(FlatLoRA(tied, total=1, only="2").deviations()) == ["2"]
    trained, whole = example(), example()
    trained.weight.requires_grad_()
    whole.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    for words, call in {
        "rho must be a finite number >= 0, got -1": lambda: FlatLoRA(example(), -1, total=1),
        "rho must be a finite number >= 0, got '0.05'": lambda: FlatLoRA(example(), "0.05", total=1),
        "total must be a whole number of updates >= 0, got -1": lambda: FlatLoRA(example(), total=-1),
        "total must be a whole number of updates >= 0, got nan": lambda: FlatLoRA(example(), total=math.nan),
        "seed must be a whole number, got 0.5": lambda: FlatLoRA(example(), total=1, seed=0.5),
        "no layers with low-rank adapters": lambda: FlatLoRA(nn.Linear(2, 2), total=1),
        "only='1' matches no layer with adapters.* 0, 2": lambda: FlatLoRA(net(), total=1, only="1"),
        "0 and 1 share one weight, so the noise would change both; exclude 0 by only=": lambda: FlatLoRA(
            shared, total=1
        ),
        "0 and head share one weight": lambda: FlatLoRA(tied, total=1),
        "is trained, but Flat-LoRA restores it": lambda: FlatLoRA(trained, total=1),
        "is not a matrix of floating-point numbers": lambda: FlatLoRA(whole, total=1),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
    flat = FlatLoRA(example(), total=0, seed=2**60)
    with flat, pytest.raises(RuntimeError, match="enter the context once in each update"):
        flat.__enter__()
    monkeypatch.setattr("flatmin.optim.lora.is_sharded", lambda t: True)
    with pytest.raises(ValueError, match="is sharded, but the noise needs whole rows"):
        FlatLoRA(example(), total=1)
