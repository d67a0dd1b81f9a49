"""Every method in the loops of several processes."""

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import flatmin
from flatmin.methods import METHODS
from flatmin.optim.support import Loop
from tests.dist.scenarios_fsdp import Net, batch
from tests.helpers import BASES, drive, recipe_of, wrap_fitting


def meet_all(rank, world):
    """(method, loop) -> the sentence of the refusal, or None after a step."""
    loops = (Loop.DDP, Loop.LOCAL, Loop.SHARDED)
    return {(method, loop.name): _meet(method, loop) for method in METHODS for loop in loops}


def _meet(method, loop):
    net = Net()
    model = fully_shard(net) if loop is Loop.SHARDED else DistributedDataParallel(net)
    criterion = flatmin.Criterion(nn.CrossEntropyLoss())
    try:
        optimizer = wrap_fitting(
            BASES["sgd"](model.parameters()),
            recipe_of(method, names="first.*"),
            model=model,
            criterion=criterion,
            ascent_sync="none" if loop is Loop.LOCAL else "all",
        )
    except ValueError as error:
        return str(error)
    x, y = batch(0, next(net.parameters()).dtype)

    def backward(chunk=None):
        part = (x, y) if chunk is None else (x.chunk(2)[chunk], y.chunk(2)[chunk])
        loss = criterion(model(part[0]), part[1])
        optimizer.backward(loss)
        return loss

    drive(optimizer, backward)
    return None
