"""SyncBatchNorm over two processes: one batch, one set of statistics, touched by the first pass only."""

from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import flatmin
from tests.helpers import ENTRY_POINTS, drive

pytestmark = pytest.mark.dist
STEPS, SIZE = 4, 6


class Total(torch.autograd.Function):
    """The sum over all ranks."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    backward = forward  # every rank's loss depends on every share


class OnTheCPU:
    """Torch's synchronised normalisation, which has no kernel for the CPU, from collectives that have one."""

    @staticmethod
    def apply(x, weight, bias, running_mean, running_var, eps, momentum, group, world):
        count = world * len(x)
        mean = Total.apply(x.sum(0)) / count
        var = Total.apply((x - mean).square().sum(0)) / count
        if running_mean is not None:
            with torch.no_grad():
                running_mean.lerp_(mean, momentum)
                running_var.lerp_(var * count / (count - 1), momentum)
        return (x - mean) * (var + eps).rsqrt() * weight + bias


def net(norm, momentum):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), norm(5, momentum=momentum), nn.Tanh(), nn.Linear(5, 3)).double()


def train(net, model, door, share=slice(None), **options):
    """Some steps on a share of each batch; the statistics after each of them, and the weights."""
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer = flatmin.SAM(base, rho=0.3, model=model, **options)
    statistics = []
    for k in range(STEPS):
        x = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64)[share]

        def backward(x=x):
            loss = model(x).square().mean()
            loss.backward()
            return loss

        drive(optimizer, backward, door)
        statistics.append([b.clone() for b in net.buffers()])
    return statistics, [p.detach() for p in net.parameters()]


def train_share(rank, world, door, momentum, options):
    shared = net(nn.SyncBatchNorm, momentum)
    # What is tracked is decided in the layer's own forward. It and DDP ask first whether the device has the kernel.
    with (
        mock.patch("torch._C._get_privateuse1_backend_name", lambda: "cpu"),
        mock.patch("torch.nn.modules.batchnorm.sync_batch_norm", OnTheCPU),
        mock.patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda *_: None),
    ):
        return train(shared, DistributedDataParallel(shared), door, slice(rank, None, world), **options)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("door", ENTRY_POINTS)
def test_sync_batchnorm_of_two_halves_is_batchnorm_of_the_whole(ranks, door, momentum):
    """Weights, and statistics after every step, with the number of batches among them."""
    alone = net(nn.BatchNorm1d, momentum)
    statistics, weights = train(alone, alone, door)
    assert int(alone[1].num_batches_tracked) == STEPS
    for shared_statistics, shared_weights in ranks.run(train_share, door, momentum, {}):
        for expected, got in zip([*statistics, weights], [*shared_statistics, shared_weights], strict=True):
            for a, b in zip(expected, got, strict=True):
                assert torch.allclose(a.double(), b.double(), rtol=0, atol=1e-12)


def test_without_the_guard_both_passes_count(ranks):
    for statistics, _ in ranks.run(train_share, "closure", 0.1, {"freeze_batchnorm": False}):
        assert int(statistics[-1][2]) == 2 * STEPS
