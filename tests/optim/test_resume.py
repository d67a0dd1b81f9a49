"""Checkpoints, copies and pickles carry everything: what follows is bit for bit what would have followed.

Four methods stand for all: together they have every kind of state. Every method is saved, loaded, copied and pickled
in `test_stateful.py`.
"""

import copy
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
from flatmin.methods import METHODS
from flatmin.optim.support import Loop as Support
from flatmin.optim.support import refusal
from tests.helpers import BASES, REPRESENTATIVES, Session, batch, entry_points, noisy_net, recipe_of, same_bits, train

ROOT = Path(__file__).parents[2]
every_representative = pytest.mark.parametrize("method", REPRESENTATIVES)
every_base = pytest.mark.parametrize("base", BASES)


def through_a_file(checkpoint):
    """What a run on another machine reads."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def kinds_of_state(method):
    """What a checkpoint holds beside the base's own."""
    saved = Session(method).run(range(2)).optimizer.state_dict()
    kinds = {"per weight" for entries in saved["state"].values() for key in entries if str(key).startswith("flatmin.")}
    for group in saved["param_groups"]:
        names = {key.removeprefix("flatmin.") for key in group if key.startswith("flatmin.")}
        for name in names - {"version", "recipe", "parts", "step"}:
            kinds.add(name if name == "rng" else "of the radius" if name.startswith("radius.") else "a number")
    return kinds


def test_the_representatives_have_every_kind_of_state():
    """A method that remembers something else needs a fifth."""
    covered = set().union(*map(kinds_of_state, REPRESENTATIVES))
    assert covered == {"per weight", "a number", "rng", "of the radius"}
    assert not {m: more for m in METHODS if (more := kinds_of_state(m) - covered)}


# -- every entry point ---------------------------------------------------------------------------------------------

ENTRIES = [
    (method, entry)
    for method, params in REPRESENTATIVES.items()
    for entry in (*entry_points(recipe_of(method, **params)), "list of closures", "scaler")
]


@pytest.mark.parametrize(("method", "entry"), ENTRIES)
def test_a_resumed_run_is_the_run(method, entry):
    """Weights, statistics, base state, recipe state, learning rate, scale and random stream."""
    scaled = entry == "scaler"
    session = Session(method).scaled() if scaled else Session(method)
    saved = through_a_file(session.run(range(5), entry).save())
    other = Session(method, seed=9).scaled() if scaled else Session(method, seed=9)
    resumed = other.load(saved).run(range(5, 10), entry).save()
    torch.set_rng_state(saved["rng"])
    assert same_bits(resumed, session.run(range(5, 10), entry).save())


@pytest.mark.parametrize("method", [m for m in REPRESENTATIVES if not refusal(recipe_of(m), Support.FUNCTIONAL)])
def test_a_resumed_run_of_the_pure_function_is_the_run(method):
    recipe = recipe_of(method, **REPRESENTATIVES[method])

    def run(weights, state, steps):
        for k in steps:
            x, y = batch(k)
            loss = lambda p, x=x, y=y: nn.functional.cross_entropy(torch.tanh(x @ p["a"]) @ p["b"], y)  # noqa: E731
            _, u, state = flatmin.value_and_grad(loss, weights, recipe=recipe, rho=0.3, state=state)
            weights = {n: w - 0.1 * u[n] for n, w in weights.items()}
        return weights, state

    draw = torch.Generator().manual_seed(0)
    start = {"a": torch.randn(6, 4, generator=draw), "b": torch.randn(4, 3, generator=draw)}
    half = run(start, None, range(5))
    assert same_bits(run(*through_a_file(half), range(5, 10)), run(start, None, range(10)))


# -- a new process ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight():
    """Every run at step 10 and, gone on with, at step 20."""
    found = {}
    for name in (f"{m}/{b}" for m in (*REPRESENTATIVES, "vasso") for b in BASES):
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


@every_representative
def test_ten_and_ten_steps_in_a_new_process_are_twenty(method, resumed, straight):
    for base in BASES:
        assert same_bits(resumed[f"{method}/{base}"], straight[f"{method}/{base}"][1]), base


def test_the_memory_matters(resumed):
    """Without what VaSSO remembers, the same checkpoint leads elsewhere; so the test above sees the state."""
    session = Session("vasso", "sgd").run(range(10))
    saved = session.save()
    saved["optimizer"] = flatmin.base_state_dict(saved["optimizer"])
    forgetful = Session("vasso", "sgd", seed=9).load(saved).run(range(10, 20)).save()
    assert not same_bits(forgetful["model"], resumed["vasso/sgd"]["model"])


def test_an_aborted_step_before_saving_leaves_resume_exact():
    """The draws of a step that raised belong to the next one, in the run that goes on and in the one that resumes."""
    session = Session("rsam", "sgd").run(range(4))
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
    assert same_bits(Session("rsam", "sgd", seed=9).load(saved).run(range(4, 8)).save(), straight)


# -- copies and pickles -------------------------------------------------------------------------------------------


def copied(session, how):
    """(model, criterion, optimizer) of a copy."""
    if how == "model first":
        return copy.deepcopy((session.model, session.criterion, session.optimizer))
    if how == "optimizer first":
        optimizer, criterion, model = copy.deepcopy((session.optimizer, session.criterion, session.model))
    elif how == "one object":
        twin = copy.deepcopy(session)
        optimizer, criterion, model = twin.optimizer, twin.criterion, twin.model
    else:
        model, criterion, optimizer = pickle.loads(pickle.dumps((session.model, session.criterion, session.optimizer)))
        assert optimizer.model is None  # the model is held, not pickled with the optimizer; it is given again
        optimizer.model = model
    return model, criterion, optimizer


@pytest.mark.parametrize(
    ("method", "how"),
    [
        *zip(REPRESENTATIVES, ("model first", "optimizer first", "one object", "pickle"), strict=True),
        *zip(REPRESENTATIVES, ("pickle", "one object"), strict=False),
    ],
)
def test_a_copy_of_model_and_optimizer_stays_paired(method, how):
    """The copy trains as the original does, and the original does not notice."""
    session = Session(method, "adamw").run(range(4))
    model, criterion, optimizer = copied(session, how)
    assert optimizer.model is model and optimizer.criterion is criterion
    assert same_bits(optimizer.state_dict(), session.optimizer.state_dict())
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
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # torch 2.6: SequentialLR passes it itself
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


@every_representative
@pytest.mark.parametrize(("base", "flatten"), [("sgd", True), ("adamw", False)])
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


@pytest.mark.parametrize("method", ["stale-sam", "ssam-d", "looksam"])
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
