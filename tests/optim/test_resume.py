"""Checkpoints, copies and pickles carry everything: what follows is bit for bit what would have followed."""

import copy
import dataclasses
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import flatmin
from flatmin import methods as parts
from tests.covering import pairs
from tests.helpers import BASES, NAMES, Session, batch, noisy_net, same_bits, train

ROOT = Path(__file__).parents[2]
METHODS = (*NAMES, "jitter")
STATEFUL = ("vasso", "fsam+usam", "vasso+bisam-log+asam", "jitter")
every_method = pytest.mark.parametrize("method", METHODS)
stateful_method = pytest.mark.parametrize("method", STATEFUL)
every_base = pytest.mark.parametrize("base", BASES)


def size_of(checkpoint) -> int:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getbuffer().nbytes


# -- a new process ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight():
    """Every run at step 10 and, gone on with, at step 20."""
    found = {}
    for name in (f"{m}/{b}" for m in METHODS for b in BASES):
        session = Session(*name.split("/")).run(range(10))
        at10 = copy.deepcopy(session.save())
        found[name] = at10, session.run(range(10, 20)).save()
    return found


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, straight):
    """Every run saved at step 10 and continued to step 20 by one new process, which loads with weights_only=True."""
    folder = tmp_path_factory.mktemp("resume")
    torch.save({name: at10 for name, (at10, _) in straight.items()}, folder / "at10.pt")
    code = f"from tests.helpers import resume_all; resume_all({str(folder / 'at10.pt')!r}, {str(folder / 'at20.pt')!r})"
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, env={**os.environ, "PYTHONPATH": path})
    return torch.load(folder / "at20.pt", weights_only=True)


@every_base
@every_method
def test_ten_and_ten_steps_in_a_new_process_are_twenty(method, base, resumed, straight):
    """Weights, statistics, base state, recipe state, learning rate and random stream."""
    assert same_bits(resumed[f"{method}/{base}"], straight[f"{method}/{base}"][1])


def test_the_memory_matters(resumed):
    """Without what VaSSO remembers, the same checkpoint leads elsewhere; so the test above sees the state."""
    session = Session("vasso", "sgd").run(range(10))
    saved = session.save()
    saved["optimizer"] = flatmin.base_state_dict(saved["optimizer"])
    forgetful = Session("vasso", "sgd", seed=9).load(saved).run(range(10, 20)).save()
    assert not same_bits(forgetful["model"], resumed["vasso/sgd"]["model"])


# -- other checkpoints --------------------------------------------------------------------------------------------


@every_base
@every_method
def test_a_plain_checkpoint_of_the_base_loads(method, base):
    """Radii stay, the base's state is taken, the recipe starts afresh."""
    model = noisy_net()
    groups = [{"params": list(model[i].parameters())} for i in (0, 1, 4)]
    plain = BASES[base](groups, lr=0.07)
    train_plain(model, plain, range(3))
    checkpoint = copy.deepcopy(plain.state_dict())

    session = Session(method, base).run(range(4))
    session.optimizer.load_state_dict(copy.deepcopy(checkpoint))
    assert [g["rho"] for g in session.optimizer.param_groups] == [
        0.1,
        0.0,
        session.optimizer.recipe.default_rho,
    ]
    assert [g["lr"] for g in session.optimizer.param_groups] == [0.07] * 3
    assert same_bits(flatmin.base_state_dict(session.optimizer.state_dict())["state"], checkpoint["state"])
    filled = [
        v for e in session.optimizer.state_dict()["state"].values() for k, v in e.items() if str(k).endswith(".filled")
    ]
    assert not any(map(bool, filled))

    # It goes on as a new run of the method would that was given the same weights and base state.
    fresh = Session(method, base)
    fresh.optimizer.base.load_state_dict(
        {"state": copy.deepcopy(checkpoint["state"]), "param_groups": fresh_groups(fresh, checkpoint)}
    )
    for run in (session, fresh):
        run.model.load_state_dict(model.state_dict())
    if method != "jitter":  # its draws have gone on
        ends = []
        for run in (session, fresh):
            torch.manual_seed(5)
            train(run.model, run.optimizer, run.criterion, range(3, 6))
            ends.append(run.model.state_dict())
        assert same_bits(*ends)


def fresh_groups(session, checkpoint):
    """The saved groups with what a new wrapper has put into its own."""
    own = session.optimizer.state_dict()["param_groups"]
    return [
        {**g, **{k: v for k, v in o.items() if k == "rho" or k.startswith("flatmin.")}}
        for g, o in zip(checkpoint["param_groups"], own, strict=True)
    ]


def train_plain(model, optimizer, steps):
    loss_fn = nn.CrossEntropyLoss()
    for k in steps:
        x, y = batch(k)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()


@every_base
@every_method
def test_the_base_part_of_a_checkpoint_loads_into_the_plain_base(method, base):
    """Also when radii and memory are there; the plain base then steps as the wrapped one would."""
    session = Session(method, base).run(range(5))
    checkpoint = copy.deepcopy(flatmin.base_state_dict(session.optimizer.state_dict()))
    assert not any("flatmin" in str(k) or k == "rho" for g in checkpoint["param_groups"] for k in g)
    model = noisy_net()
    model.load_state_dict(session.model.state_dict())
    plain = BASES[base]([{"params": list(model[i].parameters())} for i in (0, 1, 4)])
    plain.load_state_dict(checkpoint)
    for group in session.optimizer.param_groups:
        group["rho"] = 0.0
    for m, o in ((model, plain), (session.model, session.optimizer.base)):
        torch.manual_seed(5)
        train_plain(m, o, range(5, 7))
    assert same_bits(model.state_dict(), session.model.state_dict())


@pytest.mark.parametrize("method", [*STATEFUL, "sam", "asam", "sam-magnitude"])
def test_the_checkpoint_of_another_recipe_is_refused_before_anything_changes(method):
    session = Session(method, "sgd").run(range(2))
    before = copy.deepcopy(session.optimizer.state_dict())
    for other in {"sam", "fsam", "sam-direction"} - {method}:
        foreign = Session(other, "sgd").run(range(2)).optimizer.state_dict()
        with pytest.raises(ValueError, match=rf"recipe {other}.*this optimizer runs .*flatmin\.base_state_dict"):
            session.optimizer.load_state_dict(foreign)
        foreign["param_groups"][0].pop("flatmin.parts")  # as before it was kept
        with pytest.raises(ValueError, match=rf"recipe {other}.*this optimizer runs .*flatmin\.base_state_dict"):
            session.optimizer.load_state_dict(foreign)
    assert same_bits(session.optimizer.state_dict(), before)


def small(method="sam", rho=0.05, base=torch.optim.SGD, **params):
    net = nn.Linear(6, 3)
    return net, flatmin.wrap(base(net.parameters(), lr=0.1), method, rho=rho, **params)


def test_rho_comes_with_a_checkpoint_of_the_recipe_and_stays_with_that_of_the_base():
    """As lr does. A recipe is told by its parts: the order of names and a name of one's own do not matter."""
    saved = small("vasso+asam", rho=0.3)[1].state_dict()
    optimizer = small("asam+vasso")[1]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rho"] == 0.3
    recipe = flatmin.Recipe(direction=parts.EMA(), geometry=parts.Adaptive(), name="mine")
    small(recipe)[1].load_state_dict(saved)
    optimizer = small()[1]
    with pytest.raises(ValueError, match=r"recipe vasso\+asam.* runs sam.*rho is then the one given here"):
        optimizer.load_state_dict(saved)
    optimizer.load_state_dict(flatmin.base_state_dict(saved))
    assert optimizer.param_groups[0]["rho"] == 0.05
    with pytest.raises(ValueError, match=r"recipe recipe\(\), this optimizer runs recipe\(\)"):
        small(flatmin.Recipe(geometry=parts.Unnormalised()))[1].load_state_dict(small(flatmin.Recipe())[1].state_dict())


def test_other_parameters_of_the_same_method():
    """Refused where the recipe's memory was made with them, said where there is none; functions cannot be compared."""
    checkpoint = small("vasso", theta=0.5)[1].state_dict()
    with pytest.raises(ValueError, match=r"theta=0\.5.*theta=0\.9"):
        small("vasso")[1].load_state_dict(checkpoint)
    with pytest.warns(UserWarning, match=r"made with schedule\.k=3; this optimizer goes on with schedule\.k=4\."):
        small("every-k", k=4)[1].load_state_dict(small("every-k", k=3)[1].state_dict())
    rule = dataclasses.replace(flatmin.compose("vasso"), radius=parts.LambdaRadius(rule=lambda k: 1.0))
    again = dataclasses.replace(rule, radius=parts.LambdaRadius(rule=lambda k: 1.0))
    small(again)[1].load_state_dict(small(rule)[1].state_dict())


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_checkpoint_of_the_single_file_implementation(adaptive):
    """davda54/sam saves `old_p` in place of the base's state: Adam must not take it for its moments."""
    net, optimizer = small("asam" if adaptive else "sam", base=torch.optim.Adam)
    saved = torch.optim.Adam(net.parameters(), lr=0.01).state_dict()
    saved["param_groups"][0].update(rho=0.3, adaptive=adaptive)
    saved["state"] = {i: {"old_p": p.detach().clone()} for i, p in enumerate(net.parameters())}
    with pytest.warns(UserWarning, match="saves no state of the base optimizer"):
        optimizer.load_state_dict(saved)
    train(net, optimizer, nn.CrossEntropyLoss(), [0])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["rho"], "adaptive" in group) == (0.01, 0.3, False)
    assert all("exp_avg" in entries and "old_p" not in entries for entries in optimizer.state_dict()["state"].values())
    with pytest.raises(ValueError, match=rf"single-file SAM with adaptive={adaptive}, this optimizer runs "):
        small("sam" if adaptive else "asam", base=torch.optim.Adam)[1].load_state_dict(saved)


def test_a_checkpoint_of_a_newer_version_is_refused():
    optimizer = Session("sam", "sgd").optimizer
    checkpoint = optimizer.state_dict()
    checkpoint["param_groups"][0]["flatmin.version"] = 99
    with pytest.raises(ValueError, match=r"version 99.*upgrade"):
        optimizer.load_state_dict(checkpoint)


@pytest.mark.parametrize("cut", ["groups", "weights", "all groups", "shapes"])
def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_lost(cut):
    session = Session("vasso", "sgd").run(range(2))
    checkpoint = copy.deepcopy(session.optimizer.state_dict())
    if cut == "groups":
        checkpoint["param_groups"].pop()
    elif cut == "weights":
        checkpoint["param_groups"][0]["params"].pop()
    elif cut == "shapes":
        entries = checkpoint["state"][0]
        entries["flatmin.direction.ema"] = entries["flatmin.direction.ema"][:2]
    else:
        checkpoint["param_groups"].clear()
    before = copy.deepcopy(session.optimizer.state_dict())
    match = r"direction\.ema of parameter 0 has shape \(2, .*saved for another model" if cut == "shapes" else None
    with pytest.raises(ValueError, match=match or r"param(eter)? group"):
        session.optimizer.load_state_dict(checkpoint)
    assert same_bits(session.optimizer.state_dict(), before)


@every_base
def test_a_checkpoint_holds_no_copy_of_the_weights(base):
    """SAM's is as large as the base's, but for a few names."""
    model = nn.Linear(200, 200)
    plain = BASES[base](model.parameters())
    wrapped = flatmin.SAM(BASES[base](model.parameters()), model=model)

    def closure():
        wrapped.zero_grad()
        loss = model(torch.ones(2, 200)).square().mean()
        loss.backward()
        return loss

    wrapped.step(closure)
    plain.step()
    assert 0 <= size_of(wrapped.state_dict()) - size_of(plain.state_dict()) <= 600


def test_an_aborted_step_before_saving_leaves_resume_exact():
    """The draws of a step that raised belong to the next one, in the run that goes on and in the one that resumes."""
    session = Session("jitter", "sgd").run(range(4))
    calls = []

    def closure():
        calls.append(1)
        session.optimizer.zero_grad()
        loss = session.criterion(session.model(batch(4)[0]), batch(4)[1])
        loss.backward()
        if len(calls) == 2:
            raise KeyError("planned")
        return loss

    with pytest.raises(KeyError, match="planned"):
        session.optimizer.step(closure)
    saved = copy.deepcopy(session.save())
    straight = session.run(range(4, 8)).save()
    assert same_bits(Session("jitter", "sgd", seed=9).load(saved).run(range(4, 8)).save(), straight)


# -- copies and pickles -------------------------------------------------------------------------------------------


@pairs("method, order, base", METHODS, ["model first", "optimizer first", "one object"], list(BASES))
def test_a_deepcopy_of_model_and_optimizer_stays_paired(method, base, order):
    """The copy trains as the original does, and the original does not notice."""
    session = Session(method, base).run(range(4))
    if order == "model first":
        model, criterion, optimizer = copy.deepcopy((session.model, session.criterion, session.optimizer))
    elif order == "optimizer first":
        optimizer, criterion, model = copy.deepcopy((session.optimizer, session.criterion, session.model))
    else:
        twin = copy.deepcopy(session)
        optimizer, criterion, model = twin.optimizer, twin.criterion, twin.model
    assert optimizer.model is model and optimizer.criterion is criterion
    owned = {id(p) for p in model.parameters()}
    assert all(id(w) in owned for g in optimizer.param_groups for w in g["params"])

    before = copy.deepcopy(session.save())
    torch.manual_seed(5)
    train(model, optimizer, criterion, range(4, 8))
    after = session.save()
    before.pop("rng")
    after.pop("rng")
    assert same_bits(after, before)

    torch.manual_seed(5)
    train(session.model, session.optimizer, session.criterion, range(4, 8))
    assert same_bits(session.model.state_dict(), model.state_dict())
    assert same_bits(session.optimizer.state_dict(), optimizer.state_dict())


@every_base
@every_method
def test_a_pickle_of_model_and_optimizer_trains_on_as_the_original(method, base):
    """The model is held, not pickled with the optimizer; it is given again."""
    session = Session(method, base).run(range(4))
    model, criterion, optimizer = pickle.loads(pickle.dumps((session.model, session.criterion, session.optimizer)))
    assert optimizer.model is None
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    assert same_bits(optimizer.state_dict(), session.optimizer.state_dict())
    optimizer.model = model
    ends = []
    for m, c, o in ((session.model, session.criterion, session.optimizer), (model, criterion, optimizer)):
        torch.manual_seed(5)
        train(m, o, c, range(4, 8))
        ends.append((m.state_dict(), o.state_dict()))
    assert same_bits(*ends)


def test_neither_pickle_nor_checkpoint_holds_the_model():
    class Marked(nn.Linear):
        marker = None

    model = Marked(50, 50)
    model.marker = "held-by-the-model" * 10
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    assert b"held-by-the-model" not in pickle.dumps(optimizer)
    assert "model" not in optimizer.state_dict()


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=20),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, total_iters=5), torch.optim.lr_scheduler.StepLR(o, 4)],
            milestones=[5],
        ),
    ],
    ids=["cosine", "one cycle", "warm-up then steps"],
)
@pytest.mark.parametrize("on_base", [False, True])
def test_schedulers_give_the_base_its_rates_and_resume(make, on_base):
    """The wrapper's learning rates are those of a plain base, before and after a checkpoint."""

    def run(model, optimizer, scheduler, steps):
        rates = []
        for k in steps:
            train(model, optimizer, nn.CrossEntropyLoss(), [k])
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    model = noisy_net()
    plain = BASES["sgd"](model.parameters())
    scheduler = make(plain)
    want = []
    for _ in range(12):
        plain.step()
        scheduler.step()
        want.append(plain.param_groups[0]["lr"])

    def build():
        optimizer = flatmin.SAM(BASES["sgd"](model.parameters()), model=model)
        return optimizer, make(optimizer.base if on_base else optimizer)

    optimizer, scheduler = build()
    first = run(model, optimizer, scheduler, range(6))
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    optimizer, scheduler = build()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert first + run(model, optimizer, scheduler, range(6, 12)) == want


# -- torch.distributed.checkpoint, one process --------------------------------------------------------------------


@pairs("method, base, flatten", METHODS, list(BASES), [False, True])
def test_distributed_checkpoints_round_trip_bit_for_bit(method, base, flatten):
    """Ids are names there, and the flattened form asks the optimizer's state for its keys."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    session = Session(method, base).run(range(5))
    saved = copy.deepcopy(get_optimizer_state_dict(session.model, session.optimizer, options=options))
    weights = copy.deepcopy(session.model.state_dict())
    assert same_bits(session.model.state_dict(), weights)

    other = Session(method, base, seed=9)
    other.model.load_state_dict(weights)
    set_optimizer_state_dict(other.model, other.optimizer, saved, options=options)
    assert same_bits(other.optimizer.state_dict(), session.optimizer.state_dict())
    ends = []
    for run in (session, other):
        torch.manual_seed(5)
        train(run.model, run.optimizer, run.criterion, range(5, 8))
        ends.append(run.model.state_dict())
    assert same_bits(*ends)


@stateful_method
@every_base
def test_distributed_checkpoints_of_a_run_before_its_first_step(method, base):
    """Torch lets the base take a step with lr = 0 to fill its state: no weight moves, nothing counts as filled."""
    session = Session(method, base)
    weights = copy.deepcopy(session.model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(session.model, session.optimizer))
    assert same_bits(session.model.state_dict(), weights)
    flags = [v for entries in saved["state"].values() for k, v in entries.items() if str(k).endswith(".filled")]
    assert flags and not any(map(bool, flags))
    other = Session(method, base)
    set_optimizer_state_dict(other.model, other.optimizer, saved)
    for run in (session, other):
        torch.manual_seed(5)
        run.run(range(3))
    assert same_bits(other.save(), session.save())


# -- during an update ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda o: o.state_dict(), r"state_dict\(\): an update is under way"),
        (lambda o: o.load_state_dict({}), r"load_state_dict\(\): an update is under way"),
        (copy.deepcopy, "cannot copy or pickle during an update"),
        (pickle.dumps, "cannot copy or pickle during an update"),
        (
            lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
            r"add_param_group\(\): an update is under way",
        ),
    ],
    ids=["state_dict", "load_state_dict", "deepcopy", "pickle", "add_param_group"],
)
@pytest.mark.parametrize("place", ["inside", "after"])
def test_nothing_is_saved_or_added_during_an_update(act, text, place):
    """Inside the perturbed pass the weights are elsewhere; after it the update still waits for step()."""
    session = Session("vasso", "sgd").run(range(2))
    model, optimizer = session.model, session.optimizer
    x, y = batch(2)
    session.criterion(model(x), y).backward()
    with optimizer.perturbed():
        session.criterion(model(x), y).backward()
        if place == "inside":
            with pytest.raises(RuntimeError, match=text):
                act(optimizer)
    if place == "after":
        with pytest.raises(RuntimeError, match=text):
            act(optimizer)
    optimizer.step()
    assert len(optimizer.param_groups) == 3
    optimizer.state_dict()
