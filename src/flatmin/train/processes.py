"""Training in several processes, one per device, started by `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of processes.

    Args:
        rank: rank of this process, from 0; rank 0 writes files and prints.
        size: number of processes.
        local_rank: rank on this machine; the number of the GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all processes, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of rank 0 to all processes, because checkpoints store those of rank 0."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


@contextmanager
def world_of(device: str) -> Iterator[World]:
    """Join the processes that `torchrun` started; without it, a single process.

    An existing process group is used and not changed.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl, one GPU per process).

    Raises:
        ValueError: this machine has fewer GPUs than processes.
    """
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", dist.get_rank())))
        return
    if not all(name in os.environ for name in _SET_BY_TORCHRUN) or int(os.environ["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started {os.environ.get('LOCAL_WORLD_SIZE', 'too many')} processes, but this machine has "
                f"{torch.cuda.device_count()} GPUs; use --nproc-per-node={torch.cuda.device_count()}."
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), local)
    finally:
        dist.destroy_process_group()


def spread(model: nn.Module, kind: str, world: World, *, sync_batchnorm: bool = False) -> nn.Module:
    """Prepare a model for several processes: wrap it in DistributedDataParallel, or shard it in place (FSDP2).

    Args:
        model: the model, with the same weights in every process.
        kind: "ddp" or "fsdp"; the latter shards the model and each of its direct children that has parameters.
        world: the processes.
        sync_batchnorm: whether BatchNorm uses the batch statistics of all processes.

    Raises:
        ValueError: sync_batchnorm is set on the CPU, where torch has no such layer.
    """
    device = next(model.parameters()).device
    if sync_batchnorm:
        if device.type == "cpu":
            raise ValueError("sync_batchnorm=true needs device=cuda; torch has no such layer on the CPU.")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (world.size,))
        for child in model.children():
            if any(parameter.requires_grad for parameter in child.parameters()):
                fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    return DistributedDataParallel(model, device_ids=[world.local_rank] if device.type == "cuda" else None)


def whole_state(model: nn.Module, optimizer: Any, kind: str, world: World) -> tuple[dict[str, Any], dict[str, Any]]:
    """Complete state dicts of model and optimizer on the CPU; all processes must call this, rank 0 gets the content."""
    if world.size > 1 and kind == "fsdp":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return whole_weights(model), get_optimizer_state_dict(model, optimizer, options=options)
    return on_cpu(model.state_dict()), on_cpu(optimizer.state_dict())


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """Complete state dict of a sharded model on the CPU; all processes must call this, rank 0 gets the content."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return dict(on_cpu(state))  # on a CPU torch returns the buffers themselves, so they are copied


def load_whole_weights(model: nn.Module, state: dict[str, Any]) -> None:
    """Load the state dict of `whole_weights` into a sharded model; every process must have the content."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))


def load_whole_state(
    model: nn.Module, optimizer: Any, kind: str, world: World, state: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Load the state dicts of `whole_state` into model and optimizer; every process must have the content."""
    if world.size > 1 and kind == "fsdp":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        load_whole_weights(model, state[0])
        set_optimizer_state_dict(model, optimizer, state[1], options=StateDictOptions(full_state_dict=True))
        return
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])


def on_cpu(value: Any) -> Any:
    """Copy the tensors in nested dicts, lists and tuples to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_cpu(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(one) for one in value)
    return value
