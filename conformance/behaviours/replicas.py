"""Two processes that train together: replicas of the model, and shards of it."""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from conformance.adapter import Adapter, Subject, sgd
from conformance.problems import RHO, LossOf, batch, closure_of, copies, difference, net, unequal
from conformance.verdict import Behaviour, at_most, behaviour, demand


def _share(model: nn.Module, k: int, rank: int | None = None) -> LossOf:
    """The loss on this process's part of a batch, or on that of another rank."""
    x, y = batch(k, 16, next(model.parameters()).dtype)
    i = distributed.get_rank() if rank is None else rank
    a, b = x.chunk(distributed.get_world_size())[i], y.chunk(distributed.get_world_size())[i]
    return lambda: F.cross_entropy(model(a), b)


def _whole(model: nn.Module, k: int) -> LossOf:
    x, y = batch(k, 16, next(model.parameters()).dtype)
    return lambda: F.cross_entropy(model(x), y)


def _replicated(adapter: Adapter, dtype: torch.dtype, **options: Any) -> tuple[DistributedDataParallel, Subject]:
    model = DistributedDataParallel(net(dtype))
    return model, adapter.build(list(model.parameters()), sgd(), rho=RHO, model=model, **options)


def _train(subject: Subject, model: nn.Module, steps: range) -> None:
    for k in steps:
        subject.step(closure_of(subject, _share(model, k)))


def _replicas_are_equal(model: nn.Module) -> str:
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    others = [torch.empty_like(flat) for _ in range(distributed.get_world_size())]
    distributed.all_gather(others, flat)
    wrong = unequal([flat] * len(others), others)
    gap = max(float((flat.double() - o.double()).abs().max()) for o in others)
    demand(not wrong, f"replicas differ by {gap:.2g}")
    return "bit for bit"


@behaviour(ranks=2)
def ddp_replicas(adapter: Adapter) -> str:
    """After 50 float32 steps under DistributedDataParallel the replicas are equal, bit for bit.

    Replicas that drift apart average gradients of different models.
    """
    model, subject = _replicated(adapter, torch.float32)
    _train(subject, model, range(50))
    return _replicas_are_equal(model)


@behaviour(ranks=2)
def ddp_is_the_whole_batch(adapter: Adapter) -> str:
    """Two replicas on half a batch each train as one process on the whole batch.

    Results depend on how many processes train, and rho with them.
    """
    model, subject = _replicated(adapter, torch.float64)
    reference = copy.deepcopy(model.module)
    alone = adapter.build(list(reference.parameters()), sgd(), rho=RHO, model=reference)
    _train(subject, model, range(5))
    for k in range(5):
        alone.step(closure_of(alone, _whole(reference, k)))
    return at_most(difference(model, reference), 1e-6, "weights differ by")


class _Mean:
    """SAM with an ascent for each rank's part, written out in one process."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base = sgd().make(list(model.parameters()))

    def step(self, k: int) -> None:
        params = list(self.model.parameters())
        total = [torch.zeros_like(p) for p in params]
        world = distributed.get_world_size()
        for rank in range(world):
            part = _share(self.model, k, rank)
            grads = torch.autograd.grad(part(), params)
            norm = torch.stack([g.norm() for g in grads]).norm()
            home = copies(params)
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p += RHO * g / (norm + 1e-12)
            grads = torch.autograd.grad(part(), params)
            with torch.no_grad():
                for p, h, t, g in zip(params, home, total, grads, strict=True):
                    p.copy_(h)
                    t += g / world
        for p, t in zip(params, total, strict=True):
            p.grad = t
        self.base.step()


@behaviour(ranks=2)
def own_ascents(adapter: Adapter) -> str:
    """With an ascent on each replica's own gradient the step is SAM's formula on each and the mean of both.

    m-sharpness, by the authors of SAM the version that generalises best, cannot be had, or is silently the other one.
    """
    model, subject = _replicated(adapter, torch.float64, ascent_sync="none")
    mean = _Mean(copy.deepcopy(model.module))
    for k in range(5):
        subject.step(closure_of(subject, _share(model, k)))
        mean.step(k)
    return at_most(difference(model, mean.model), 1e-6, "weights differ by")


@behaviour(ranks=2)
def own_ascents_are_silent(adapter: Adapter) -> str:
    """With own ascents DistributedDataParallel reduces once a step.

    The communication of pass 1 is paid for a gradient that is thrown away.
    """
    model, subject = _replicated(adapter, torch.float32, ascent_sync="none")
    reduced = [0]

    def hook(state, bucket):  # noqa: ANN001, ANN202 - torch looks at the annotations, and wants its class or none
        reduced[0] += 1
        mean = bucket.buffer().div_(distributed.get_world_size())
        return distributed.all_reduce(mean, async_op=True).get_future().then(lambda f: f.value()[0])

    model.register_comm_hook(None, hook)
    _train(subject, model, range(1))
    before = reduced[0]
    _train(subject, model, range(1, 5))
    # An implementation may reduce by itself instead.
    return at_most((reduced[0] - before) / 4, 1.0, "reductions a step:")


@behaviour(ranks=2)
def own_ascents_and_replicas(adapter: Adapter) -> str:
    """With own ascents too the replicas are equal after 50 float32 steps, bit for bit.

    Each replica subtracts another eps, rounds differently, and they drift apart.
    """
    model, subject = _replicated(adapter, torch.float32, ascent_sync="none")
    _train(subject, model, range(50))
    return _replicas_are_equal(model)


@behaviour(ranks=2)
def inf_on_one_replica(adapter: Adapter) -> str:
    """With own ascents an inf in pass 1 of one replica leaves all of them finite and equal.

    One replica skips its ascent, or its step, and the others continue without it.
    """
    model, subject = _replicated(adapter, torch.float32, ascent_sync="none")
    _train(subject, model, range(2))
    inner, calls = closure_of(subject, _share(model, 2)), [0]

    def closure() -> Tensor:
        loss = inner()
        calls[0] += 1
        if calls[0] == 1 and distributed.get_rank() == 1:
            next(model.parameters()).grad.view(-1)[0] = math.inf
        return loss

    subject.step(closure)
    _train(subject, model, range(3, 5))
    demand(all(bool(p.isfinite().all()) for p in model.parameters()), "weights are not finite")
    return _replicas_are_equal(model)


class _RankDetour(nn.Module):
    """Only rank 0 uses the layer in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.extra, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(self.extra(h).tanh() if distributed.get_rank() == 0 else h)


@behaviour(ranks=2)
def own_ascents_and_unused(adapter: Adapter) -> str:
    """Own ascents with find_unused_parameters, where a layer is used on one replica only, keep the replicas equal.

    Whoever looks at gradients to decide what to reduce waits for ever, or steps a weight on one replica.
    """
    model = DistributedDataParallel(_RankDetour(), find_unused_parameters=True)
    subject = adapter.build(list(model.parameters()), sgd(), rho=RHO, model=model, ascent_sync="none")
    _train(subject, model, range(10))
    return _replicas_are_equal(model)


def _shard(model: nn.Sequential) -> nn.Sequential:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _full(model: nn.Module) -> list[Tensor]:
    return [p.detach().full_tensor().clone() for p in model.parameters()]


def _sharded(adapter: Adapter, dtype: torch.dtype, seed: int = 0, **base: Any) -> tuple[nn.Sequential, Subject]:
    model = _shard(net(dtype, seed))
    return model, adapter.build(list(model.parameters()), sgd(**base), rho=RHO, model=model)


@behaviour(ranks=2)
def fsdp2_is_the_whole_model(adapter: Adapter) -> str:
    """Under fully_shard the model trains as unsharded in one process on the whole batch.

    Each process takes the norm of its own shard, and the radius depends on the number of processes.
    """
    model, subject = _sharded(adapter, torch.float32)
    reference = net(torch.float32)
    alone = adapter.build(list(reference.parameters()), sgd(), rho=RHO, model=reference)
    _train(subject, model, range(5))
    for k in range(5):
        alone.step(closure_of(alone, _whole(reference, k)))
    gaps = [(a - b.detach()).abs().max() for a, b in zip(_full(model), reference.parameters(), strict=True)]
    return at_most(torch.stack(gaps).max(), 1e-5, "weights differ by")


@behaviour(ranks=2)
def fsdp2_return(adapter: Adapter) -> str:
    """Under fully_shard, with lr = 0, 10 steps leave every weight, bit for bit.

    Assigning to .data of a sharded tensor does nothing: weights move by rho in every step.
    """
    model, subject = _sharded(adapter, torch.float32, lr=0.0)
    before = _full(model)
    _train(subject, model, range(10))
    gap = max(float((a - b).norm()) for a, b in zip(before, _full(model), strict=True))
    demand(not unequal(before, _full(model)), f"a tensor moved by {gap:.2g}")
    return "bit for bit"


def _on_disk(work: Callable[[str], None]) -> None:
    """A folder that all processes see, for the time of the work."""
    names = [tempfile.mkdtemp() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(names)
    folder = names[0]
    assert folder is not None
    try:
        work(folder)
        distributed.barrier()
    finally:
        if distributed.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


@behaviour(ranks=2)
def fsdp2_checkpoint(adapter: Adapter) -> str:
    """A sharded run continues from torch.distributed.checkpoint's files as if uninterrupted, bit for bit.

    Long sharded trainings cannot be resumed, or lose their momentum.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, subject = _sharded(adapter, torch.float32)
    _train(subject, model, range(3))
    fresh, again = _sharded(adapter, torch.float32, seed=9)

    def through(folder: str) -> None:
        weights, state = get_state_dict(model, subject.optimizer)
        checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
        weights, state = get_state_dict(fresh, again.optimizer)
        saved = {"model": weights, "optimizer": state}
        checkpoint.load(saved, checkpoint_id=folder)
        set_state_dict(fresh, again.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])

    _on_disk(through)
    for one, trained in ((subject, model), (again, fresh)):
        _train(one, trained, range(3, 6))
    wrong = unequal(_full(model), _full(fresh))
    gap = max(float((a - b).abs().max()) for a, b in zip(_full(model), _full(fresh), strict=True))
    demand(not wrong, f"resumed and uninterrupted differ by {gap:.2g}")
    return "bit for bit"


BEHAVIOURS: tuple[Behaviour, ...] = (
    ddp_replicas,
    ddp_is_the_whole_batch,
    own_ascents,
    own_ascents_are_silent,
    own_ascents_and_replicas,
    own_ascents_and_unused,
    inf_on_one_replica,
    fsdp2_is_the_whole_model,
    fsdp2_return,
    fsdp2_checkpoint,
)
