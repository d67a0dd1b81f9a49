import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin.measure.lanczos import largest_eigenvalue
from flatmin.measure.operators import Hessian


class Matrix:
    def __init__(self, matrix):
        self.matrix, self.size = matrix, len(matrix)
        self.dtype, self.device = matrix.dtype, matrix.device

    def matvec(self, v):
        return self.matrix @ v


def symmetric(values, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64))
    return Matrix(q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hessian_of_a_net(seed, dtype):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(37, 5, dtype=dtype), torch.randint(3, (37,))
    operator = Hessian(model, F.cross_entropy, list(zip(x.split(10), y.split(10), strict=True)))
    full = torch.stack([operator.matvec(e) for e in torch.eye(operator.size, dtype=dtype)])
    exact = torch.linalg.eigvalsh(full.double())[-1].item()
    found = largest_eigenvalue(operator, seed=seed)
    assert found.converged
    assert found.residual <= 1e-2
    assert found.value == pytest.approx(exact, rel=1e-3)
    assert found.hvps < 30


def test_the_sign_decides_not_the_magnitude():
    found = largest_eigenvalue(symmetric([-50.0, -3.0, 1.0, 2.0, *torch.linspace(-2, 1, 40).tolist()]))
    assert found.value == pytest.approx(2.0, rel=1e-3)


def test_residual_is_the_true_one():
    operator = symmetric(torch.linspace(-1, 3, 60).tolist())
    loose = largest_eigenvalue(operator, tol=0.1)
    tight = largest_eigenvalue(operator, tol=1e-6)
    assert tight.hvps > loose.hvps
    assert tight.value == pytest.approx(3.0, rel=1e-9)
    # The distance to the spectrum is at most the residual.
    assert abs(loose.value - 3.0) <= loose.residual * loose.value


def test_two_confirming_steps_are_spent():
    operator = symmetric([10.0] + [0.1 * i for i in range(30)])
    with_two, with_none = (largest_eigenvalue(operator, confirm=c) for c in (2, 0))
    assert with_two.hvps == with_none.hvps + 2


@pytest.mark.parametrize(
    ("matrix", "value"),
    [
        (torch.zeros(4, 4, dtype=torch.float64), 0.0),
        (torch.eye(4, dtype=torch.float64) * -3, -3.0),
        (torch.tensor([[2.0]]), 2.0),
        (torch.diag(torch.tensor([1.0, 1.0, 5.0, 5.0])), 5.0),
    ],
)
def test_degenerate_spectra(matrix, value):
    found = largest_eigenvalue(Matrix(matrix))
    assert found.converged
    assert found.value == pytest.approx(value, abs=1e-6)
    assert found.residual == pytest.approx(0, abs=1e-5)


def test_too_few_steps_say_so():
    found = largest_eigenvalue(symmetric(torch.linspace(0, 1, 200).tolist()), tol=1e-8, max_steps=4)
    assert not found.converged
    assert found.hvps == 4


def test_same_seed_same_answer():
    operator = symmetric(torch.linspace(0, 1, 30).tolist())
    assert largest_eigenvalue(operator, seed=3) == largest_eigenvalue(operator, seed=3)


def test_bad_input():
    with pytest.raises(ValueError, match="tol > 0"):
        largest_eigenvalue(symmetric([1.0, 2.0]), tol=0)
    with pytest.raises(ArithmeticError, match="not finite"):
        largest_eigenvalue(Matrix(torch.full((3, 3), torch.nan)))
