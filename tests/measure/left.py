"""Whether a measure leaves the model and the program as they were."""

import torch
from torch import nn
from torch.nn import functional as F

from flatmin.measure.problem import Problem
from tests.helpers import same_bits
from tests.measure.nets import batches

BACK_ENDS = (
    torch.backends.cuda.math_sdp_enabled,
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    lambda: torch.backends.cudnn.enabled,
    lambda: torch.backends.cudnn.deterministic,
    lambda: torch.backends.cudnn.benchmark,
)


class Moody(nn.Module):
    """Changes buffers and draws in every forward pass, has flags of its own, and fails on demand."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.fail = -1
        self.norm.eval()

    def forward(self, x):
        self.calls += 1
        torch.rand(3)
        if self.fail == 0:
            raise OSError("no")
        self.fail -= 1
        return self.drop(self.norm(self.linear(x)))


def left_as_it_was(measure, fail):
    """Run measure(problem), failing in forward pass `fail` (-1: not) if it gets there; see that nothing has changed.

    Weights, gradients and buffers (the same tensors with the same bits), flags, what requires a gradient, the data, the
    random numbers of the program, and what it chose of torch.
    """
    torch.manual_seed(0)
    model, x, y = Moody().double(), torch.randn(17, 5, dtype=torch.float64), torch.randint(3, (17,))
    model.linear.bias.requires_grad_(False)
    F.cross_entropy(model(x), y).backward()

    def look():
        return (
            {k: v.clone() for k, v in model.state_dict().items()},
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            (x.clone(), y.clone()),
            torch.get_rng_state(),
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [id(t) for t in (*model.parameters(), *model.buffers())],
            [id(p.grad) for p in model.parameters()],
            (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")),
            [f() for f in BACK_ENDS],
        )

    before = look()
    model.fail = fail
    failed = False
    try:
        with torch.no_grad():
            measure(Problem(model, nn.CrossEntropyLoss(), batches(x, y, 7)))
    except OSError:
        failed = True
    # Where it did not fail there were fewer passes.
    assert not failed or fail >= 0
    assert failed or fail < 0 or model.fail >= 0
    model.fail = -1
    after = look()
    assert all(same_bits(a, b) for a, b in zip(after[:4], before[:4], strict=True))
    assert after[4:] == before[4:]
