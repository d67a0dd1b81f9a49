"""`flat=True`: weights in few large tensors. `test_stateful.py` runs every method with it; here is what is its own."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import flatmin
from flatmin.methods import METHODS, Combine, Descent
from tests.helpers import as_on_device, drive, entry_points, recipe_of, same_bits, wrap_fitting

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam without eps": lambda p: torch.optim.Adam(p, lr=0.01, eps=0),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


class Net(nn.Module):
    """Convolutions in two memory formats, a scalar, weights of 1 to 288 entries, and a branch that may be left out."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv, self.norm = nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5)
            self.deep = nn.Conv2d(5, 7, 3).to(memory_format=torch.channels_last)
            self.branch, self.head = nn.Linear(7, 7), nn.Linear(7, 3)
            self.scale = nn.Parameter(torch.ones(()))
        self.double()

    def forward(self, x, branch=True):
        x = torch.tanh(self.deep(torch.tanh(self.norm(self.conv(x))))).mean((2, 3)) * self.scale
        return self.head(self.branch(x) if branch else x)


class Loop:
    """A net with its optimizer, and batches by number."""

    def __init__(self, flat, method="sam", base="sgd", net=None, device=False, **options):
        self.net = net or Net()
        self.criterion = flatmin.Criterion(nn.CrossEntropyLoss())
        groups = [{"params": [*self.net.conv.parameters(), self.net.scale]}]
        rest = [p for p in self.net.parameters() if all(p is not q for q in groups[0]["params"])]
        groups.append({"params": rest, "lr": 0.02})
        options = {"rho": 0.1, "model": self.net, "criterion": self.criterion, **options}
        recipe = recipe_of(method, 20) if isinstance(method, str) else method
        self.optimizer = wrap_fitting(BASES[base](groups), recipe, flat=flat, **options)
        as_on_device(self.optimizer, device)

    def backward(self, k, branch=True, factor=1.0):
        g = torch.Generator().manual_seed(k)
        x = torch.randn(8, 2, 7, 7, generator=g, dtype=torch.float64)
        loss = self.criterion(self.net(x, branch), torch.randint(3, (8,), generator=g))
        self.optimizer.backward(factor * loss)
        return loss

    def steps(self, *numbers, entry="closure", branches=(True,)):
        for k in numbers:
            drive(self.optimizer, lambda k=k: self.backward(k, branches[k % len(branches)]), entry)
        return self


def near(a, b, tolerance=1e-9):
    """Two checkpoints agree up to rounding, with the same keys, shapes, dtypes and strides."""
    if isinstance(a, torch.Tensor):
        alike = (a.shape, a.dtype) == (b.shape, b.dtype)
        return alike and torch.allclose(a, b, rtol=1e-7, atol=tolerance, equal_nan=True)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[k], b[k], tolerance) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(near(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return a == b


def together(one, other):
    assert near(one.net.state_dict(), other.net.state_dict())
    assert near(one.optimizer.state_dict(), other.optimizer.state_dict())


def blocks(loop):
    return [len(block.members) for block in loop.optimizer._tools.flat.blocks]


@pytest.mark.parametrize("base", BASES)
def test_every_entrywise_base_steps_on_blocks_as_on_weights(base):
    flat = Loop(True, base=base).steps(*range(4))
    together(flat, Loop(False, base=base).steps(*range(4)))
    assert len(blocks(flat)) == 2  # one for each param group
    assert flat.optimizer._tools.flat.base.possible == (base != "adam without eps")


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("name", [n for n in METHODS if flatmin.compose(n).joins])
def test_every_method_that_joins_does_the_same(name, device):
    """In the loop that comes next in turn, with a branch that leaves the graph for good in between."""
    entry = entry_points(recipe_of(name, 20))[list(METHODS).index(name) % len(entry_points(recipe_of(name, 20)))]
    made = [
        Loop(flat, name, device=device).steps(0, 1, entry=entry).steps(2, 3, 4, branches=(False,)).steps(5)
        for flat in (True, False)
    ]
    together(*made)


@pytest.mark.parametrize("method", ["sam", "vasso", "gsam", "momentum-sam"])
@pytest.mark.parametrize(("base", "assigns"), [("sgd", False), ("sgd", True), ("adam", False)])
def test_a_weight_without_a_gradient_is_left_alone(method, base, assigns):
    """The branch comes and goes, also with gradients that the closure changes and those of a second pass alone."""
    made = []
    for flat in (True, False):
        loop = Loop(flat, method, base)
        for k, uses in enumerate([(True,), (False,), (True, False), (False, True), (False,), (False,), (True,)]):
            calls = []

            def closure(loop=loop, k=k, uses=uses, calls=calls):
                loop.optimizer.zero_grad()
                calls.append(uses[min(len(calls), len(uses) - 1)])
                loss = loop.backward(k, calls[-1])
                if not assigns:
                    nn.utils.clip_grad_norm_(loop.net.parameters(), 0.05)
                for p in loop.net.parameters() if assigns else ():
                    p.grad = None if p.grad is None else p.grad * 0.5
                return loss

            loop.optimizer.step(closure)
        made.append(loop)
    together(*made)


def test_checkpoints_load_both_ways_and_resume_bit_for_bit():
    flat, plain = Loop(True, "vasso", "adam").steps(0, 1, 2), Loop(False, "vasso", "adam").steps(0, 1, 2)
    file = io.BytesIO()
    torch.save([flat.net.state_dict(), flat.optimizer.state_dict()], file)
    for source, target in ((flat, False), (plain, True), (flat, True)):
        file.seek(0)
        saved = [source.net.state_dict(), source.optimizer.state_dict()]
        saved = torch.load(file, weights_only=True) if source is flat else copy.deepcopy(saved)
        new = Loop(target, "vasso", "adam", net=Net(seed=1))
        new.net.load_state_dict(saved[0])
        new.optimizer.load_state_dict(saved[1])
        want = copy.deepcopy(source.net), source.optimizer
        new.steps(3, 4)
        other = Loop(source is flat, "vasso", "adam", net=want[0])
        other.optimizer.load_state_dict(copy.deepcopy(want[1].state_dict()))
        other.steps(3, 4)
        together(new, other)
        if target and source is flat:
            assert same_bits(new.optimizer.state_dict(), other.optimizer.state_dict())
    inner = flatmin.base_state_dict(flat.optimizer.state_dict())["state"]
    assert all(set(entries) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"} for entries in inner.values())
    assert len({entries["step"].data_ptr() for entries in inner.values()}) == len(inner)  # nobody counts them as one


def test_copies_are_independent_and_go_on_alike():
    loop = Loop(True, "gsam").steps(0, 1)
    twin = copy.deepcopy(loop)
    loop.steps(2)
    assert not near(twin.net.state_dict(), loop.net.state_dict())
    together(loop, twin.steps(2))


def test_it_follows_what_others_do_to_weights_and_state():
    """Frozen weights, steps of the base alone, a replaced state, a hook, weights moved by pointer, a new group."""
    made = []
    for flat in (True, False):
        loop = Loop(flat, "vasso", "adam").steps(0, 1)
        base = loop.optimizer.base
        loop.net.deep.weight.requires_grad_(False)
        loop.steps(2)
        loop.net.deep.weight.requires_grad_(True)
        loop.steps(3)
        loop.optimizer.zero_grad()
        loop.backward(4, branch=False)
        base.step()
        loop.optimizer.zero_grad()
        loop.steps(5)
        base.state[loop.net.head.bias]["exp_avg"] = torch.ones(3, dtype=torch.float64)
        loop.steps(6)
        base.state.clear()
        loop.steps(7)
        seen = []
        handle = base.register_step_pre_hook(lambda opt, *_, seen=seen: seen.append(opt.param_groups[0]["params"]))
        loop.steps(8)
        assert [w.shape for w in seen[0]] == [w.shape for w in base.param_groups[0]["params"]]
        handle.remove()
        for p in loop.net.parameters():
            p.data = p.data.clone()
        loop.steps(9)
        loop.net.extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
        loop.net.head.register_forward_hook(lambda module, x, y, net=loop.net: y * net.extra)
        loop.optimizer.add_param_group({"params": [loop.net.extra], "rho": 0.0})
        loop.steps(10, 11)
        made.append(loop)
    together(*made)


def test_another_dtype():
    loop = Loop(True).steps(0)
    loop.net.float()
    x = torch.randn(8, 2, 7, 7)

    def backward():
        loss = loop.net(x).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        drive(loop.optimizer, backward, "perturbed")
    assert {p.dtype for p in loop.net.parameters()} == {torch.float32} and len(blocks(loop)) == 2
    assert all(bool(p.isfinite().all()) for p in loop.net.parameters())


@pytest.mark.parametrize("flat", [True, False])
def test_the_graph_of_an_earlier_pass_is_refused(flat):
    """Weights that change as a part of a buffer would let autograd use them with activations of other weights."""
    loop = Loop(flat)
    x = torch.randn(8, 2, 7, 7, dtype=torch.float64)
    cached = loop.net(x).square().mean()

    def closure():
        loop.optimizer.zero_grad()
        cached.backward(retain_graph=True)
        return cached

    with pytest.raises(RuntimeError, match=r"used the graph of an earlier pass|modified by an inplace operation"):
        loop.optimizer.step(closure)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpoints_accumulation_and_clipping(use_reentrant):
    made = []
    for flat in (True, False):
        loop = Loop(flat, clip_norm=0.02)
        x = torch.randn(8, 2, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

        def part(k, loop=loop, x=x):
            loop.optimizer.zero_grad()
            inner = x[4 * k : 4 * k + 4].requires_grad_()
            loss = checkpoint(loop.net, inner, use_reentrant=use_reentrant).square().mean()
            loss.backward()
            return loss.detach()

        for _ in range(3):
            loop.optimizer.step([lambda p=part: p(0), lambda p=part: p(1)])
        made.append(loop)
    together(*made)
    gradients = [p.grad for p in made[0].net.parameters()]
    assert math.isclose(float(torch.cat([g.flatten() for g in gradients]).norm()), 0.02, rel_tol=1e-3)


@pytest.mark.parametrize("manual", [False, True])
def test_a_grad_scaler(manual):
    made = []
    for flat in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        loop = Loop(flat, "gsam", scaler=scaler)
        for k in range(5):
            factor = math.inf if k == 2 else 1.0

            def run(loop=loop, k=k, factor=factor, scaler=scaler):
                loss = factor * loop.criterion(*batch(loop.net, k))
                scaler.scale(loss).backward()
                return loss

            if manual:
                loop.optimizer.zero_grad()
                run()
                with loop.optimizer.perturbed():
                    run()
                scaler.unscale_(loop.optimizer)
                nn.utils.clip_grad_norm_(loop.net.parameters(), 0.5)
                scaler.step(loop.optimizer)
            else:
                scaler.step(loop.optimizer, lambda run=run, loop=loop: (loop.optimizer.zero_grad(), run())[1])
            scaler.update()
        made.append(loop)
        assert loop.optimizer.counts()["skipped_steps"] == 1
    together(*made)


def batch(net, k):
    g = torch.Generator().manual_seed(k)
    return net(torch.randn(8, 2, 7, 7, generator=g, dtype=torch.float64)), torch.randint(3, (8,), generator=g)


class Own(Combine):
    """A user's part that keeps the list it was given, and one that says nothing about entries."""

    slots = {"last": "param"}  # noqa: RUF012
    uses_gradient = True
    entrywise = True

    def __call__(self, g, gs, state, c):
        return [x * 0.5 for x in gs[0]], {"last": gs[0]}


def test_parts_of_ones_own():
    class Heir(Descent):
        pass

    assert flatmin.compose("sam").joins and not flatmin.Recipe(combine=Heir()).joins
    flat, plain = (Loop(flat, flatmin.Recipe(combine=Own(), name="own")).steps(0, 1, 2) for flat in (True, False))
    together(flat, plain)


def test_what_cannot_be_joined_is_refused_with_a_sentence():
    def build(*weights, **options):
        return flatmin.SAM(torch.optim.SGD(list(weights), lr=0.1), flat=True, **options)

    whole = torch.randn(6)
    views = [nn.Parameter(whole[:4]), nn.Parameter(whole[2:])]
    with pytest.raises(ValueError, match="memory of their own, but two of them share memory"):
        build(*views)

    class Odd(nn.Parameter):
        pass

    with pytest.raises(ValueError, match="ordinary tensors as weights, got Odd"):
        build(Odd(torch.ones(2)))
    sharded = nn.Parameter(torch.ones(2))
    sharded._fsdp_flattened = True
    with pytest.raises(ValueError, match="whole weights, but these are sharded"):
        build(sharded)
    optimizer = build(nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match="these are sharded"):
        optimizer.add_param_group({"params": [sharded]})
    assert len(optimizer.param_groups) == 1
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer, before = build(embedding.weight), embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="dense buffers, but the loss gave a sparse one"):
        optimizer.step(lambda: embedding(torch.tensor([1])).sum().backward())
    assert torch.equal(embedding.weight, before)

    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("whole", torch.randn(4))
            self.weight = nn.Parameter(self.whole.view(2, 2))

    model = Viewed()
    with pytest.raises(ValueError, match="buffer whole of the model shares memory with a weight"):
        build(*model.parameters(), model=model)
