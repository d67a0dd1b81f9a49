"""What the ranks do in the tests of `fully_shard`."""

import contextlib
import dataclasses
import io
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import flatmin
from flatmin.optim.program import EngineContext
from tests.helpers import BASES, CHUNKS, as_on_device, recipe_of, takes_chunks, wrap_fitting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """One training run; every rank takes the whole batch, so that the gradient is the unsharded run's."""

    method: str = "sam"
    base: str = "sgd"
    steps: int = 6
    sharded: bool = True
    mesh: tuple[int, ...] = ()
    low: torch.dtype | None = None
    dtype: torch.dtype = torch.float32
    device_path: bool = False
    scaler: bool = False
    bad: tuple[int, int] | None = None  # (step, pass) in which one entry of the first weight is infinite
    clip_norm: float | None = None
    rho: float = 0.1
    door: str = "closure"


class Net(nn.Module):
    """Sizes that two and four ranks do not divide, a normalisation layer, a tensor of one row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.first, self.norm = nn.Linear(6, 9), nn.LayerNorm(9)
        self.last, self.scale = nn.Linear(9, 3), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * self.last(torch.tanh(self.norm(self.first(x))))


def batch(step, dtype):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(8, 6, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator)


def full(tensor):
    """The whole of a tensor, sharded or not."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


class Run:
    """The run of one rank, or of a process alone."""

    def __init__(self, world, setup):
        self.setup = setup
        self.net = Net().to(setup.dtype)
        if setup.sharded:
            names = ("replicate", "shard")[-len(setup.mesh or (world,)) :]
            mesh = init_device_mesh("cpu", setup.mesh or (world,), mesh_dim_names=names)
            policy = MixedPrecisionPolicy()
            if setup.low is not None:
                policy = MixedPrecisionPolicy(param_dtype=setup.low, reduce_dtype=torch.float32)
            fully_shard(self.net.first, mesh=mesh, mp_policy=policy)
            fully_shard(self.net, mesh=mesh, mp_policy=policy)
        self.criterion = flatmin.Criterion(nn.CrossEntropyLoss())
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if setup.scaler else None
        self.optimizer = wrap_fitting(
            BASES[setup.base](self.net.parameters()),
            recipe_of(setup.method, 20, names="first.*"),
            rho=setup.rho,
            model=self.net,
            criterion=self.criterion,
            clip_norm=setup.clip_norm,
            scaler=self.scaler,
        )
        as_on_device(self.optimizer, setup.device_path)
        self.points = []

    def step(self, k):
        optimizer, setup = self.optimizer, self.setup
        x, y = batch(k, setup.dtype)
        passes = 0

        def backward(chunk=None):
            nonlocal passes
            part = (x, y) if chunk is None else (x.chunk(CHUNKS)[chunk], y.chunk(CHUNKS)[chunk])
            loss = self.criterion(self.net(part[0]).to(setup.dtype), part[1])
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            if setup.bad == (k, passes):
                g = self.net.first.weight.grad
                shard = g.to_local() if setup.sharded else g
                # The first rank's shard only.
                if not setup.sharded or torch.distributed.get_rank() == 0:
                    shard.view(-1)[0] = torch.inf
            passes += 1
            return loss

        def closure(chunk=None):
            optimizer.zero_grad()
            return backward(chunk)

        if setup.door == "passes":
            for evaluation in optimizer.passes(CHUNKS if takes_chunks(optimizer) else 1):
                with evaluation:
                    backward(evaluation.chunk)
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        else:
            closures = [lambda i=i: closure(i) for i in range(CHUNKS)] if takes_chunks(optimizer) else closure
            optimizer.step(closures)
        if self.scaler is not None:
            self.scaler.update()

    def run(self, steps):
        for k in steps:
            self.step(k)
        return self

    def weights(self):
        return [full(p) for p in self.net.parameters()]


def train(rank, world, setup):
    """(weights, counts, scale) after the run."""
    run = Run(world, setup).run(range(setup.steps))
    return run.weights(), run.optimizer.counts(), None if run.scaler is None else run.scaler.get_scale()


def refusal(rank, world, setup):
    """The sentence with which the construction is refused."""
    try:
        Run(world, setup)
    except ValueError as error:
        return str(error)
    return None


def half_sharded(rank, world):
    """The sentence for a net of which one layer is sharded, and for one on two meshes."""
    found = []
    for both in (False, True):
        net = Net()
        fully_shard(net.first, mesh=init_device_mesh("cpu", (world,)))
        if both:
            fully_shard(net, mesh=init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard")))
        try:
            flatmin.wrap(torch.optim.SGD(net.parameters(), lr=0.1), "sam", model=net)
        except ValueError as error:
            found.append(str(error))
    return found


def draws(rank, world, sharded):
    """What a part draws for each weight."""
    run = Run(world, Setup(method="jitter", sharded=sharded))
    inputs = run.optimizer._tools.weights.inputs(run.optimizer._tools.state)
    context = EngineContext(inputs, range(len(inputs.weights)))
    return [[full(t) for t in found] for found in (context.noise(), context.uniform(), context.bernoulli(0.5))]


def bf16_weights(rank, world):
    """(weights before, weights after) some steps with lr = 0, and the mean projection of the made on the asked eps."""
    run = Run(world, Setup(dtype=torch.bfloat16))
    run.optimizer = flatmin.wrap(
        torch.optim.SGD(run.net.parameters(), lr=0.0), "sam", rho=0.5, model=run.net, diagnostics=True
    )
    before = run.weights()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "weights in half precision")
        projections = []
        for k in range(8):
            run.step(k)
            projections.append(run.optimizer.diagnostics()["epsilon_projection"])
    return before, run.weights(), sum(projections) / len(projections)


def diagnosed(world, setup):
    """A run that records its diagnostics."""
    run = Run(world, setup)
    run.optimizer = flatmin.wrap(
        BASES["sgd"](run.net.parameters()), setup.method, rho=setup.rho, model=run.net, diagnostics=True
    )
    return run


def numbers(rank, world, setup):
    """The diagnostics of the last step."""
    return diagnosed(world, setup).run(range(3)).optimizer.diagnostics()


def numbers_of_one_that_goes_on(rank, world, setup, whole):
    """The same, with a checkpoint before the last step that another run continues from."""
    first, second = diagnosed(world, setup).run(range(2)), diagnosed(world, setup)
    model = get_model_state_dict(first.net, options=options(whole))
    optimizer = get_optimizer_state_dict(first.net, first.optimizer, options=options(whole))
    if whole:
        found = [model, optimizer]
        torch.distributed.broadcast_object_list(found)
        model, optimizer = found
    set_model_state_dict(second.net, model, options=options(whole))
    set_optimizer_state_dict(second.net, second.optimizer, optimizer, options=options(whole))
    return second.run(range(2, 3)).optimizer.diagnostics()


@contextlib.contextmanager
def quiet():
    """torch's own warnings of saving and loading in one process, or of the values that it copies."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def options(whole):
    return StateDictOptions(full_state_dict=whole, cpu_offload=whole)


def save(rank, world, setup, folder, whole):
    """Train 5 steps and save, as one dictionary on rank 0 or as shards in a folder."""
    run = Run(world, setup).run(range(5))
    model = get_model_state_dict(run.net, options=options(whole))
    optimizer = get_optimizer_state_dict(run.net, run.optimizer, options=options(whole))
    if not whole:
        with quiet():
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    elif rank == 0:
        torch.save({"model": model, "optimizer": optimizer}, f"{folder}/whole.pt")
    if world > 1:
        torch.distributed.barrier()


def resume(rank, world, setup, folder, whole):
    """Load what `save` has written, train to step 10."""
    run = Run(world, setup)
    if whole:
        saved = torch.load(f"{folder}/whole.pt", weights_only=True)
    else:
        saved = {
            "model": get_model_state_dict(run.net, options=options(whole)),
            "optimizer": get_optimizer_state_dict(run.net, run.optimizer, options=options(whole)),
        }
        with quiet():
            dcp.load(saved, checkpoint_id=folder)
    set_model_state_dict(run.net, saved["model"], options=options(whole))
    set_optimizer_state_dict(run.net, run.optimizer, saved["optimizer"], options=options(whole))
    return run.run(range(5, 10)).weights()
