"""The arguments of the user's loss count in every method that works on more than its mean over the batch.

Each reference is written here from the losses' formulas: a numerator and a share for every element of the target, so
that a loss is sum(numerator) / sum(share) over the elements that count.
"""

import contextlib
import copy
import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.optim.loss_arguments import unreduced

K, RHO = 4, 0.3
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)


class Focal(nn.Module):
    """A loss as people write it: its own mean over what it does not ignore."""

    def __init__(self, reduction="mean", ignore_index=255):
        super().__init__()
        self.reduction, self.ignore_index = reduction, ignore_index

    def forward(self, outputs, target):
        nll = F.cross_entropy(outputs, target, reduction="none", ignore_index=self.ignore_index)
        loss = (1 - (-nll).exp()) ** 2 * nll
        return loss if self.reduction == "none" else loss.sum() / (target != self.ignore_index).sum()


# -- formulas: (numerator, share) of each element ------------------------------------------------------------------


def entropy(z, y, *, ignore=-100, weight=None, smoothing=0.0, gamma=0):
    logp = z.log_softmax(1)
    counted = (y != ignore).double()
    safe = torch.where(y != ignore, y, 0)
    w = torch.ones(K, dtype=z.dtype) if weight is None else weight
    nll = -logp.gather(1, safe[:, None])[:, 0]
    spread = -(logp * w.view(-1, *[1] * (z.ndim - 2))).sum(1) / K
    loss = (1 - smoothing) * w[safe] * nll + smoothing * spread
    return loss * (1 - (-nll).exp()) ** gamma * counted, w[safe] * counted


def soft(z, y, weight):
    return -(z.log_softmax(1) * y * weight.view(-1, *[1] * (z.ndim - 2))).sum(1), torch.ones(z.shape[0], *z.shape[2:])


def binary(z, y, positive):
    return positive * y * F.softplus(-z) + (1 - y) * F.softplus(z), torch.ones_like(z)


def square(z, y):
    return (z - y) ** 2, torch.ones_like(z)


def divergence(z, y):
    return y * (y.log() - z), torch.full_like(z, 1 / K)


INDICES, SOFT = "class indices", "shares of the classes"
POSITIVE = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64)
LOSSES = {
    "ignore_index": (nn.CrossEntropyLoss(ignore_index=255), INDICES, partial(entropy, ignore=255)),
    "weight": (nn.CrossEntropyLoss(weight=WEIGHT), INDICES, partial(entropy, weight=WEIGHT)),
    "all": (
        nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=255, label_smoothing=0.2),
        INDICES,
        partial(entropy, weight=WEIGHT, ignore=255, smoothing=0.2),
    ),
    "sum": (nn.CrossEntropyLoss(ignore_index=255, reduction="sum"), INDICES, partial(entropy, ignore=255)),
    "none": (nn.CrossEntropyLoss(reduction="none"), INDICES, entropy),
    "soft": (nn.CrossEntropyLoss(weight=WEIGHT), SOFT, partial(soft, weight=WEIGHT)),
    "function": (F.cross_entropy, INDICES, entropy),
    "partial": (
        partial(F.cross_entropy, ignore_index=255, weight=WEIGHT),
        INDICES,
        partial(entropy, ignore=255, weight=WEIGHT),
    ),
    "focal": (Focal(), INDICES, partial(entropy, ignore=255, gamma=2)),
    "mse": (nn.MSELoss(), SOFT, square),
}
# Of outputs (N, K) alone.
FLAT = {
    "binary": (nn.BCEWithLogitsLoss(pos_weight=POSITIVE), SOFT, partial(binary, positive=POSITIVE)),
    "batchmean": (nn.KLDivLoss(reduction="batchmean"), SOFT, divergence),
}
SHAPES = {"classes": (), "sequences": (5,), "maps": (3, 3)}
CASES = {name: ("classes", "maps") for name in LOSSES} | dict.fromkeys(FLAT, ("classes",))
CASES |= {name: ("classes", "maps", "sequences") for name in ("all", "soft")}


def data(kind, shape, ignore=False, n=9):
    g = torch.Generator().manual_seed(len(shape))
    x = torch.randn(n, 3, *shape, generator=g, dtype=torch.float64)
    if kind != INDICES:
        y = torch.rand(n, K, *shape, generator=g, dtype=torch.float64) + 0.1
        return x, y / y.sum(1, keepdim=True)
    y = torch.randint(K, (n, *shape), generator=g)
    if ignore:
        # More than half of all, and the whole second sample.
        y[torch.rand(n, *shape, generator=g) < 0.6] = y[1] = 255
    return x, y


def net_of(shape):
    torch.manual_seed(1)
    return [nn.Linear, partial(nn.Conv1d, kernel_size=1), partial(nn.Conv2d, kernel_size=1)][len(shape)](3, K).double()


def step(method, loss, x, y, net, *, reduce=lambda loss: loss, per_sample=None, chooses=False, **options):
    """What the base takes in one step of a method, and the loss that the closure returns.

    With `chooses`, the net runs on the chosen samples only.
    """
    net, criterion = copy.deepcopy(net), flatmin.Criterion(loss, per_sample)
    before = nn.utils.parameters_to_vector(net.parameters()).detach()
    base = torch.optim.SGD(net.parameters(), lr=1.0)
    optimizer = flatmin.wrap(base, method, rho=RHO, model=net, criterion=criterion, **options)

    def closure():
        optimizer.zero_grad()
        index = optimizer.select_samples(lambda: criterion(net(x), y)) if chooses else slice(None)
        found = reduce(criterion(net(x[index]), y[index]))
        optimizer.backward(found)
        return found

    told = optimizer.step(closure)
    return before - nn.utils.parameters_to_vector(net.parameters()).detach(), told


class Reference:
    """A linear net as a function of one flat vector, and a loss by its formula."""

    def __init__(self, net, formula, x, y, total=False):
        self.net, self.formula, self.x, self.y, self.total = net, formula, x, y, total
        self.w = nn.utils.parameters_to_vector(net.parameters()).detach()

    def outputs(self, w):
        split = w.split([p.numel() for p in self.net.parameters()])
        named = {n: v.view_as(p) for (n, p), v in zip(self.net.named_parameters(), split, strict=True)}
        return torch.func.functional_call(self.net, named, (self.x,))

    def loss(self, w, index=slice(None)):
        top, share = (t[index] for t in self.formula(self.outputs(w), self.y))
        return top.sum() / (1 if self.total else share.sum())

    def samples(self, w):
        """The mean over what counts of each sample, and of which samples anything does."""
        top, share = (t.flatten(1) if t.ndim > 1 else t[:, None] for t in self.formula(self.outputs(w), self.y))
        counted = (share > 0).sum(1)
        return top.sum(1) / counted.clamp(min=1), counted > 0

    def grad(self, function, w):
        return torch.func.grad(function)(w)

    def climb(self, q, mask=1.0):
        return self.w + mask * RHO * q / q.norm()


def case(name, shape):
    loss, kind, formula = {**LOSSES, **FLAT}[name]
    ignores = getattr(loss, "ignore_index", getattr(loss, "keywords", {}).get("ignore_index", -100)) == 255
    x, y = data(kind, SHAPES[shape], ignores)
    net = net_of(SHAPES[shape])
    reference = Reference(net, formula, x, y, total=getattr(loss, "reduction", "") == "sum")
    return loss, x, y, net, reference, torch.mean if name == "none" else (lambda loss: loss)


def esam_descends(name, shape):
    loss, x, y, net, r, reduce = case(name, shape)
    at = r.climb(r.grad(r.loss, r.w))
    rise, counted = r.samples(at)[0] - r.samples(r.w)[0], r.samples(r.w)[1]
    for gamma, chooses in itertools.product((0.3, 0.5, 1.0), (False, True)):
        chosen = rise.where(counted, -math.inf).argsort(descending=True)[: int(gamma * len(y))]
        u, told = step("esam", loss, x, y, net, reduce=reduce, chooses=chooses, beta=1.0, gamma=gamma)
        torch.testing.assert_close(u, r.grad(lambda w, i=chosen: r.loss(w, i), at), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(told, r.loss(r.w), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_esam_descends_on_the_loss_of_the_chosen_samples_alone(name):
    """A mean over the counted, class-weighted elements of the chosen (qubvel-org/segmentation_models.pytorch#852)."""
    for shape in CASES[name]:
        esam_descends(name, shape)


def ssam_f_takes(name, shape):
    loss, x, y, net, r, reduce = case(name, shape)
    some = r.samples(r.w)[1].nonzero()[:3, 0]
    fisher = sum(r.grad(lambda w, i=i: r.samples(w)[0][i], r.w) ** 2 for i in some)
    mask = torch.zeros_like(r.w)
    mask[fisher.argsort(descending=True, stable=True)[: len(r.w) // 2]] = 1.0
    u, _ = step("ssam-f", loss, x, y, net, reduce=reduce, num_samples=3, sparsity=0.5)
    torch.testing.assert_close(u, r.grad(r.loss, r.climb(r.grad(r.loss, r.w), mask)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_ssam_f_takes_the_fisher_diagonal_of_the_first_samples_that_count(name):
    for shape in CASES[name]:
        ssam_f_takes(name, shape)


@pytest.mark.parametrize("name", [name for name in CASES if LOSSES.get(name, FLAT.get(name))[1] == INDICES])
def test_bisam_climbs_the_bound_over_the_targets_that_count(name):
    """Class weights weigh the 0-1 loss that it bounds; label smoothing is in the descent loss alone.

    Without normalisation (usam) the length of the ascent shows how Q is reduced.
    """
    for method, shape in itertools.product(("bisam-log", "bisam-tanh"), CASES[name]):
        climbs_the_bound(method, name, shape)


def climbs_the_bound(method, name, shape):
    loss, x, y, net, r, reduce = case(name, shape)

    def bound(w):
        z = r.outputs(w)
        share = r.formula(z, y)[1]
        margin = z - z.gather(1, torch.where(y == 255, 0, y)[:, None])
        phi = 1 - F.softplus(math.log(math.e - 1) - margin) if method == "bisam-log" else torch.tanh(0.1 * margin)
        mu = 1.0 if method == "bisam-log" else 10.0
        q = torch.logsumexp(mu * phi, 1) / mu * share
        return q.sum() / (1 if r.total else share.sum())

    at = r.w + RHO * r.grad(bound, r.w)
    u, told = step(f"{method}+usam", loss, x, y, net, reduce=reduce)
    torch.testing.assert_close(u, r.grad(r.loss, at), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(told, r.loss(r.w), rtol=1e-12, atol=0)


# -- batches of which little or nothing counts ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sam", "esam", "bisam-log", "bisam-tanh", "ssam-f", "bisam-log+esam"])
def test_a_batch_of_which_nothing_counts_is_what_it_is_for_the_loss_itself(method):
    """torch: the value nan for a mean and 0 for a sum, and gradients of 0."""
    for kind, reduction in itertools.product(("nothing counts", "empty"), ("mean", "sum")):
        net, n = net_of((3, 3)), 0 if kind == "empty" else 4
        x, y = torch.randn(n, 3, 3, 3, dtype=torch.float64), torch.full((n, 3, 3), 255)
        u, told = step(method, nn.CrossEntropyLoss(ignore_index=255, reduction=reduction), x, y, net)
        assert math.isnan(told) if reduction == "mean" else told == 0
        assert torch.equal(u, torch.zeros_like(u))


def test_the_first_mask_of_ssam_f_waits_for_a_batch_that_counts():
    net, (x, y) = net_of((3, 3)), data(INDICES, (3, 3), True)
    criterion = flatmin.Criterion(nn.CrossEntropyLoss(ignore_index=255))
    optimizer = flatmin.wrap(torch.optim.SGD(net.parameters(), lr=0.1), "ssam-f", criterion=criterion, diagnostics=True)
    lengths = []
    for target in (torch.full_like(y, 255), y, y):

        def closure(target=target):
            optimizer.zero_grad()
            loss = criterion(net(x), target)
            optimizer.backward(loss)
            return loss

        optimizer.step(closure)
        lengths.append(optimizer.diagnostics().get("epsilon_norm", 0.0))
    assert lengths[0] == 0 and min(lengths[1:]) > 0


# -- how the criterion is called -----------------------------------------------------------------------------------


def test_a_loss_of_more_arguments_works_as_the_loss_itself():
    """By position and by name, unbound, without gradients and in a step."""
    torch.manual_seed(0)
    names = ("log_probs", "targets", "input_lengths", "target_lengths")
    rest = (torch.randint(1, 4, (2, 3)), torch.tensor([5, 5]), torch.tensor([3, 2]))
    x, net, loss = torch.randn(5, 2, 6), nn.Linear(6, 4), nn.CTCLoss()
    criterion = flatmin.Criterion(loss)
    optimizer = flatmin.wrap(torch.optim.SGD(net.parameters(), lr=0.1), "sam", criterion=criterion, diagnostics=True)

    def forward(function, named):
        out = net(x).log_softmax(2)
        return function(**dict(zip(names, (out, *rest), strict=True))) if named else function(out, *rest)

    for named in (False, True):
        with torch.no_grad():
            assert torch.equal(forward(criterion, named), forward(loss, named))

        def closure(named=named):
            optimizer.zero_grad()
            found = forward(criterion, named)
            found.backward()
            return found

        want = forward(loss, named).detach()
        assert torch.equal(optimizer.step(closure), want)
    triplet = flatmin.Criterion(nn.TripletMarginLoss())
    a, p, n = torch.randn(3, 4, 5)
    assert torch.equal(triplet(a, positive=p, negative=n), nn.TripletMarginLoss()(a, p, n))


def by_name(method, given):
    net, (x, y) = net_of(()), data(INDICES, ())
    criterion = flatmin.Criterion(nn.CrossEntropyLoss())
    optimizer = flatmin.wrap(torch.optim.SGD(net.parameters(), lr=0.1), method, model=net, criterion=criterion)

    def closure():
        optimizer.zero_grad()
        both = {given[0] if len(given) == 2 else "outputs": net(x), "target": y}
        positional = [v for k, v in both.items() if k not in given]
        loss = criterion(*positional, **{k: v for k, v in both.items() if k in given})
        loss.backward()
        return loss

    assert torch.equal(optimizer.step(closure), F.cross_entropy(net_of(())(x), y).detach())


class Calls(nn.Module):
    """Counts forwards in its buffer, so that no version tells of it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.data.add_(1)
        return x


def chosen_only(entry, error=None, **options):
    """One step of ESAM with micro-batches, dropout and BatchNorm. Returns the sizes of the batches that the net saw."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), Calls(), nn.Dropout(0.5), nn.Linear(8, K)).double()
    x, y = data(INDICES, (), n=12)
    criterion = flatmin.Criterion(nn.CrossEntropyLoss())
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = flatmin.wrap(base, "esam", model=net, criterion=criterion, beta=1.0, **options)
    before = nn.utils.parameters_to_vector(net.parameters()).detach()
    seen = []
    net[0].register_forward_hook(lambda _, inputs, out: seen.append((len(inputs[0]), out.requires_grad)))

    def backward(x, y):
        compute = {"no loss": lambda: net(x), "two losses": lambda: [criterion(net(x), y) for _ in "ab"]}
        if error == "caught":
            with contextlib.suppress(RuntimeError):
                optimizer.select_samples(compute["two losses"])
        chosen = optimizer.select_samples(compute.get(error, lambda: criterion(net(x), y)))
        if error == "unused" and not isinstance(chosen, slice):
            net(x).sum().backward()
            return None
        loss = criterion(net(x if error == "all" else x[chosen]), y if error == "all" else y[chosen])
        loss.backward()
        return loss

    def closure(x=x, y=y):
        optimizer.zero_grad()
        return backward(x, y)

    try:
        if entry == "closure":
            optimizer.step(closure)
        elif entry == "closures":
            optimizer.step([partial(closure, x[:4], y[:4]), partial(closure, x[4:], y[4:])])
        elif entry == "passes":
            for evaluation in optimizer.passes():
                with evaluation:
                    backward(x, y)
            optimizer.step()
        else:
            backward(x, y)
            with optimizer.perturbed():
                backward(x, y)
    except Exception:
        assert torch.equal(before, nn.utils.parameters_to_vector(net.parameters()))
        raise
    assert int(net[1].num_batches_tracked) == int(net[2].count) == (2 if entry == "closures" else 1)
    assert not torch.equal(before, nn.utils.parameters_to_vector(net.parameters()))
    return seen


def test_the_network_runs_on_the_chosen_samples_only():
    once = [(12, True), (12, False), (6, True)]
    assert chosen_only("closure") == chosen_only("passes") == once
    assert chosen_only("closure", gamma=1.0) == [(12, True), (12, False), (12, True)]
    assert chosen_only("closure", rho=0.0) == [(12, True)]
    assert chosen_only("closures") == [(4, True), (8, True), (4, False), (2, True), (8, False), (4, True)]
    assert chosen_only("closure", diagnostics=True) == once
    assert chosen_only("closure", "caught")[-2:] == once[-2:]


@pytest.mark.parametrize("single", [True, False])
def test_both_passes_draw_the_same_batches_however_many_samples_are_chosen(single):
    """Dropout draws fewer numbers for the chosen samples, before the closure draws the next batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, K)).double()
    x, y = data(INDICES, (), n=12)
    criterion = flatmin.Criterion(nn.CrossEntropyLoss())
    optimizer = flatmin.wrap(torch.optim.SGD(net.parameters(), lr=0.1), "esam", model=net, criterion=criterion)
    drawn = []

    def closure(parts=1):
        optimizer.zero_grad()
        for _ in range(parts):
            drawn.append(torch.randperm(12)[:6])
            a, b = x[drawn[-1]], y[drawn[-1]]
            chosen = optimizer.select_samples(lambda a=a, b=b: criterion(net(a), b))
            loss = criterion(net(a[chosen]), b[chosen])
            loss.backward()
        return loss

    optimizer.step(partial(closure, 3) if single else [closure] * 3)
    assert len(drawn) == 6 and all(map(torch.equal, drawn[:3], drawn[3:]))
    after = torch.get_rng_state()
    torch.manual_seed(0)
    nn.Sequential(nn.Linear(3, 8), nn.Linear(8, K))
    for _ in range(3):
        torch.randperm(12), F.dropout(torch.ones(6, 8, dtype=torch.float64))
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize(
    ("entry", "error", "says"),
    [
        ("perturbed", None, "works in step.closure. and passes"),
        ("closure", "all", "has chosen 6 of 12 samples, .* got a tensor of shape .12, 4."),
        ("passes", "unused", "has chosen samples, but the criterion was not called on them"),
        ("closure", "no loss", "does not call the criterion"),
        ("passes", "two losses", "calls the criterion more than once"),
    ],
)
def test_a_choice_of_samples_that_is_not_followed_is_refused(entry, error, says):
    with pytest.raises((RuntimeError, ValueError), match=says):
        chosen_only(entry, error)


@pytest.mark.parametrize("method", ["sam", "esam", "bisam-log"])
def test_outputs_and_target_may_come_by_name(method):
    for given in (("outputs", "target"), ("input", "target"), ("target",), ()):
        by_name(method, given)


@pytest.mark.parametrize("method", ["esam", "ssam-f", "bisam-log"])
def test_further_arguments_are_refused_where_they_would_be_lost(method):
    net, (x, y) = net_of(()), data(INDICES, ())
    criterion = flatmin.Criterion(F.cross_entropy)
    optimizer = flatmin.wrap(torch.optim.SGD(net.parameters(), lr=0.1), method, criterion=criterion)
    with pytest.raises(
        TypeError, match=rf"^with {method} .*2 arguments by position and weight by name.*functools\.partial"
    ):
        optimizer.step(lambda: criterion(net(x), y, weight=WEIGHT))


@pytest.mark.parametrize(
    ("method", "loss", "kind", "match"),
    [
        ("esam", nn.BCEWithLogitsLoss(weight=torch.ones(9, 1).double()), SOFT, "a weight for each sample of a batch"),
        ("esam", partial(F.binary_cross_entropy_with_logits, pos_weight=torch.ones(9, 1)), SOFT, "a pos_weight for"),
        ("bisam-log", nn.CrossEntropyLoss(), SOFT, "soft targets are not supported"),
        ("bisam-log", lambda z, y: z.sum(1), INDICES, r"reduce it to a scalar, or .*`reduction`"),
    ],
)
def test_what_cannot_be_honoured_is_refused(method, loss, kind, match):
    with pytest.raises(ValueError, match=match):
        step(method, loss, *data(kind, ()), net_of(()), seed=1)


def test_a_target_out_of_range_says_how_to_ignore_it():
    """A function of one's own does not tell what it ignores."""
    loss = lambda z, y: F.cross_entropy(z, y, ignore_index=255)  # noqa: E731
    with pytest.raises(
        ValueError, match=r"class indices from 0 to K - 1 \(index 255 .*CrossEntropyLoss\(ignore_index="
    ):
        step("bisam-tanh", loss, *data(INDICES, (3, 3), True), net_of((3, 3)))


def test_further_tensors_of_a_batch_come_in_the_target():
    """The way out that the refusals name: weights of the samples beside their classes."""
    net, (x, y) = net_of(()), data(INDICES, ())
    weights = torch.linspace(0.5, 2.0, len(y), dtype=torch.float64)

    def each(z, target):
        return F.cross_entropy(z, target[0], reduction="none") * target[1]

    def weighed(z, target):
        return each(z, target).sum() / target[1].sum()

    r = Reference(net, lambda z, y: (each(z, y), y[1]), x, (y, weights))
    at = r.climb(r.grad(r.loss, r.w))
    chosen = (each(r.outputs(at), r.y) - each(r.outputs(r.w), r.y)).argsort(descending=True)[:4]
    u, _ = step("esam", weighed, x, (y, weights), net, per_sample=each, beta=1.0, gamma=0.5)
    torch.testing.assert_close(u, r.grad(lambda w: r.loss(w, chosen), at), rtol=1e-9, atol=1e-12)


def test_the_form_without_reduction_leaves_the_loss_as_it_is():
    """Also where torch.compile has wrapped it, whose copies share the module inside."""
    for inner in (nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum"), Focal()):
        was = inner.reduction
        for loss in (inner, torch.compile(inner, backend="eager")):
            assert unreduced(loss).reduction == "none" and inner.reduction == loss.reduction == was


def test_a_reduction_that_cannot_be_set_is_refused():
    """As the constant of a scripted loss."""

    class Fixed(nn.Module):
        reduction = property(lambda self: "mean")

        def forward(self, outputs, target):
            return F.cross_entropy(outputs, target)

    with pytest.raises(TypeError, match=r"Fixed has no per-sample losses.*per_sample="):
        step("esam", Fixed(), *data(INDICES, ()), net_of(()))


def test_ignored_targets_are_neither_wrong_nor_flipped():
    net, (x, y) = net_of(()), data(INDICES, (), True)
    criterion = flatmin.Criterion(nn.CrossEntropyLoss(ignore_index=255))
    base = torch.optim.SGD(net.parameters(), lr=0.0)
    optimizer = flatmin.wrap(base, "sam", rho=2.0, model=net, criterion=criterion, diagnostics=True)
    seen = []

    def closure():
        optimizer.zero_grad()
        z = net(x)
        seen.append((z.argmax(1) == y)[y != 255])
        loss = criterion(z, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = optimizer.diagnostics()
    assert found["misclassified"] == (~seen[1]).sum() > 0
    assert found["flipped"] == (seen[0] & ~seen[1]).sum()
