"""Small nets and dense matrices to measure against."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


class Tied(nn.Module):
    """An embedding that is the output layer as well."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, i):
        return self.out(torch.tanh(self.embed(i)).mean(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.attend(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


N = 17


def _features(*shape):
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _labels(classes=3):
    return torch.randint(classes, (N,), generator=torch.Generator().manual_seed(2))


def _conv(norm):
    return lambda: nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


# name -> (model, inputs, targets, loss)
CASES = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
        lambda: _features(5),
        _labels,
        nn.CrossEntropyLoss(),
    ),
    "relu": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)),
        lambda: _features(5),
        _labels,
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ),
    "groupnorm": (_conv(lambda c: nn.GroupNorm(2, c)), lambda: _features(1, 4, 4), _labels, nn.CrossEntropyLoss()),
    "batchnorm": (_conv(nn.BatchNorm2d), lambda: _features(1, 4, 4), _labels, nn.CrossEntropyLoss()),
    "attention": (Attention, lambda: _features(5, 4), _labels, nn.CrossEntropyLoss()),
    "lstm": (Recurrent, lambda: _features(5, 3), _labels, nn.CrossEntropyLoss()),
    "tied": (
        Tied,
        lambda: torch.randint(6, (N, 3), generator=torch.Generator().manual_seed(3)),
        lambda: _labels(6),
        nn.CrossEntropyLoss(),
    ),
    "regression": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        lambda: _features(4),
        lambda: _features(2),
        nn.MSELoss(),
    ),
    "linear": (lambda: nn.Linear(4, 2), lambda: _features(4), lambda: _features(2), nn.MSELoss()),
    "sum": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
        lambda: _features(5),
        _labels,
        nn.CrossEntropyLoss(reduction="sum"),
    ),
    "class weights": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
        lambda: _features(5),
        _labels,
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)),
    ),
}


def make(name):
    """(model in float64, inputs, targets, loss)"""
    model, x, y, loss = CASES[name]
    torch.manual_seed(0)
    return model().double().eval(), x(), y(), copy.deepcopy(loss)  # tests may set its options


def batches(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def function_of(model, x, y, loss, names=None):
    """(L as a function of one flat vector, that vector), over all data at once, by functional_call alone."""
    params = {n: p.detach() for n, p in model.named_parameters()}
    names = names or list(params)
    scale = 1.0 / len(y) if getattr(loss, "reduction", "mean") == "sum" else 1.0

    def outputs(flat):
        parts = flat.split([params[n].numel() for n in names])
        given = {n: part.view_as(params[n]) for n, part in zip(names, parts, strict=True)}
        return functional_call(model, {**params, **given}, (x,))

    flat = torch.cat([params[n].reshape(-1) for n in names])
    return lambda w: loss(outputs(w), y) * scale, flat, outputs


def dense_hessian(model, x, y, loss, names=None):
    fn, flat, _ = function_of(model, x, y, loss, names)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(fn, flat)


def dense_jacobian(model, x, y, loss):
    """d outputs / d weights, shape (N, K, size)."""
    _, flat, outputs = function_of(model, x, y, loss)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.jacobian(outputs, flat)


class Matrix:
    """A dense symmetric matrix as an operator."""

    def __init__(self, matrix):
        self.matrix, self.size = matrix, len(matrix)
        self.dtype, self.device = matrix.dtype, matrix.device

    def matvec(self, v):
        return self.matrix @ v


def symmetric(values, seed=0, dtype=torch.float64):
    """A matrix of these eigenvalues in a random basis."""
    values = torch.as_tensor(values, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64))
    return Matrix((q @ torch.diag(values) @ q.T).to(dtype))


def _dense_net(activation, width):
    return lambda: nn.Sequential(
        nn.Linear(8, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, 5)
    )


# name -> (model, shape of an input, steps); of 501, 501, 473 and 1841 weights
TRAINED = {
    "tanh": (_dense_net(nn.Tanh, 16), (8,), 100),
    "relu": (_dense_net(nn.ReLU, 16), (8,), 100),
    "groupnorm": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(16, 5)),
        ),
        (1, 6, 6),
        30,
    ),
    "large": (_dense_net(nn.Tanh, 36), (8,), 100),
}


def trained(name):
    """(model in float64, inputs, targets, loss) of a net with a few large eigenvalues over a crowd of small ones."""
    model, shape, steps = TRAINED[name]
    torch.manual_seed(0)
    model = model().double()
    g = torch.Generator().manual_seed(1)
    centres = torch.randn(5, *shape, generator=g, dtype=torch.float64)
    y = torch.randint(5, (120,), generator=g)
    x = centres[y] + torch.randn(120, *shape, generator=g, dtype=torch.float64)
    loss, base = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        base.zero_grad()
        loss(model(x), y).backward()
        base.step()
    base.zero_grad()
    return model.eval(), x, y, loss


@functools.cache
def hessian_of(name):
    """(the dense Hessian of a trained net, its eigenvalues, falling), to read only."""
    matrix = dense_hessian(*trained(name))
    return Matrix(matrix), torch.linalg.eigvalsh(matrix).flip(0)
