"""The function that is measured: exact over batches, and the model is left as it was, bit for bit."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatmin.measure.curvature import Hessian
from flatmin.measure.problem import Problem
from tests.measure.nets import CASES, batches, function_of, make


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_all_data_at_once(name):
    model, x, y, loss = make(name)
    fn, flat, _ = function_of(model, x, y, loss)
    want = torch.func.grad(fn)(flat) if name not in ("attention", "lstm") else None
    for size in (17, 7, 5, 1):
        problem = Problem(model, loss, batches(x, y, size))
        value, gradient = problem.gradient()
        assert value == pytest.approx(float(fn(flat)), rel=1e-12)
        assert problem.value() == pytest.approx(float(fn(flat)), rel=1e-12)
        if want is not None:
            torch.testing.assert_close(gradient, want, rtol=0, atol=1e-12)


def test_values_elsewhere_and_weight_decay():
    model, x, y, loss = make("mlp")
    problem = Problem(model, loss, batches(x, y, 7), weight_decay=0.2)
    fn, flat, _ = function_of(model, x, y, loss)
    shift = torch.randn(problem.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = float(fn(flat + shift) + 0.1 * (flat + shift).square().sum())
    assert problem.value(problem.moved(shift)) == pytest.approx(want, rel=1e-12)
    value, gradient = problem.gradient(problem.moved(shift))
    assert value == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(gradient, torch.func.grad(fn)(flat + shift) + 0.2 * (flat + shift), rtol=0, atol=1e-12)


def test_batch_statistics_in_train_mode():
    model, x, y, loss = make("batchnorm")
    in_eval, in_train = (Problem(model, loss, (x, y), mode=mode).value() for mode in ("eval", "train"))
    model.train()
    assert in_train == pytest.approx(float(loss(model(x), y).detach()), rel=1e-12)
    assert abs(in_eval - in_train) > 1e-3


def test_tuples_and_mappings_are_passed_on():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x, scale):
            return self.linear(x) * scale

    _, x, y, loss = make("mlp")
    model = Two().double()
    first = Problem(model, loss, [((x, torch.tensor(2.0)), y)]).value()
    second = Problem(model, loss, [({"x": x, "scale": torch.tensor(2.0)}, y)]).value()
    assert first == second == pytest.approx(float(loss(model(x, 2.0), y).detach()), rel=1e-12)


def test_the_record_says_what_was_measured():
    model, x, y, loss = make("mlp")
    record = Problem(
        model, loss, batches(x, y, 7), params="0.*, 2.bias", weight_decay=0.1, split="train", augmentation="flip"
    ).conventions
    assert (record.loss, record.reduction, record.weight_decay) == ("CrossEntropyLoss", "mean", 0.1)
    assert (record.examples, record.terms, record.batch, record.size) == (17, 17.0, 7, 39)
    assert (record.mode, record.params, record.dtype) == ("eval", "0.*, 2.bias", "float64")
    assert (record.split, record.augmentation, record.seed) == ("train", "flip", None)


X, Y = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(50).div(40).long()
Y[30:40] = 2
MANY, WEIGHT = (
    torch.randn(50, 3, generator=torch.Generator().manual_seed(1)).double(),
    torch.tensor([0.1, 1, 10]).double(),
)
IDS = torch.randint(3, (23, 6), generator=torch.Generator().manual_seed(2))
TOKENS = torch.where(torch.arange(6) < torch.arange(23)[:, None] % 6 + 1, IDS, -100)


class Focal(nn.Module):
    """Class weights that are kept or used, and never divided by."""

    reduction = "mean"

    def __init__(self, used):
        super().__init__()
        self.weight, self.used = WEIGHT, used

    def forward(self, f, y):
        ce = F.cross_entropy(f, y, weight=self.weight if self.used else None, reduction="none")
        return ((1 - torch.exp(-ce)) ** 2 * ce).mean()


class Words(nn.Module):
    """A small language model; with labels among its inputs it returns its own loss, of the next token."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(3, 4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, ids, labels=None):
        f = self.out(self.mix(self.embed(ids))[0])
        return f if labels is None else {"loss": shifted(f, labels)}


def shifted(f, y, ignored=-100):
    return F.cross_entropy(f[:, :-1].reshape(-1, 3), y[:, 1:].reshape(-1), ignore_index=ignored)


def masked(f, y):
    return (F.cross_entropy(f, y["y"], reduction="none") * y["w"]).sum() / y["w"].sum()


def halves(n, *tensors):
    return list(zip(*(t.split(n) for t in tensors), strict=True))


def weighted_by_class():
    weight = WEIGHT
    return lambda f, y: F.cross_entropy(f, y, weight=weight)


# name -> (model, loss, data as batches of n, what a batch counts)
MEANS = {
    "focal": (None, Focal(False), lambda n: halves(n, X, Y), len),
    "focal with weights": (None, Focal(True), lambda n: halves(n, X, Y), len),
    "partial": (None, functools.partial(F.cross_entropy, ignore_index=0), lambda n: halves(n, X, Y), lambda y: y != 0),
    "lambda": (None, lambda f, y: F.cross_entropy(f, y, ignore_index=2), lambda n: halves(n, X, Y), lambda y: y != 2),
    "closure": (None, weighted_by_class(), lambda n: halves(n, X, Y), lambda y: WEIGHT[y]),
    "margin": (None, nn.MultiMarginLoss(weight=WEIGHT), lambda n: halves(n, X, Y), len),
    "per positive": (
        None,
        lambda f, y: F.cross_entropy(f, y, reduction="sum") / (y == 0).sum(),
        None,
        lambda y: y == 0,
    ),
    "soft": (None, nn.CrossEntropyLoss(weight=WEIGHT), lambda n: halves(n, X, MANY.softmax(1)), len),
    "sum of soft": (None, nn.CrossEntropyLoss(reduction="sum"), lambda n: halves(n, X, MANY.softmax(1)), len),
    "sum by a partial": (None, functools.partial(F.cross_entropy, reduction="sum"), lambda n: halves(n, X, Y), len),
    "missing": (
        None,
        lambda f, y: (f - y.nan_to_num())[y.isfinite()].square().mean(),
        lambda n: halves(n, X, torch.where(MANY > 1, torch.nan, MANY)),
        lambda y: y.isfinite(),
    ),
    "nested": (
        None,
        masked,
        lambda n: [(x, {"y": y, "w": w}) for x, y, w in halves(n, X, Y, MANY[:, 0].exp())],
        lambda y: y["w"],
    ),
    "shift": (Words, shifted, lambda n: halves(n, IDS, TOKENS), lambda y: y[:, 1:] != -100),
    "shift inside": (
        Words,
        lambda out, _: out["loss"],
        lambda n: [({"ids": i, "labels": y}, y) for i, y in halves(n, IDS, TOKENS)],
        lambda y: y[:, 1:] != -100,
    ),
    "padding": (Words, lambda f, y: shifted(f, y, 0), lambda n: halves(n, IDS, IDS), lambda y: y[:, 1:] != 0),
    "sequences": (
        Words,
        lambda f, y: torch.stack([F.cross_entropy(a, b) for a, b in zip(f, y, strict=True)]).mean(),
        lambda n: halves(n, IDS, TOKENS),
        len,
    ),
    "first dimension of time": (
        lambda: nn.GRU(3, 3).double(),
        lambda out, y: F.cross_entropy(out[0].reshape(-1, 3), y.reshape(-1)),
        lambda n: [(F.one_hot(i.T, 3).double(), y.T) for i, y in halves(n, IDS, TOKENS)],
        lambda y: y != -100,
    ),
}


def counted(rule, y):
    found = rule(y)
    return float(found if isinstance(found, int) else found.sum())


@pytest.mark.filterwarnings("ignore:in eval mode the outputs")  # of an example with the first dimension of time
@pytest.mark.parametrize("name", MEANS)
def test_batches_count_by_what_the_mean_divides_by(name):
    """Focal losses (rruisong/CoHFF), weights and labels that a loss does not tell, masks, shifts: as all data at once.

    The references: the batches' own losses by weights that are written down here, for the loss and the gradient.
    """
    model, loss, data, rule = MEANS[name]
    torch.manual_seed(0)
    net = model().double() if model else nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))  # with a positive in each batch
    for size in (16, 1):
        pairs = (data or (lambda n: halves(n, X[order], Y[order])))(size if data else 20)
        problem = Problem(net, loss, pairs)
        total, sums = sum(counted(rule, y) for _, y in pairs), problem.reduction == "sum"
        want = 0.0
        for x, y in pairs:
            if part := counted(rule, y):
                outputs = net(**x) if isinstance(x, dict) else net(x)
                want = want + loss(outputs, y) * (1.0 if sums else part) / total
        slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(want, list(net.parameters()))])
        value, gradient = problem.gradient()
        assert value == pytest.approx(float(want.detach()), rel=1e-10)
        assert (gradient - slope).norm() <= 1e-9 * slope.norm()
        assert sums == name.startswith("sum")


def agreement(f, y):
    """Of examples with each other, as contrastive losses."""
    z = F.normalize(f, dim=1)
    same = (y[:, None] == y[None]).double()
    return -(F.log_softmax(2 * z @ z.T, 1) * same).sum(1).div(same.sum(1)).mean()


class TestMeansThatAreRefused:
    """Where no weights of batches give the loss of all data, a sentence says so."""

    def net(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    @pytest.mark.parametrize(
        "loss",
        [
            agreement,
            lambda f, y: F.cross_entropy(f, y).sqrt(),
            lambda f, y: F.cross_entropy(f, y, reduction="sum") + 0.3,
            lambda f, y: torch.stack([F.cross_entropy(f[y == k], y[y == k]) for k in y.unique()]).mean(),
            lambda f, y: F.cross_entropy(f - f.mean(0), y),
        ],
        ids=["contrastive", "root", "sum and penalty", "mean of classes", "centred"],
    )
    def test_losses_that_are_no_mean(self, loss):
        for size in (16, 1):
            with pytest.raises(
                ValueError, match=r"neither a mean nor a sum .* pass the data as one batch.* pass terms"
            ):
                Problem(self.net(), loss, halves(size, X, Y))
        whole = Problem(self.net(), loss, (X, Y))
        assert whole.value() == pytest.approx(float(loss(self.net()(X), Y).detach()), rel=1e-12)

    def test_terms_that_are_given(self):
        def plain(f, y):
            return F.cross_entropy(f, y, ignore_index=0)

        want = Problem(self.net(), plain, (X, Y)).value()
        given = Problem(self.net(), plain, halves(16, X, Y), terms=lambda x, y: (y != 0).sum())
        assert given.value() == pytest.approx(want, rel=1e-12) and given.conventions.terms == float((Y != 0).sum())
        with pytest.warns(UserWarning, match=r"not the mean of its parts' losses weighted by terms="):
            other = Problem(self.net(), agreement, halves(16, X, Y), terms=lambda x, y: len(y))
        parts = [(len(y) / 50, agreement(self.net()(x), y)) for x, y in halves(16, X, Y)]
        assert other.value() == pytest.approx(float(sum(w * v for w, v in parts).detach()), rel=1e-12)
        for bad in (lambda x, y: None, lambda x, y: -1.0, lambda x, y: y):
            with pytest.raises(ValueError, match="terms= must return the number of terms of a batch"):
                Problem(self.net(), plain, halves(16, X, Y), terms=bad)

    @pytest.mark.parametrize(
        ("loss", "size"),
        [
            (lambda f, y: F.cross_entropy(f, y, weight=torch.tensor([1.0] * 97 + [30.0] * 3).to(f)), 97 * 20),
            (lambda f, y: F.cross_entropy(f, y, ignore_index=57), 64),
            (lambda f, y: F.cross_entropy(f, y) + (0.1 * f.square().mean() if len(f) > 32 else 0.0), 64),
        ],
        ids=["weights in a list", "one of a hundred labels", "more in large batches"],
    )
    def test_what_a_few_examples_do_not_show(self, loss, size):
        """Every batch tells, or the border of two of which each is alike in itself."""
        torch.manual_seed(0)
        net, x, y = nn.Linear(6, 100), torch.randn(2000, 6), torch.arange(100).repeat_interleave(20)
        with pytest.raises(ValueError, match=r"neither a mean nor a sum .* pass terms="):
            Problem(net, loss, halves(size, x, y))
        Problem(net, nn.CrossEntropyLoss(), halves(size, x, y))
        Problem(net, loss, (x, y))
        with pytest.warns(UserWarning, match=r"not the mean of its parts' losses weighted by terms="):
            Problem(net, loss, halves(size, x, y), terms=lambda x, y: len(y))

    def test_reductions_that_are_given(self):
        def adding(f, y):
            return F.cross_entropy(f, y, reduction="sum")

        with pytest.warns(UserWarning, match=r"the sum over its terms, not their mean.* Pass reduction='sum'"):
            found = Problem(self.net(), adding, halves(16, X, Y))
        assert found.value() == pytest.approx(float(F.cross_entropy(self.net()(X), Y).detach()), rel=1e-12)
        assert Problem(self.net(), adding, (X, Y), reduction="sum").value() == pytest.approx(found.value(), rel=1e-12)
        with pytest.raises(ValueError, match="reduction='mean' was given, but the loss of a batch is the sum"):
            Problem(self.net(), adding, halves(16, X, Y), reduction="mean")
        with pytest.raises(ValueError, match="reduction='sum' was given, but the loss of a batch is the mean of its"):
            Problem(self.net(), nn.CrossEntropyLoss(), halves(16, X, Y), reduction="sum")
        with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum'"):
            Problem(self.net(), adding, (X, Y), reduction="none")

    def test_data_that_cannot_be_divided(self):
        """One tensor of targets for a batch of sequences: where the examples are is not to be seen."""
        flat = nn.Sequential(nn.Embedding(3, 3), nn.Flatten(0, 1)).double()
        data = [(i, y.reshape(-1)) for i, y in halves(5, IDS, TOKENS)]
        with pytest.warns(UserWarning, match=r"could not be evaluated on parts of a batch.* pass terms="):
            Problem(flat, lambda f, y: F.cross_entropy(f, y), data)
        assert Problem(flat, nn.CrossEntropyLoss(), data).conventions.terms == float((TOKENS != -100).sum())

    def test_outputs_that_depend_on_the_batch(self):
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3)).double()
        with pytest.warns(UserWarning, match="in eval mode the outputs of an example depend on the other"):
            Problem(net, nn.CrossEntropyLoss(), halves(16, X, Y))
        net[1] = nn.BatchNorm1d(8).double()
        found = Problem(net, lambda f, y: F.cross_entropy(f, y, ignore_index=0), halves(16, X, Y), mode="train")
        assert found.conventions.terms == float((Y != 0).sum()) and found.ignored == 0

    def test_a_penalty_of_the_weights(self):
        """It counts once, and moves with the weights."""
        net = self.net()
        problem = Problem(
            net,
            lambda f, y: F.cross_entropy(f, y) + 0.05 * sum(p.square().sum() for p in net.parameters()),
            halves(16, X, Y),
        )
        plain = Problem(net, nn.CrossEntropyLoss(), halves(16, X, Y), weight_decay=0.1)
        step = torch.randn(problem.size, generator=torch.Generator().manual_seed(0)).double()
        assert problem.value(problem.moved(step)) == pytest.approx(plain.value(plain.moved(step)), rel=1e-12)
        torch.testing.assert_close(problem.gradient()[1], plain.gradient()[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(Hessian(problem).matvec(step), Hessian(plain).matvec(step), rtol=0, atol=1e-12)
        held = list(net.parameters())
        with pytest.raises(ValueError, match=r"weights of the model that were stored before the call.* weight_decay="):
            Problem(net, lambda f, y: F.cross_entropy(f, y) + sum(p.square().sum() for p in held), (X, Y))


class TestDtypes:
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 8).bfloat16(), nn.LayerNorm(8), nn.Linear(8, 3).bfloat16()

        def forward(self, x):
            return self.b(self.norm(self.a(x.to(self.a.weight.dtype)).float()).to(self.b.weight.dtype)).float()

    def test_several_of_them(self):
        torch.manual_seed(0)
        model, x = self.Mixed(), X.float()
        with pytest.raises(
            ValueError, match=r"several dtypes: 'a.weight' is bfloat16, 'norm.weight' is float32.* dtype="
        ):
            Problem(model, nn.CrossEntropyLoss(), (x, Y))
        whole = Problem(model, nn.CrossEntropyLoss(), (x, Y), dtype=torch.float32)
        assert whole.value() == pytest.approx(float(F.cross_entropy(model.float()(x), Y).detach()), rel=1e-5)

    def test_of_what_is_not_selected_each_keeps_its_own(self):
        torch.manual_seed(0)
        model, x = self.Mixed(), X.float()
        own = float(F.cross_entropy(model(x), Y).detach())
        assert Problem(model, nn.CrossEntropyLoss(), (x, Y), params="norm.*").value() == pytest.approx(own, rel=1e-6)

    def test_that_do_not_fit_in_the_model(self):
        class Fixed(nn.Linear):
            def forward(self, x):
                return super().forward(x.float())

        with pytest.raises(ValueError, match=r"mixes tensors of different dtypes .* dtype=torch.float32"):
            Problem(Fixed(6, 3), nn.CrossEntropyLoss(), (X, Y), dtype=torch.float64)

    def test_class_weights_follow(self):
        loss = nn.CrossEntropyLoss(weight=WEIGHT.float())
        problem = Problem(nn.Linear(6, 3), loss, halves(16, X.float(), Y), dtype=torch.float64)
        assert problem.dtype == torch.float64 and loss.weight.dtype == torch.float32


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_what_runs_a_model_is_taken_off(wrap):
    model, x, y, loss = make("mlp")
    assert Problem(wrap(model), loss, (x, y)).value() == Problem(model, loss, (x, y)).value()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_takes_no_weights_is_refused():
    model, x, y, loss = make("mlp")
    with pytest.raises(ValueError, match=r"TorchScript model cannot be measured.* measure the Python model"):
        Problem(torch.jit.trace(model, x), loss, (x, y))


def test_weights_that_a_forward_pass_writes_to():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(3, 8, max_norm=1.0), nn.Flatten(), nn.Linear(48, 3))
    before, y = net[0].weight.detach().clone(), IDS[:, 0]
    with pytest.raises(ValueError, match=r"the forward pass changes the weight '0\.weight', .* set max_norm = None"):
        Problem(net, nn.CrossEntropyLoss(), (IDS, y))
    found = Problem(net, nn.CrossEntropyLoss(), (IDS, y), params="2.*").value()
    assert torch.equal(before, net[0].weight)
    assert found == pytest.approx(float(F.cross_entropy(net(IDS), y).detach()), rel=1e-6)


class TestBadInput:
    def problem(self, **changes):
        model, x, y, loss = make("mlp")
        given = {"model": model, "loss": loss, "data": (x, y), **changes}
        return Problem(given.pop("model"), given.pop("loss"), given.pop("data"), **given)

    @pytest.mark.parametrize("data", [[], [(torch.zeros(0, 5, dtype=torch.float64), torch.zeros(0, dtype=torch.long))]])
    def test_no_data(self, data):
        with pytest.raises(ValueError, match="the data contain no examples"):
            self.problem(data=data)

    def test_only_ignored_terms(self):
        _, x, _, _ = make("mlp")
        with pytest.raises(ValueError, match="the loss ignores every term of the data"):
            self.problem(data=(x, torch.full((17,), -100)))

    def test_data_that_are_no_pairs(self):
        with pytest.raises(ValueError, match=r"pairs \(inputs, targets\), got Tensor"):
            self.problem(data=[torch.zeros(3)])

    def test_a_frozen_model(self):
        model = make("mlp")[0].requires_grad_(False)
        with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
            self.problem(model=model)

    def test_a_pattern_that_matches_nothing(self):
        with pytest.raises(ValueError, match=r"no parameter matches 'head\.\*'; the parameters are 0\.weight, 0\.bias"):
            self.problem(params="0.*, head.*")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_loss_that_is_not_finite(self, bad):
        with pytest.raises(ValueError, match=r"the loss of batch 1 of 1 is (nan|inf)"):
            self.problem(loss=lambda f, y: F.cross_entropy(f, y) + bad)

    def test_a_loss_without_a_graph(self):
        with pytest.raises(ValueError, match="does not depend on the selected weights"):
            self.problem(loss=lambda f, y: F.cross_entropy(f.detach(), y))

    def test_a_loss_that_is_no_scalar(self):
        with pytest.raises(ValueError, match=r"the loss of a batch must be a scalar tensor, got \(17,\)"):
            self.problem(loss=lambda f, y: F.cross_entropy(f, y, reduction="none"))
        with pytest.raises(ValueError, match="must be a mean or a sum, got reduction='none'"):
            self.problem(loss=nn.CrossEntropyLoss(reduction="none"))

    def test_dropout(self):
        model = nn.Sequential(make("mlp")[0], nn.Dropout(0.5))
        with pytest.raises(ValueError, match="mode='train' the dropout in '1' makes the loss random"):
            self.problem(model=model, mode="train")
        self.problem(model=model)

    def test_a_random_loss(self):
        with pytest.raises(ValueError, match="two evaluations of the same batch give different losses"):
            self.problem(loss=lambda f, y: F.cross_entropy(f * torch.rand(()), y))

    @pytest.mark.parametrize(
        ("changes", "sentence"), [({"mode": "test"}, "mode must be"), ({"weight_decay": -1}, "weight_decay")]
    )
    def test_options(self, changes, sentence):
        with pytest.raises(ValueError, match=sentence):
            self.problem(**changes)

    def test_vectors(self):
        with pytest.raises(ValueError, match=r"a vector of shape \(57,\), got \(5,\)"):
            self.problem().moved(torch.zeros(5))
