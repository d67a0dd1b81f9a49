"""What several test files share: small nets, batches, and the four ways in which a loop drives an update."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flatmin
from flatmin.methods import METHODS, Direction, Named, Need, NewState, Recipe, State, StepContext, Tensors, WarmUp

# How a loop drives an update of a method of two passes; `entry_points` tells those that serve a given method.
ENTRY_POINTS = ("closure", "perturbed", "two calls", "passes")
# Every named method, and compositions that cross a stateful part, another loss and another norm.
NAMES = (*METHODS, "vasso+bisam-log+asam", "fsam+usam")
BASES = {
    "sgd": lambda groups, **kw: torch.optim.SGD(groups, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, **kw}),
    "adamw": lambda groups, **kw: torch.optim.AdamW(groups, **{"lr": 0.02, "weight_decay": 0.1, **kw}),
}


CHUNKS = 2


def takes_chunks(optimizer) -> bool:
    """Whether its method wants micro-batches."""
    return Need.MICRO_BATCHES in optimizer.recipe.needs


def entry_points(recipe: Recipe) -> tuple[str, ...]:
    """The entry points that serve a recipe."""
    of_passes = ENTRY_POINTS if recipe.two_pass else ("closure", "passes")
    return (*of_passes, "train and eval") if recipe.one_pass else of_passes


def as_on_device(optimizer, on: bool = True):
    """Let the optimizer work as it does with weights on an accelerator: verdicts stay tensors that nobody reads."""
    optimizer._tools.on_device = on
    return optimizer


def drive(optimizer, backward, entry="closure", chunks=None):
    """One update; returns the loss of pass 1.

    `backward()` computes the loss, calls backward and returns it; with micro-batches it is `backward(chunk)`.

    Args:
        optimizer: whose update.
        backward: as above.
        entry: one of ENTRY_POINTS, "list of closures", "train and eval", or "scaler" (through `optimizer.scaler`).
        chunks: the number of micro-batches; default: CHUNKS for methods and entry points that take them, else none.
    """
    if chunks is None:
        chunks = CHUNKS if takes_chunks(optimizer) or entry == "list of closures" else 0
    if entry in ("closure", "list of closures", "scaler"):

        def closure(*chunk):
            optimizer.zero_grad()
            return backward(*chunk)

        closures = [partial(closure, i) for i in range(chunks)] if chunks else closure
        if entry != "scaler":
            return optimizer.step(closures)
        loss = optimizer.scaler.step(optimizer, closures)
        optimizer.scaler.update()
        return loss
    if entry == "perturbed":
        optimizer.zero_grad()
        first = backward()
        with optimizer.perturbed():
            backward()
        optimizer.step()
    elif entry == "two calls":
        optimizer.zero_grad()
        first = backward()
        try:
            optimizer.first_step(zero_grad=True)
            backward()
            optimizer.second_step(zero_grad=True)
        except BaseException:
            optimizer.abort()
            raise
    elif entry == "train and eval":
        optimizer.train()
        try:
            optimizer.zero_grad()
            first = backward()
            optimizer.step()
        finally:
            optimizer.eval()
    else:
        assert entry == "passes", entry
        losses = []
        for evaluation in optimizer.passes(chunks=chunks or 1):
            with evaluation:
                losses.append(backward() if evaluation.chunk is None else backward(evaluation.chunk))
        optimizer.step()
        first = losses[0]
    return first.detach()


def noisy_net(seed: int = 0) -> nn.Sequential:
    """A float32 net with BatchNorm statistics and dropout masks: 6 inputs, 3 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def batch(step: int, size: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The batch of a step: 6 inputs, 3 classes; the global random numbers stay untouched."""
    g = torch.Generator().manual_seed(1000 + step)
    return torch.randn(size, 6, generator=g, dtype=dtype), torch.randint(3, (size,), generator=g)


def train(model, optimizer, criterion, steps, *, entry="closure", scheduler=None):
    """Train on `batch(k)` for k in steps; the losses at w."""
    losses = []
    for k in steps:
        x, y = batch(k, dtype=next(model.parameters()).dtype)

        def backward(chunk=None, x=x, y=y):
            if chunk is not None:
                x, y = x.chunk(CHUNKS)[chunk], y.chunk(CHUNKS)[chunk]
            loss = criterion(model(x), y)
            optimizer.backward(loss if optimizer.scaler is None else optimizer.scaler.scale(loss))
            return loss

        losses.append(drive(optimizer, backward, entry))
        if scheduler is not None:
            scheduler.step()
    return losses


def bits(tensors) -> list[Tensor]:
    """Integer copies, so that equality is bit for bit: -0.0 is not 0.0 and nan equals itself."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.detach().clone().view(kinds[t.element_size()]) for t in tensors]


def same_bits(a, b) -> bool:
    """Whether two structures of dicts, lists and tensors are equal, tensors bit for bit and of one dtype."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits([a, b]))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_bits(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


@dataclass(frozen=True, kw_only=True)
class Jitter(Direction):
    """A direction with random draws, one number and one tensor per weight to remember."""

    needs: ClassVar = frozenset({Need.RANDOM})
    slots: ClassVar = {"count": "scalar", "last": "param"}

    def __call__(self, g: Tensors | None, state: State, c: StepContext) -> tuple[Tensors | None, NewState]:
        count = torch.zeros(()) if state["count"] is None else state["count"]
        last = [x if s is None else s for x, s in zip(g, state["last"], strict=True)]
        d = [x + 0.1 * n + 0.01 * s * count for x, n, s in zip(g, c.noise(), last, strict=True)]
        return d, {"count": count + 1, "last": [x.clone() for x in g]}


def recipe_of(name: str, total: int = 20, table=None, names: str = "0.*", **params) -> Recipe:
    """A method by name with what its table entry cannot know: the length of the training, the names of the model.

    "jitter" is a recipe that draws and keeps both kinds of state.
    """
    if name == "jitter":
        return Recipe(direction=Jitter(), name="jitter")
    recipe = flatmin.compose(name, table, **params).for_length(total, data_size=1000)
    instead = {"only": Named(only=names), "warm-up": WarmUp(steps=2)}.get(name)
    return dataclasses.replace(recipe, **{instead.kind: instead}) if instead else recipe


def fitting(base: torch.optim.Optimizer, recipe: Recipe) -> torch.optim.Optimizer:
    """The base itself, or SGD over the same groups for a method that works on nothing else."""
    bare = Need.BARE_SGD in recipe.needs
    if not (bare or (Need.SGD in recipe.needs and not isinstance(base, torch.optim.SGD))):
        return base
    kept = [{k: g[k] for k in ("params", "lr", "rho") if k in g} for g in base.param_groups]
    return torch.optim.SGD(kept, lr=0.05, momentum=0.0 if bare else 0.9)


def wrap_fitting(base: torch.optim.Optimizer, recipe: Recipe, **options) -> flatmin.SAM:
    """`flatmin.wrap`, around SGD where the method works on nothing else."""
    return flatmin.wrap(fitting(base, recipe), recipe, **options)


# Four methods that remember something of every kind that any method does, in short periods.
REPRESENTATIVES = {"rho-lr": {}, "stale-sam": {}, "ssam-d": {"interval": 3}, "looksam": {"k": 2}}


class Session:
    """A small training run with everything that a checkpoint must hold."""

    def __init__(self, method: str, base: str = "sgd", seed: int = 0, *, diagnostics: bool = False, **params) -> None:
        self.model = noisy_net(seed)
        groups = [
            {"params": list(self.model[0].parameters()), "rho": 0.1},
            {"params": list(self.model[1].parameters()), "rho": 0.0},
            {"params": list(self.model[4].parameters())},
        ]
        self.criterion = flatmin.Criterion(nn.CrossEntropyLoss(label_smoothing=0.1))
        self.optimizer = wrap_fitting(
            BASES[base](groups),
            recipe_of(method, **{**REPRESENTATIVES.get(method, {}), **params}),
            model=self.model,
            criterion=self.criterion,
            diagnostics=diagnostics,
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)

    def scaled(self) -> Session:
        """With a GradScaler whose scale grows now and then."""
        self.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
        return self

    def run(self, steps, entry: str = "closure") -> Session:
        """Train on the batches of these steps."""
        train(self.model, self.optimizer, self.criterion, steps, entry=entry, scheduler=self.scheduler)
        return self

    def save(self) -> dict:
        """The checkpoint, with the global random state."""
        saved = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        }
        scaler = self.optimizer.scaler
        return saved if scaler is None else {**saved, "scaler": scaler.state_dict()}

    def load(self, saved: dict) -> Session:
        """Take a checkpoint."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        if "scaler" in saved:
            self.optimizer.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        return self


def resume_all(source: str, target: str) -> None:
    """Continue every saved run of a file from step 10 to 20: the other process of the resume test."""
    torch.set_num_threads(1)
    saved = torch.load(source, weights_only=True)
    torch.save(
        {k: Session(*k.split("/"), seed=9).load(v).run(range(10, 20)).save() for k, v in saved.items()},
        target,
    )


def cosine(step: int, total: int) -> float:
    """The factor of cosine annealing to zero."""
    return 0.5 * (1.0 + math.cos(math.pi * step / total))


def soft_targets(y: Tensor, classes: int, smoothing: float) -> Tensor:
    """1 - s on the true class plus s/K on every class."""
    return (1.0 - smoothing) * F.one_hot(y, classes).double() + smoothing / classes


def sam_by_hand(parameters, rho: float, backward, base) -> None:
    """One step of SAM from its formula: g at w, g_s at w + rho g / ||g||, back to w, the base steps with g_s."""
    parameters = list(parameters)
    for p in parameters:
        p.grad = None
    backward()
    with torch.no_grad():
        start = [p.clone() for p in parameters]
        grads = [p.grad.to_dense() for p in parameters]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for p, g in zip(parameters, grads, strict=True):
            p.add_(g, alpha=rho / float(norm))
            p.grad = None
    backward()
    with torch.no_grad():
        for p, w in zip(parameters, start, strict=True):
            p.copy_(w)
    base.step()
