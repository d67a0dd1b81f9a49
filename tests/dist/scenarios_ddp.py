"""What the ranks do in the tests of DistributedDataParallel."""

import contextlib
import dataclasses

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import flatmin
from tests.helpers import BASES, CHUNKS, recipe_of, takes_chunks, wrap_fitting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """One training run under DDP; every rank takes its share of each batch."""

    method: str = "sam"
    base: str = "sgd"
    steps: int = 20
    ascent_sync: object = "all"
    branches: bool = False  # rank 0 leaves a layer out on odd steps, rank 1 on even ones
    bad: tuple[int, int, int] | None = None  # (rank, step, pass) whose loss is infinite
    scaler: bool = False
    nonfinite: str = "skip"
    door: str = "closure"
    wrapped: bool = True
    told: bool = True  # whether the optimizer is given the module
    ddp: dict = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    rho: float = 0.1
    flat: bool = False


class Net(nn.Module):
    """Two layers in a row and one beside them."""

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first, self.beside, self.last = nn.Linear(6, 7), nn.Linear(6, 7), nn.Linear(7, 3)
        for p in self.parameters():
            p.data = 0.4 * torch.randn(p.shape, generator=generator)
        self.to(dtype)

    def forward(self, x, beside=True):
        h = self.first(x)
        return self.last(torch.tanh(h + self.beside(x) if beside else h))


def batch(step, dtype, size=16):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(size, 6, generator=generator).to(dtype), torch.randint(3, (size,), generator=generator)


class Run:
    """The run of one rank."""

    def __init__(self, rank, world, setup):
        self.rank, self.world, self.setup = rank, world, setup
        self.net = Net(setup.dtype)
        self.model = DistributedDataParallel(self.net, **setup.ddp) if setup.wrapped else self.net
        self.sent = 0
        if setup.wrapped and not setup.ddp.get("static_graph"):
            self.model.register_comm_hook(None, self._count)
        self.criterion = flatmin.Criterion(nn.CrossEntropyLoss())
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if setup.scaler else None
        self.optimizer = wrap_fitting(
            BASES[setup.base](self.model.parameters()),
            recipe_of(setup.method, setup.steps, names="first.*"),
            rho=setup.rho,
            model=self.model if setup.told else None,
            criterion=self.criterion,
            ascent_sync=setup.ascent_sync,
            scaler=self.scaler,
            nonfinite=setup.nonfinite,
            flat=setup.flat,
        )

    def _count(self, state, bucket):
        self.sent += bucket.buffer().numel() * bucket.buffer().element_size()
        return default_hooks.allreduce_hook(None, bucket)

    def step(self, k):
        setup, optimizer, model = self.setup, self.optimizer, self.model
        x, y = (t.chunk(self.world)[self.rank] for t in batch(k, setup.dtype))
        beside = not (setup.branches and (k + self.rank) % 2)
        passes = 0

        def backward(chunk=None):
            nonlocal passes
            part = (x, y) if chunk is None else (x.chunk(CHUNKS)[chunk], y.chunk(CHUNKS)[chunk])
            loss = self.criterion(model(part[0], beside), part[1])
            if setup.bad == (self.rank, k, passes):
                loss = loss * torch.inf
            passes += 1
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            return loss

        def closure(chunk=None):
            optimizer.zero_grad()
            return backward(chunk)

        closures = [lambda i=i: closure(i) for i in range(CHUNKS)] if takes_chunks(optimizer) else closure
        if setup.door == "passes":
            for evaluation in optimizer.passes(CHUNKS if takes_chunks(optimizer) else 1):
                with evaluation:
                    backward(evaluation.chunk)
            (optimizer if self.scaler is None else self.scaler).step(*(() if self.scaler is None else (optimizer,)))
        else:
            optimizer.step(closures)
        if self.scaler is not None:
            self.scaler.update()


def train(rank, world, setup):
    """(weights, bytes sent in the last step, counts, scale) after the run."""
    run = Run(rank, world, setup)
    for k in range(setup.steps):
        run.sent = 0
        run.step(k)
    weights = [p.detach().clone() for p in run.net.parameters()]
    return weights, run.sent, run.optimizer.counts(), None if run.scaler is None else run.scaler.get_scale()


def accumulate(rank, world, ascent_sync):
    """(weights, bytes of a step) where each pass sends with the last of its micro-batches only."""
    run = Run(rank, world, Setup(ascent_sync=ascent_sync))
    for k in range(10):
        run.sent = 0
        x, y = (t.chunk(world)[rank] for t in batch(k, torch.float64))
        for evaluation in run.optimizer.passes():
            with evaluation:
                for i, (part_x, part_y) in enumerate(zip(x.chunk(4), y.chunk(4), strict=True)):
                    with run.model.no_sync() if i < 3 else contextlib.nullcontext():
                        (run.criterion(run.model(part_x), part_y) / 4).backward()
        run.optimizer.step()
    return [p.detach().clone() for p in run.net.parameters()], run.sent


def refusal(rank, world, setup):
    """The sentence with which the construction is refused."""
    try:
        Run(rank, world, setup)
    except ValueError as error:
        return str(error)
    return None


def manual_door(rank, world):
    """The sentence of `perturbed()` with local ascents."""
    run = Run(rank, world, Setup(ascent_sync="none"))
    run.model(batch(0, torch.float64)[0]).sum().backward()
    try:
        with run.optimizer.perturbed():
            pass
    except RuntimeError as error:
        return str(error)


def names(rank, world):
    """The names that masks see."""
    run = Run(rank, world, Setup())
    return [run.optimizer._tools.weights.names[p] for p in run.net.parameters()]


def copied(rank, world):
    """Whether an optimizer with local ascents can be pickled."""
    import pickle

    try:
        pickle.dumps(Run(rank, world, Setup(ascent_sync="none")).optimizer)
    except RuntimeError as error:
        return str(error)


def barrier(rank, world):
    dist.barrier()


def single_weight(rank, world, method):
    """How far views of a bucket take the training of one weight away from that without, on all ranks and on one."""
    groups = [None, [dist.new_group([i]) for i in range(world)][rank]]
    apart = torch.zeros(())
    for group in groups:
        ends = []
        for view in (False, True):
            torch.manual_seed(0)
            net = nn.Linear(6, 3, bias=False)
            model = DistributedDataParallel(net, process_group=group, gradient_as_bucket_view=view)
            base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            optimizer = flatmin.wrap(base, method, rho=0.1, model=model)

            def closure(k, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                x = torch.randn(8, 6, generator=torch.Generator().manual_seed(k))
                loss = nn.functional.cross_entropy(model(x), torch.arange(8) % 3)
                loss.backward()
                return loss

            for k in range(4):
                optimizer.step(lambda k=k: closure(k))
            ends.append(model.module.weight.detach())
        apart += (ends[0] - ends[1]).abs().max()
    return apart
