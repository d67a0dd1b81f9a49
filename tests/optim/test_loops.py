"""Loops and models out of the ordinary: nested optimizers, recomputed activations, compiled and wrapped models."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import flatmin
from tests.helpers import ENTRY_POINTS, drive, same_bits
from tests.optim.loops import LR, RHO, OwnNorm, buffers, by_hand, close, inputs, sam, weights

every_entry = pytest.mark.parametrize("entry", ENTRY_POINTS)


NORMS = {
    "BatchNorm": lambda: nn.BatchNorm1d(4),
    "InstanceNorm": lambda: nn.InstanceNorm1d(4, track_running_stats=True, affine=True),
    "own": OwnNorm,
}


def after_an_exception(norm, where, moment, entry):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 1), NORMS[norm](), nn.Flatten(), nn.Linear(12, 2)).double()
    optimizer, twin = sam(model), copy.deepcopy(model)
    x = torch.randn(8, 4, 3, dtype=torch.float64)
    passes = 0

    def backward():
        nonlocal passes
        passes += 1
        if passes == where and moment == "before":
            raise KeyError("planned")
        loss = model(x).square().mean()
        if passes == where:
            raise KeyError("planned")
        loss.backward()
        return loss

    names, before = [set(m.__dict__) for m in model.modules()], weights(model)
    with pytest.raises(KeyError, match="planned"):
        drive(optimizer, backward, entry)
    optimizer.abort()  # the first pass of a manual loop is the loop's own
    if (where, moment) != (1, "before"):
        twin(x)
    assert same_bits(buffers(model), buffers(twin)) and same_bits(weights(model), before)
    assert [set(m.__dict__) for m in model.modules()] == names

    passes = 2
    drive(optimizer, backward, entry)
    twin(x)
    assert same_bits(buffers(model), buffers(twin))


@every_entry
@pytest.mark.parametrize("norm", NORMS)
def test_after_an_exception_statistics_are_those_of_first_passes_and_layers_track_again(norm, entry):
    """`moment`: of the exception, before the forward or after it."""
    for where, moment in itertools.product((1, 2), ("before", "after")):
        after_an_exception(norm, where, moment, entry)


class Halves:
    """A net in two halves, each with an optimizer, and its twin that is trained by hand."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)
        ).double()
        self.twin = copy.deepcopy(self.model)
        self.body, self.head = (sam(self.model, list(half.parameters())) for half in (self.model[:3], self.model[3:]))

    def loss(self, model, step):
        return model(inputs(step)).square().mean()

    def same_seed(self, run, by_hand):
        """Run both from the same random state; the stream must go on alike as well."""
        ends = []
        for act in (run, by_hand):
            torch.manual_seed(5)
            act()
            ends.append(torch.rand(1))
        assert close(weights(self.model), weights(self.twin)) and close(buffers(self.model), buffers(self.twin))
        assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("body_entry", "head_entry"),
    [*zip(ENTRY_POINTS, (*ENTRY_POINTS[1:], ENTRY_POINTS[0]), strict=True), ("closure", "closure")],
)
def test_two_optimizers_take_turns_over_one_model(body_entry, head_entry):
    halves = Halves()
    model, twin = halves.model, halves.twin
    start = copy.deepcopy(model)

    def run():
        for k in range(6):

            def backward(k=k):
                loss = halves.loss(model, k)
                loss.backward()
                return loss

            drive(*((halves.head, backward, head_entry) if k % 2 else (halves.body, backward, body_entry)))

    def expected():
        for k in range(6):
            half = list((twin[3:] if k % 2 else twin[:3]).parameters())
            by_hand(twin, half, lambda k=k: halves.loss(twin, k).backward())

    halves.same_seed(run, expected)
    assert int(model[1].num_batches_tracked) == 6
    assert not any(torch.equal(start[i].weight, model[i].weight) for i in (0, 4))


@pytest.mark.parametrize("outer_entry", ["closure", "passes"])
@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_a_step_of_one_optimizer_inside_a_pass_of_another(outer_entry, entry):
    """The inner step runs in both passes of the outer one; only what runs at the outer w touches statistics."""
    halves = Halves()
    model, twin = halves.model, halves.twin

    def run():
        for k in range(4):

            def backward(k=k):
                loss = halves.loss(model, k)
                loss.backward()
                return loss

            def outer(backward=backward):
                drive(halves.head, backward, entry)
                halves.body.zero_grad()
                return backward()

            drive(halves.body, outer, outer_entry)

    def expected():
        body, head = list(twin[:3].parameters()), list(twin[3:].parameters())
        for k in range(4):

            def outer(k=k):
                by_hand(twin, head, lambda: halves.loss(twin, k).backward())
                for p in body:
                    p.grad = None
                halves.loss(twin, k).backward()

            by_hand(twin, body, outer)

    halves.same_seed(run, expected)
    assert int(model[1].num_batches_tracked) == 8


def exception_of_an_inner_step(entry, inner_pass, outer_pass):
    halves = Halves()
    model, twin = halves.model, halves.twin
    traces = [set(m.__dict__) for m in model.modules()]
    body, passes = weights(model[:3]), []

    def inner():
        passes.append("inner")
        if passes == ["inner", "inner", "outer"] * (outer_pass - 1) + ["inner"] * inner_pass:
            raise KeyError("planned")
        loss = halves.loss(model, 0)
        loss.backward()
        return loss

    def outer():
        drive(halves.head, inner, entry)
        halves.body.zero_grad()
        passes.append("outer")
        loss = halves.loss(model, 0)
        loss.backward()
        return loss

    with pytest.raises(KeyError, match="planned"):
        drive(halves.body, outer)
    halves.head.abort()  # the first pass of a manual loop is the loop's own
    assert same_bits(weights(model[:3]), body)
    assert [set(m.__dict__) for m in model.modules()] == traces

    twin.load_state_dict(model.state_dict())

    def backward(net):
        loss = halves.loss(net, 1)
        loss.backward()
        return loss

    halves.same_seed(
        lambda: drive(halves.body, lambda: backward(model), entry),
        lambda: by_hand(twin, list(twin[:3].parameters()), lambda: backward(twin)),
    )


@every_entry
def test_an_exception_of_an_inner_step_ends_both_and_leaves_no_trace(entry):
    for inner_pass, outer_pass in itertools.product((1, 2), (1, 2)):
        exception_of_an_inner_step(entry, inner_pass, outer_pass)


def test_a_copy_made_inside_a_pass_is_a_model_like_any_other():
    halves, copies = Halves(), []

    def backward(model):
        copies.append(copy.deepcopy(model))
        loss = halves.loss(model, 0)
        loss.backward()
        return loss

    drive(halves.body, lambda: backward(halves.model))
    model, twin = copies[0], copy.deepcopy(copies[0])
    optimizer = sam(model)
    torch.manual_seed(5)
    drive(optimizer, lambda: backward(model), "perturbed")
    torch.manual_seed(5)
    by_hand(twin, list(twin.parameters()), lambda: backward(twin))
    assert close(weights(model), weights(twin))


def test_a_step_inside_its_own_closure_is_refused_and_undone():
    halves = Halves()
    before = weights(halves.model)

    def closure():
        halves.body.zero_grad()
        loss = halves.loss(halves.model, 0)
        loss.backward()
        return loss

    def nested():
        return halves.body.step(closure)

    with pytest.raises(RuntimeError, match="an update is under way"):
        halves.body.step(nested)
    assert same_bits(weights(halves.model), before)
    halves.body.step(closure)
    assert not same_bits(weights(halves.model), before)


class Recomputing(nn.Module):
    """A net whose middle may be run again in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4))
        self.reentrant = reentrant
        self.double()

    def forward(self, x):
        h = self.first(x)
        h = self.middle(h) if self.reentrant is None else checkpoint(self.middle, h, use_reentrant=self.reentrant)
        return self.last(h)


def train_recomputing(entry, reentrant):
    """The model after some steps, each compared with what one plain pass does to the statistics."""
    model = Recomputing(reentrant)
    optimizer = sam(model)
    for k in range(4):
        single = copy.deepcopy(model)

        def backward(model=model, k=k):
            loss = model(inputs(k)).square().mean()
            loss.backward()
            return loss

        rng = torch.get_rng_state()
        backward(single)
        torch.set_rng_state(rng)
        drive(optimizer, backward, entry)
        assert same_bits(buffers(model), buffers(single))
    return model


@every_entry
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant, entry):
    plain, model = train_recomputing(entry, None), train_recomputing(entry, reentrant)
    assert close(weights(plain), weights(model))
    # Torch counts a batch again where it recomputes; the second pass adds to neither count.
    assert (int(plain.middle[1].num_batches_tracked), int(model.middle[1].num_batches_tracked)) == (4, 8)


@every_entry
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_is_recomputed_as_a_whole_trains_the_same(reentrant, entry):
    if reentrant and entry in ("perturbed", "two calls"):
        pytest.skip("reentrant checkpoints run the model without gradients, so a loop without brackets sees no forward")
    ends = []
    for recomputing in (False, True):
        model = Recomputing(None)
        optimizer = sam(model)
        for k in range(4):
            # Reentrant recomputation wants an input with a gradient.
            x = inputs(k).requires_grad_()

            def backward(model=model, recomputing=recomputing, x=x):
                y = checkpoint(model, x, use_reentrant=reentrant) if recomputing else model(x)
                loss = y.square().mean()
                loss.backward()
                return loss

            drive(optimizer, backward, entry)
        ends.append(weights(model))
    assert close(*ends)


class Named(nn.Module):
    """With a child that bears the name of DataParallel's own level."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.module = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        return self.module(self.head(self.body(x)))


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of DistributedDataParallel's own imports
@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        *((pattern, "of the model") for pattern in ("head.*", "_orig_mod.module.head.*", "module.*", "*.bias")),
        *(("module.head.*", names) for names in ("of the groups", "of both")),
    ],
)
def test_patterns_match_below_wrappers(one_process, pattern, names):
    """pytorch/pytorch: DistributedDataParallel, DataParallel and torch.compile put levels before every name."""
    ddp, compiled = nn.parallel.DistributedDataParallel, torch.compile
    wrappers = (
        lambda net: net,
        nn.DataParallel,
        lambda net: compiled(ddp(net)),
        lambda net: ddp(compiled(net)),
        lambda net: nn.DataParallel(nn.DataParallel(net)),
    )
    for wrap in wrappers:
        net = Named()
        model = wrap(net)
        base = torch.optim.SGD(model.parameters() if names == "of the model" else model.named_parameters(), lr=LR)
        given = None if names == "of the groups" else model
        optimizer = flatmin.wrap(base, "only", only=pattern, rho=RHO, model=given)
        net(inputs()).square().mean().backward()
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        optimizer.first_step()
        moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
        optimizer.abort()
        want = {n for n in before if n.endswith("bias")} if pattern == "*.bias" else None
        assert moved == (want or {f"{part}.{n}" for part in [pattern.split(".")[-2]] for n in ("weight", "bias")})


@pytest.mark.parametrize(("recipe", "params"), [("only", {"only": "*.weight"}), ("sam-on", {"kinds": "Linear"})])
def test_a_weight_that_comes_later_is_looked_up_in_the_model(recipe, params):
    """Or refused, where the model does not hold it: it would silently stay at w."""
    net = Named()
    optimizer = flatmin.wrap(torch.optim.SGD(net.parameters(), lr=LR), recipe, rho=RHO, model=net, **params)
    net.late = nn.Linear(4, 4).double()
    optimizer.add_param_group({"params": list(net.late.parameters())})
    net(net.late(inputs())).square().mean().backward()
    before = net.late.weight.detach().clone()
    optimizer.first_step()
    assert not torch.equal(net.late.weight, before)
    optimizer.abort()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 3))]})
    net(inputs()).square().mean().backward()
    with pytest.raises(ValueError, match=r"a weight of shape \(2, 3\) was added to a .*group"):
        optimizer.first_step()


def test_a_compiled_model_trains_as_the_plain_one_without_compiling_again():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv1d(2, 4, 1),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Dropout(0.4),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).double()
    net = copy.deepcopy(plain)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for model, run in ((plain, plain), (net, compiled)):
        optimizer = sam(run, model.parameters())
        torch.manual_seed(5)
        for k in range(8):

            def backward(run=run, k=k):
                loss = run(inputs(k).view(8, 2, 2)).square().mean()
                loss.backward()
                return loss

            with torch._dynamo.config.patch(error_on_recompile=k > 0):
                drive(optimizer, backward, ENTRY_POINTS[k % 4])
    assert counters["stats"]["unique_graphs"] == 2  # one that tracks, one that does not
    assert close(weights(plain), weights(net)) and close(buffers(plain), buffers(net))


class Checkpointed(nn.Module):
    """Its body is not in the graph of the loss: its backward makes another graph."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        net = self.net
        return net.module(net.head(checkpoint(net.body, x.clone().requires_grad_(), use_reentrant=True)))


class Hidden(torch.autograd.Function):
    """Runs a module again in its backward, as reversible blocks do: its weights are not in the graph of the loss."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.module(x), g)
        return x.grad, None


class Reversible(Checkpointed):
    def forward(self, x):
        net = self.net
        return net.module(net.head(Hidden.apply(x.clone().requires_grad_(), net.body)))


def gradients_and_displacements(recipe, entry, options, plain=False, wrap=None):
    """The weights after six updates; of each, which weights got a gradient in pass 1, and which moved for pass 2."""
    torch.manual_seed(0)
    net, wrap = Named(), wrap or (lambda net: net)
    model, found, steps = wrap(net), set(), []
    for name, p in net.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: found.add(name))
    rest = [*net.head.parameters(), *net.module.parameters()]
    groups = [{"params": net.body.parameters()}, {"params": rest, **options.pop("rest", {})}]
    criterion = flatmin.Criterion(nn.MSELoss()) if "esam" in recipe else None
    base = torch.optim.SGD(groups, lr=LR)
    optimizer = flatmin.wrap(base, recipe, rho=RHO, model=net, criterion=criterion, **options)
    w, seen = {}, []

    def backward(chunk=0, k=0):
        optimizer.zero_grad()
        found.clear()
        moved = {n for n, p in net.named_parameters() if not torch.equal(p, w[n])}
        outputs = model(inputs(k)[chunk::2])
        loss = outputs.square().mean() if criterion is None else criterion(outputs, torch.zeros_like(outputs))
        (Tensor.backward if plain else optimizer.backward)(loss)
        seen.append((moved, set(found)))
        return loss

    for k in range(6):
        seen.clear()
        w.update((n, p.detach().clone()) for n, p in net.named_parameters())
        drive(optimizer, partial(backward, k=k), entry)
        steps.append((seen[0][1], next((moved for moved, _ in seen if moved), set())))
    return weights(net), steps


SOME = [
    ("only", {"only": "head.*"}),
    ("only", {"only": "body.weight"}),
    ("sam", {"rest": {"rho": 0.0}}),
    ("asam+only", {"only": "*.bias"}),
    ("micro-sam+only", {"only": "head.weight"}),
    ("n-step+only", {"only": "head.*"}),
    ("esam", {"beta": 0.5, "seed": 1}),
]


@pytest.mark.parametrize("entry", ["closure", "list of closures", "passes"])
@pytest.mark.parametrize(("recipe", "options"), SOME)
def test_pass_1_computes_the_gradients_of_the_weights_that_it_moves(recipe, options, entry):
    """With optimizer.backward(loss); a closure's first three updates look at the whole graph."""
    got, steps = gradients_and_displacements(recipe, entry, dict(options))
    assert all(made == moved for made, moved in steps[3 if entry != "passes" else 0 :] if moved)
    assert any(0 < len(moved) < 6 for _, moved in steps[3:])
    same, _ = gradients_and_displacements(recipe, entry, dict(options), plain=True)
    assert all(map(torch.equal, got, same))


@pytest.mark.parametrize(
    ("recipe", "options", "wrap"),
    [
        ("gsam+only", {}, None),
        ("ae-sam+only", {}, None),
        ("only", {"diagnostics": True}, None),
        ("only", {}, Checkpointed),
        ("only", {}, Reversible),
    ],
)
def test_pass_1_computes_all_gradients_where_something_needs_them(recipe, options, wrap):
    got, steps = gradients_and_displacements(recipe, "passes", {"only": "body.*", **options}, wrap=wrap)
    assert all(len(made) == 6 for made, _ in steps) and steps[0][1] == {"body.weight", "body.bias"}
    same, _ = gradients_and_displacements(recipe, "passes", {"only": "body.*", **options}, wrap=wrap, plain=True)
    assert all(map(torch.equal, got, same))


def test_in_a_process_group_every_pass_computes_all_gradients(one_process):
    wrap = nn.parallel.DistributedDataParallel
    _, steps = gradients_and_displacements("only", "passes", {"only": "head.*"}, wrap=wrap)
    assert all(len(made) == 6 and len(moved) == 2 for made, moved in steps)
