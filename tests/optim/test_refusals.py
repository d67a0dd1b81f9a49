"""What is refused: each with a sentence that says what to do, before anything is changed."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import flatmin
from flatmin.methods import Gradient, LambdaRadius, OneStep
from tests.helpers import batch, bits, drive


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


# -- construction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [-0.1, math.nan, math.inf, "0.1", True])
def test_a_bad_radius(rho):
    with pytest.raises(ValueError, match="rho must be a finite number >= 0, got"):
        flatmin.SAM(sgd(net()), rho=rho)
    with pytest.raises(ValueError, match="rho must be a finite number"):
        flatmin.SAM(torch.optim.SGD([{"params": net().parameters(), "rho": rho}], lr=0.1))
    optimizer = flatmin.SAM(sgd(net()))
    optimizer.param_groups[0]["rho"] = rho
    with pytest.raises(ValueError, match="rho must be"):
        optimizer.step(lambda: pytest.fail("ran"))


def entropy(**options):
    return flatmin.Criterion(nn.CrossEntropyLoss(**options))


def test_a_bad_construction():
    for build, error, text in [
        (lambda m: flatmin.SAM(m.parameters()), TypeError, "expected a constructed base optimizer"),
        (lambda m: flatmin.SAM([], torch.optim.SGD, lr=0.1), ValueError, "empty parameter list"),
        (lambda m: flatmin.SAM(sgd(m), lr=0.1), TypeError, "optimizer and 'lr'"),
        (lambda m: flatmin.SAM(flatmin.SAM(sgd(m))), TypeError, "already a flatmin optimizer"),
        (lambda m: flatmin.SAM(torch.optim.LBFGS(m.parameters())), TypeError, "LBFGS"),
        (lambda m: flatmin.SAM(sgd(m), model=net()), ValueError, "has none of the optimizer's parameters"),
        (lambda m: flatmin.SAM(sgd(m), model="net"), TypeError, "must be a torch.nn.Module"),
        (lambda m: flatmin.SAM(sgd(m), criterion=nn.CrossEntropyLoss()), TypeError, "must be a flatmin.Criterion"),
        (lambda m: flatmin.SAM(sgd(m), nonfinite="ignore"), ValueError, "nonfinite must be"),
        (lambda m: flatmin.SAM(sgd(m), eps=0), ValueError, "eps must be"),
        (lambda m: flatmin.SAM(sgd(m), adaptive=True, recipe="vasso"), ValueError, "adaptive=True means"),
        (lambda m: flatmin.SAM(sgd(m), recipe=3), TypeError, "recipe must be"),
        (lambda m: flatmin.wrap(sgd(m), flatmin.Recipe(), theta=1.0), ValueError, "has its own parameters"),
        (lambda m: flatmin.wrap(sgd(m), "assam"), ValueError, "unknown method 'assam'; did you mean 'asam'"),
    ]:
        with pytest.raises(error, match=text):
            build(net())


def test_a_bad_method():
    for match, name, options in [
        (r"no parameter matches '1\.\*' \(there are 0\.weight, ", "only", {"only": "0.*, 1.*"}),
        (r"matches '0.wieght'; did you mean 0\.weight, 2\.weight\?", "only", {"only": "0.wieght"}),
        (r"matches 'head\.bias'; did you mean 0\.bias, 2\.bias\?", "only", {"only": "head.bias"}),
        (r"no parameter matches 'x'", "only", {"but": "x"}),
        (r"leaves no parameter to perturb", "only", {"but": "*"}),
        (r"needs parameter names \(pass model=", "only", {"model": None}),
        (r"needs parameter names", "asam", {"model": None, "weights_only": True}),
        (r"no layer matches .*the trained layers are Linear", "sam-on", {}),
        (r"needs the types of the layers \(pass model=", "sam-on", {"model": None}),
        (r"late needs .*whole training: pass total=.*for_length\(", "late", {}),
        (r"momentum.*SGD has none", "momentum-sam", {"momentum": 0.0}),
        (r"bsam needs data_size=N, the number of training samples", "bsam", {"momentum": 0.0}),
        (r"without momentum and weight decay as its base, got SGD with momentum=0.9", "bsam", {"data_size": 9}),
        (r"functional-sam needs the loss \(pass criterion=", "functional-sam", {"criterion": None}),
        *(
            (rf"cannot be combined: .*needs the gradient of the training loss in pass 1, .*{why}", name, {})
            for name, why in (
                ("bsam+bisam-log", "another loss"),
                ("bsam+sam-db", "another batch"),
                ("bsam+imbsam", "the tail"),
            )
        ),
        (
            r"'esam' and 'functional-sam' cannot be combined: .*gradient of the training loss in pass 2",
            "esam+functional-sam",
            {},
        ),
        (r"GAM\(.*needs 3 descent gradients, but inner_loop OneStep\(\) gives 1", "gam", {"inner_loop": OneStep()}),
        (r"reads 'gradient' of direction Gradient\(\), which has no such slot", "sampa", {"direction": Gradient()}),
        (r"Extrapolation: batch must be 'same' or 'previous'", "sampa", {"batch": "last"}),
        (r"'msam' is the name of two methods: .*'micro-sam'.*'momentum-sam'", "msam", {}),
        (r"'ssam' is the name of two methods: .*'ssam-f'.*'bernoulli'", "ssam", {}),
        (r"'MESA' is not a recipe but .*losses\.trajectory .*WeightAverage", "MESA", {}),
        (r"'flat_lora' is not a recipe but .*FlatLoRA", "sam+flat_lora", {}),
        (r"unknown method 'flatlora'; did you mean 'flat-lora'", "flatlora", {}),
        (r"esam needs per-sample losses \(pass criterion=", "esam", {"criterion": None}),
        (r"pass criterion=flatmin.Criterion\(loss\)", "bisam-log", {"criterion": None}),
        (r"needs the loss \(pass criterion=", "sgdhess", {"curvature": "ggn", "criterion": None}),
        (r"has no per-sample losses.*per_sample=", "ssam-f", {"criterion": flatmin.Criterion(lambda z, y: z.sum())}),
        (r"CTCLoss takes log_probs, targets, .*per_sample=", "esam", {"criterion": flatmin.Criterion(nn.CTCLoss())}),
        (r"ascent loss .*BCEWithLogits", "bisam-log", {"criterion": flatmin.Criterion(nn.BCEWithLogitsLoss())}),
        (r"EveryK: k must be a whole number >= 1, got 0", "every-k", {"k": 0}),
        (r"Bernoulli: p must be in \[0, 1\], got 2", "bernoulli", {"p": 2}),
        (r"FisherMask: sparsity must be below 1", "ssam-f", {"sparsity": 1}),
        (r"DynamicMask: sparsity must be below 1", "ssam-d", {"sparsity": 1.0}),
        (r"SharpnessSensitiveDataSelection: gamma must be in \(0, 1\], got 0", "esam", {"gamma": 0}),
        (r"StochasticWeightPerturbation: beta must be in \(0, 1\], got 0", "esam", {"beta": 0.0}),
        (r"NStep: n must be a whole number >= 1, got 0", "n-step", {"n": 0}),
        (r"Momentum: sign must be -1 .* or 1", "momentum-sam", {"sign": 0}),
        ("gamma must be below 1", "wsam", {"gamma": 1.0}),
        ("gamma must be in", "wsam", {"gamma": -0.1}),
        ("alpha must be in", "gsam", {"alpha": -1.0}),
        ("alpha must be in", "gnp", {"alpha": math.nan}),
        ("alpha must be in", "saner", {"alpha": 1.5}),
        ("warm_up must be a whole number", "saner", {"warm_up": -1}),
        ("k must be a whole number", "looksam", {"k": 0}),
        ("granularity must be 'element', 'tensor' or 'global'", "sam-direction", {"granularity": "layer"}),
        ("keep must be 'direction' or 'magnitude'", "sam-magnitude", {"keep": "both"}),
        ("curvature must be 'hutchinson_abs'", "sgdhess", {"curvature": "fisher"}),
        ("draws must be a whole number", "sgdhess", {"draws": 0}),
        (r"theta must be in \(0, 1\]", "vasso", {"theta": 0.0}),
        ("'gsam' and 'wsam' both set the combine", "gsam+wsam", {}),
        ("'looksam' and 'every-k' both set the schedule", "looksam+every-k", {}),
        ("cannot be combined.*gradient of the training loss at w", "gsam+bisam-log", {}),
        ("cannot be combined.*takes no pass 1", "gsam+momentum-sam", {}),
        ("cannot be combined.*gradient of its own", "micro-sam+gsam", {}),
        ("cannot be combined.*gradient of its own", "micro-sam+vasso", {}),
        ("cannot be combined.*never perturbs the weights", "sgdhess+asam", {}),
        ("cannot be combined.*takes no pass 1", "esam+momentum-sam", {}),
        ("cannot be combined.*gradient of the training loss at w", "ae-sam+bisam-log", {}),
    ]:
        model = net()
        base = sgd(model, momentum=options.pop("momentum", 0.9))
        with pytest.raises((ValueError, TypeError), match=match):
            flatmin.wrap(base, name, **{"model": model, "criterion": entropy(), **options})


# -- steps ---------------------------------------------------------------------------------------------------------


class Loop:
    def __init__(self, name="sam", **options):
        self.model, self.criterion = net(), entropy()
        self.optimizer = flatmin.wrap(
            sgd(self.model), name, **{"model": self.model, "criterion": self.criterion, **options}
        )

    def backward(self, k=0, chunk=None, call=None):
        x, y = batch(k, dtype=torch.float64)
        loss = self.criterion(self.model(x), y)
        (call or self.optimizer.backward)(loss)
        return loss

    def update(self, entry="closure", chunks=None):
        return drive(self.optimizer, partial(self.backward, 0), entry, chunks)

    def state(self):
        return bits(self.model.parameters())


@pytest.mark.parametrize(
    ("match", "name", "options", "entry", "chunks"),
    [
        (r"micro-sam needs micro-batches .*got one closure", "micro-sam", {}, "closure", 0),
        (r"micro-sam needs passes\(\) or step\(closure\)", "micro-sam", {}, "perturbed", 2),
        (r"rsam needs passes\(\) or step\(closure\)", "rsam", {}, "two calls", None),
        (r"sam-db needs micro-batches .*got one closure", "sam-db", {}, "closure", 0),
        (r"needs two closures.*got 3", "sam-db", {}, "closure", 3),
        (r"needs two closures.*got 1", "sam-db", {}, "passes", 1),
        (r"finite factor >= 0, got -1.0", "sam", {"radius": LambdaRadius(rule=lambda k: -1)}, "closure", None),
        (r"step\(\) needs a closure", "sam", {}, "train and eval", None),
        (r"sampa needs micro-batches .*got one closure", "sampa", {"batch": "previous"}, "closure", 0),
        (r"Extrapolation needs two closures.*got 3", "sampa", {"batch": "previous"}, "closure", 3),
        (r"DifferentBatch needs two closures.*got 3", "sam-db", {"rho": 0.0}, "closure", 3),
        (r"Extrapolation needs two closures.*got 1", "sampa", {"batch": "previous", "rho": 0.0}, "passes", 1),
    ],
)
def test_a_step_that_the_method_cannot_take_changes_nothing(match, name, options, entry, chunks):
    loop = Loop(name, **options)
    before = loop.state()
    with pytest.raises((RuntimeError, ValueError), match=match):
        loop.update(entry, chunks)
    assert all(map(torch.equal, loop.state(), before))
    loop.optimizer.state_dict()  # so no update is under way
    assert loop.optimizer.counts()["updates"] == 0


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("bsam", {"momentum": 0.9}, r"^bsam needs .* got SGD with momentum=0.9, weight_decay=0"),
        ("sam", {"maximize": True}, r"^sam perturbs the weights towards a higher loss, .*maximize=True"),
    ],
)
def test_options_of_the_base_that_change_are_looked_at_before_every_step(name, changes, text):
    model = net()
    base = sgd(model, momentum=0.0)
    options = {"data_size": 9} if name == "bsam" else {}
    optimizer = flatmin.wrap(base, name, model=model, **options)
    optimizer.param_groups[0].update(changes)
    with pytest.raises(ValueError, match=text):
        optimizer.step(lambda: pytest.fail("ran"))
    with pytest.raises(ValueError, match=text):
        flatmin.wrap(base, name, model=model, **options)


@pytest.mark.parametrize("name", ["esam", "functional-sam"])
@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("entry", ["closure", "passes", "perturbed"])
def test_a_loss_outside_of_the_passes_has_no_part_in_them(entry, with_model, name):
    """A validation loss with gradients, or a first pass that was given up, of the very shapes of the next update."""
    ends = []
    for other in ("nothing", "validation", "given up", "first loss before clearing"):
        loop = Loop(name, **({} if with_model else {"model": None}))
        x, y = batch(5, dtype=torch.float64)
        if other in ("validation", "given up"):
            loss = loop.criterion(loop.model(3 * x), y)
            if other == "given up":
                loss.backward()
        if entry != "perturbed":
            loop.optimizer.zero_grad()
            loop.update(entry, 0)
        else:
            loss = loop.backward(0, call=lambda loss: None) if other == "first loss before clearing" else None
            (loop.optimizer if other != "validation" or with_model else loop.model).zero_grad()
            loop.backward(0) if loss is None else loss.backward()
            with loop.optimizer.perturbed():
                loop.backward(0)
            loop.optimizer.step()
        ends.append(loop.state())
    assert all(all(map(torch.equal, end, ends[0])) for end in ends[1:])


@pytest.mark.parametrize("name", ["esam", "functional-sam"])
def test_a_first_pass_with_more_losses_than_the_second(name):
    loop = Loop(name)
    before, (x, y) = loop.state(), batch(0, dtype=torch.float64)
    calls = [2, 1]

    def closure():
        loop.optimizer.zero_grad()
        loss = sum(loop.criterion(loop.model(x), y) for _ in range(calls.pop(0)))
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=rf"^{name} compares the passes .*call the criterion equally often"):
        loop.optimizer.step(closure)
    assert all(map(torch.equal, loop.state(), before))


@pytest.mark.parametrize(
    ("reduction", "outputs", "error", "text"),
    [
        (
            "none",
            lambda z, calls: z,
            TypeError,
            "needs outputs that are one tensor and a scalar loss; .* shape \\(8,\\)",
        ),
        ("mean", lambda z, calls: z if calls == 1 else z[:4], RuntimeError, "call the criterion equally often"),
    ],
)
def test_a_loss_that_functional_sam_cannot_follow(reduction, outputs, error, text):
    loop = Loop("functional-sam")
    loop.criterion.loss.reduction = reduction
    before, calls = loop.state(), []
    x, y = batch(0, dtype=torch.float64)

    def closure():
        loop.optimizer.zero_grad()
        calls.append(1)
        z = outputs(loop.model(x), len(calls))
        loss = loop.criterion(z, y[: len(z)]).mean()
        loss.backward()
        return loss

    with pytest.raises(error, match=text):
        loop.optimizer.step(closure)
    assert all(map(torch.equal, loop.state(), before))


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda o: o.second_step(), "second_step\\(\\) needs first_step\\(\\)"),
        (lambda o: o.step(lambda: torch.ones(())), "no weight received a gradient in pass 1"),
        (lambda o: o.first_step(), "no gradients: call loss.backward\\(\\)"),
        (lambda o: list(o.passes()), "must be run inside `with evaluation:`"),
        (lambda o: list(o.passes(chunks=0)), "chunks must be at least 1"),
        (lambda o: o.step(3), "closure must be callable"),
        (lambda o: o.step([]), "empty list of closures"),
    ],
)
def test_a_loop_that_misses_a_part(act, text):
    loop = Loop()
    with pytest.raises((RuntimeError, TypeError, ValueError), match=text):
        act(loop.optimizer)
    loop.update()


def test_a_step_after_a_single_backward():
    loop = Loop()
    before = loop.state()
    loop.backward()
    with pytest.raises(RuntimeError, match="step\\(\\) needs a closure, or both passes before it"):
        loop.optimizer.step()
    assert all(map(torch.equal, loop.state(), before))


@pytest.mark.parametrize("act", ["first_step", "state_dict", "add_param_group", "step", "closure"])
def test_nothing_else_happens_during_an_update(act):
    loop = Loop()
    optimizer, before = loop.optimizer, loop.state()
    loop.backward()
    optimizer.first_step()
    assert not all(map(torch.equal, loop.state(), before))
    with pytest.raises(RuntimeError, match="update"):
        match act:
            case "add_param_group":
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
            case "closure":
                optimizer.step(lambda: None)
            case _:
                getattr(optimizer, act)()
    optimizer.abort()
    assert all(map(torch.equal, loop.state(), before))
    loop.update()


@pytest.mark.parametrize(("name", "options"), [("sgdhess", {}), ("ssam-f", {})])
@pytest.mark.parametrize("entry", ["closure", "passes"])
def test_a_pass_that_must_keep_its_graph(entry, name, options):
    loop = Loop(name, **options)
    before = loop.state()
    with pytest.raises(RuntimeError, match=r"call optimizer\.backward\(loss\) instead of loss\.backward\(\)"):
        drive(loop.optimizer, partial(loop.backward, call=torch.Tensor.backward), entry)
    assert all(map(torch.equal, loop.state(), before)) and loop.optimizer.counts()["updates"] == 0
    loop.update(entry)
    assert not all(map(torch.equal, loop.state(), before)) and loop.optimizer.counts()["updates"] == 1


@pytest.mark.parametrize(("name", "options"), [("bisam-log", {}), ("esam", {}), ("sgdhess", {"curvature": "ggn"})])
@pytest.mark.parametrize("entry", ["closure", "perturbed", "passes"])
def test_a_loop_that_forgets_the_loss_object(entry, name, options):
    loop = Loop(name, **options)
    if entry not in ("closure", "passes") and not loop.optimizer.recipe.two_pass:
        entry = "closure"
    before, x_y = loop.state(), batch(0, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="this pass did not call it"):
        drive(
            loop.optimizer,
            lambda: (loss := nn.functional.cross_entropy(loop.model(x_y[0]), x_y[1]), loop.optimizer.backward(loss))[0],
            entry,
        )
    assert all(map(torch.equal, loop.state(), before))


def test_nothing_is_saved_or_begun_while_the_weights_are_away():
    loop = Loop("momentum-sam")
    optimizer = loop.optimizer
    optimizer.train()
    for refused in (optimizer.state_dict, partial(optimizer.load_state_dict, {}), partial(loop.update, "passes")):
        with pytest.raises(RuntimeError, match=r"under way.*call eval\(\)"):
            refused()
    optimizer.eval()
    optimizer.state_dict()
    loop.update()


def test_the_pure_function_names_vmap_where_it_cannot_run():
    """And runs where the loss itself is mapped."""
    w, x = torch.randn(4, 3), torch.randn(4, 3)

    def one(w, x):
        return flatmin.value_and_grad(lambda p: (p["w"] @ x).square(), {"w": w})[1]["w"]

    with pytest.raises(RuntimeError, match=r"inside torch.vmap.*Python loop over the members"):
        torch.vmap(one)(w, x)
    inner = lambda p: torch.vmap(lambda w, x: (w @ x).square())(p["w"], x).sum()  # noqa: E731
    _, grads, _ = flatmin.value_and_grad(inner, {"w": w}, rho=0.0)
    torch.testing.assert_close(grads["w"], 2 * (w * x).sum(1, keepdim=True) * x)
