"""What the ranks do in the tests of whole runs in several processes."""

from pathlib import Path

import torch

from flatmin.train import evaluate, loop
from flatmin.train.config import RunConfig
from flatmin.train.folder import RunFolder
from flatmin.train.options import Options
from flatmin.train.trainer import Trainer


class Stop(Exception):
    """The end of a run from outside, in all ranks at once."""


class Stopping(Trainer):
    """A trainer that refuses the updates after one of them."""

    last: int | None = None

    def step(self, batch):
        if self.steps == self.last:
            raise Stop
        return super().step(batch)


def run(rank, world, path: Path, config: RunConfig, options: Options, last: int | None = None):
    """Begin or continue a run, up to an update: why it failed, and this rank's weights at the end."""
    weights, said = {}, []
    Stopping.last = last
    real, loop.Trainer = loop.Trainer, Stopping
    chunk, evaluate.CHUNK["cpu"] = evaluate.CHUNK["cpu"], 8  # so that all have a share in evaluations
    try:
        result = loop.train(
            config,
            folder=RunFolder(path),
            resume=True,
            options=options,
            on_event=said.append,
            on_end=lambda model: weights.update({k: whole(v) for k, v in model.state_dict().items()}),
        )
    except Stop:
        return "stopped", {}
    finally:
        loop.Trainer, evaluate.CHUNK["cpu"] = real, chunk
    return result.failure, weights


def refusal(rank, world, path: Path, config: RunConfig, options: Options) -> str:
    """The sentence with which a run is refused."""
    try:
        loop.train(config, folder=RunFolder(path), resume=True, options=options)
    except ValueError as error:
        return str(error)
    return ""


def whole(tensor):
    """The whole of a tensor, sharded or not."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def buffers(rank, world):
    """The buffers of a net that differs from rank to rank, after they were shared."""
    from flatmin.train.processes import World

    net = torch.nn.BatchNorm1d(3)
    net.running_mean.fill_(rank + 1)
    net.num_batches_tracked.fill_(rank + 5)
    World(rank, world, rank).share_buffers(net)
    return {name: b.clone() for name, b in net.named_buffers()}
