"""The wrapper as users meet it: construction, loops, gradients that are not finite."""

import contextlib
import math
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import flatmin
from tests.helpers import as_on_device
from tests.optim.loops import batch, closure_for, net, sgd, vector


def test_default_rho_belongs_to_the_geometry():
    for name, rho in {"sam": 0.05, "asam": 0.5, "vasso+asam": 0.5, "usam": 0.05}.items():
        assert flatmin.wrap(sgd(net()), name).param_groups[0]["rho"] == rho
    model = net()
    base = torch.optim.SGD([{"params": model[0].parameters(), "rho": 0.3}, {"params": model[2].parameters()}], lr=0.1)
    assert [g["rho"] for g in flatmin.SAM(base, rho=0.2).param_groups] == [0.3, 0.2]


def test_names_come_from_the_base_or_the_model():
    model = net()
    flatmin.wrap(sgd(model), "asam", weights_only=True, model=model)
    flatmin.wrap(torch.optim.SGD(model.named_parameters(), lr=0.1), "asam", weights_only=True)


def test_the_two_call_readme_loop_runs_with_its_import_changed():
    from flatmin import SAM

    model, loss_function = net(), nn.CrossEntropyLoss()
    base_optimizer = torch.optim.SGD
    optimizer = SAM(model.parameters(), base_optimizer, lr=0.1, momentum=0.9)
    for k in range(3):
        input, output = batch(k)
        loss = loss_function(model(input), output)
        loss.backward()
        optimizer.first_step(zero_grad=True)
        loss_function(model(input), output).backward()
        optimizer.second_step(zero_grad=True)
    twin = net()
    opt = flatmin.SAM(sgd(twin))
    for k in range(3):
        opt.step(closure_for(twin, opt, *batch(k)))
    assert torch.equal(vector(model), vector(twin))


def test_a_closure_that_goes_on_from_gradients_at_hand_takes_the_same_steps_and_is_told_of_its_extra_pass():
    """The closure loop of davda54/sam's README, whose first pass is the loop's own."""
    model, loss_function = net(), nn.CrossEntropyLoss()
    optimizer = flatmin.SAM(model.parameters(), torch.optim.SGD, rho=0.05, adaptive=True, lr=0.1, momentum=0.9)
    for k in range(3):
        input, output = batch(k)

        def closure(input=input, output=output):
            loss = loss_function(model(input), output)
            loss.backward()
            return loss

        loss = loss_function(model(input), output)
        loss.backward()
        with pytest.warns(UserWarning, match="runs in every pass.*first_step") if k == 0 else contextlib.nullcontext():
            optimizer.step(closure)
        optimizer.zero_grad()
    twin = net()
    opt = flatmin.wrap(sgd(twin), "asam", rho=0.05)
    for k in range(3):
        opt.step(closure_for(twin, opt, *batch(k)))
    assert torch.equal(vector(model), vector(twin))


def test_step_returns_the_descent_loss_at_w_also_for_bisam():
    model = net()
    criterion = flatmin.Criterion(nn.CrossEntropyLoss())
    opt = flatmin.wrap(sgd(model), "bisam-tanh", criterion=criterion)
    x, y = batch()
    want = nn.functional.cross_entropy(model(x), y).detach()

    def closure():
        opt.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    loss = opt.step(closure)
    assert torch.equal(loss, want) and not loss.requires_grad and opt.loss_point == "w"
    with torch.no_grad():  # an evaluation's loss is the loss
        assert torch.equal(criterion(model(x), y), nn.functional.cross_entropy(model(x), y))


@pytest.mark.parametrize("on_base", [True, False])
def test_schedulers_work_on_the_wrapper_and_on_the_base(on_base):
    model = net()
    opt = flatmin.SAM(sgd(model))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt.base if on_base else opt, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(3):
            x, y = batch(k)
            closure_for(model, opt, x, y)()
            opt.first_step()
            closure_for(model, opt, x, y)()
            opt.second_step()
            scheduler.step()
    assert opt.param_groups[0]["lr"] == opt.base.param_groups[0]["lr"] < 0.1


def test_rho_is_scheduled_like_lr_and_groups_are_shared():
    model = net()
    opt = flatmin.SAM(sgd(model), rho=0.1)
    opt.param_groups[0]["rho"] = 0.0
    twin = net()
    base = sgd(twin)
    x, y = batch()
    opt.step(closure_for(model, opt, x, y))
    base.step(closure_for(twin, base, x, y))
    assert torch.equal(vector(model), vector(twin))
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert opt.base.param_groups[1]["rho"] == 0.1 and len(opt.param_groups) == 2


def test_hooks_fire_once_per_update():
    model = net()
    opt = flatmin.SAM(sgd(model))
    fired = []
    opt.register_step_pre_hook(lambda *a: fired.append("pre"))
    opt.register_step_post_hook(lambda *a: fired.append("post"))
    opt.base.register_step_post_hook(lambda *a: fired.append("base"))
    opt.step(closure_for(model, opt, *batch()))
    assert fired == ["pre", "post", "base"]


def test_clipping_between_the_last_pass_and_step_acts_on_what_the_base_takes():
    model = net()
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=1.0))
    x, y = batch()
    before = vector(model)
    closure_for(model, opt, x, y)()
    with opt.perturbed():
        closure_for(model, opt, x, y)()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    opt.step()
    assert float((vector(model) - before).norm()) == pytest.approx(1e-3, rel=1e-4)


def test_step_without_closure_is_the_base_step_where_nothing_ascends():
    for opt in (flatmin.wrap(sgd(net()), "sgd"), flatmin.SAM(sgd(net()), rho=0.0)):
        opt.step()
    model = net()
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.0))
    opt.step()  # distributed checkpoints initialise state like this


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize(("base", "bad"), [("sgd", math.nan), ("fused sgd", math.inf), ("fused adamw", -math.inf)])
def test_skip_leaves_weights_and_base_state(base, bad, device):
    model = net()
    fused = base.startswith("fused")
    inner = torch.optim.AdamW(model.parameters(), fused=True) if "adamw" in base else sgd(model, fused=fused)
    opt = flatmin.wrap(inner, "vasso", rho=0.1)
    as_on_device(opt, device)
    opt.step(closure_for(model, opt, *batch()))
    before, state = (
        vector(model),
        [{k: v.clone() for k, v in opt.state[p].items() if v is not None} for p in model.parameters()],
    )
    x, y = batch(1)
    for where in (1, 2):
        calls = 0

        def closure(where=where):
            nonlocal calls
            calls += 1
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            if calls >= where:
                model[0].weight.grad[0, 0] = bad
            return loss

        opt.step(closure)
        assert torch.equal(before, vector(model))
        for p, old in zip(model.parameters(), state, strict=True):
            assert all(torch.equal(opt.state[p][k], v) for k, v in old.items())
    assert opt.counts() == {"updates": 3, "nonfinite_ascents": 1, "skipped_steps": 2}
    opt.step(closure_for(model, opt, x, y))
    assert bool(vector(model).isfinite().all()) and not torch.equal(before, vector(model))


def test_raise_and_propagate():
    model = net()
    opt = flatmin.SAM(sgd(model), nonfinite="raise")
    before = vector(model)
    with pytest.raises(FloatingPointError, match="unchanged"):
        opt.step(closure_for(model, opt, *batch(), scale=math.nan))
    assert torch.equal(before, vector(model))
    opt.step(closure_for(model, opt, *batch()))
    opt = flatmin.SAM(sgd(model), nonfinite="propagate")
    opt.step(closure_for(model, opt, *batch(), scale=math.nan))
    assert bool(vector(model).isnan().any())


@pytest.mark.parametrize("device", [False, True])
def test_a_decoupled_term_that_is_not_finite_skips_the_step(device):
    """WSAM's base takes g; what is added beside it holds the gradient at w + eps."""
    model, calls = net(), []
    opt = as_on_device(flatmin.wrap(sgd(model), "wsam", rho=0.1), device)
    before = vector(model)

    def closure():
        calls.append(1)
        return closure_for(model, opt, *batch(), scale=math.inf if len(calls) == 2 else 1.0)()

    opt.step(closure)
    assert torch.equal(vector(model), before)
    assert opt.counts() == {"updates": 1, "nonfinite_ascents": 0, "skipped_steps": 1}
    opt.step(closure)
    assert bool(vector(model).isfinite().all()) and not torch.equal(vector(model), before)


def test_the_device_gives_the_same_step_in_every_dtype():
    for dtype in (torch.float32, torch.float64, torch.complex128):
        ends = []
        for device in (False, True):
            torch.manual_seed(1)
            w = [nn.Parameter(torch.randn(3, 2, dtype=dtype)), nn.Parameter(torch.randn(5, dtype=torch.float64))]
            opt = flatmin.SAM(torch.optim.SGD([{"params": w[:1]}, {"params": w[1:], "rho": 0.2}], lr=0.1))
            as_on_device(opt, device)
            for _ in range(3):

                def closure(w=w, opt=opt):
                    opt.zero_grad()
                    loss = sum((p.abs() ** 3).sum() for p in w)
                    loss.backward()
                    return loss

                opt.step(closure)
            ends.append([p.detach() for p in w])
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*ends, strict=True))


def test_train_and_eval_do_nothing_to_methods_with_a_pass_1():
    ends = []
    for switch in ("train", "eval"):
        model = net()
        opt = flatmin.SAM(sgd(model))
        getattr(opt, switch)()
        opt.step(closure_for(model, opt, *batch()))
        ends.append(vector(model))
    assert torch.equal(*ends)


def test_a_forward_that_was_given_up_is_forgotten():
    """Its losses are not those that the samples' rise is counted from."""
    ends = []
    for gives_up in (False, True):
        model, criterion = net(), flatmin.Criterion(nn.CrossEntropyLoss())
        opt = flatmin.wrap(sgd(model), "esam", beta=1.0, rho=0.5, model=model, criterion=criterion)
        if gives_up:
            criterion(model(batch(7)[0]), batch(7)[1])
            opt.zero_grad()

        def backward(model=model, criterion=criterion):
            loss = criterion(model(batch()[0]), batch()[1])
            loss.backward()
            return loss

        backward()
        with opt.perturbed():
            backward()
        opt.step()
        ends.append(vector(model))
    assert torch.equal(*ends)


def test_import_loads_torch_and_nothing_heavy():
    """Methods load without the engine, measures with torch alone; the theory draws nothing before it is asked to."""
    steps = (
        "import sys, torch; before = set(sys.modules)",
        "import flatmin.methods; assert 'flatmin.optim' not in sys.modules",
        "import flatmin; flatmin.SAM, flatmin.compose; print(*set(sys.modules) - before)",
        "heavy = 'pandas matplotlib plotly sklearn rich typer scipy timm torchvision lightning transformers accelerate "
        "skorch tensorboard wandb mlflow trackio'.split()",
        "loaded = lambda: [m for m in heavy if m in sys.modules]",
        "from flatmin.models.external import external; external('timm:resnet18'); external('torchvision:resnet18')",
        "import flatmin.measure, flatmin.train.trackers; print(loaded())",
        "import flatmin.theory as t, flatmin.theory.demonstrations, flatmin.theory.draw; t.check(0.1, 0.1, t.Square())",
        "print(loaded())",
    )
    run = subprocess.run([sys.executable, "-c", "\n".join(steps)], capture_output=True, text=True, check=True)
    loaded, *heavy = run.stdout.splitlines()
    assert heavy == ["[]", "[]"]
    packages = [name.partition(".")[0] for name in loaded.split()]
    assert set(packages) - sys.stdlib_module_names == {"flatmin"} and packages.count("flatmin") <= 65


def test_the_library_needs_few_packages_and_pins_none():
    root = Path(__file__).parents[2]
    needed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {n.split(">")[0] for n in needed} <= {"torch", "numpy", "typer", "rich"}
    assert not any(sign in n for n in needed for sign in ("==", "<", "~"))
