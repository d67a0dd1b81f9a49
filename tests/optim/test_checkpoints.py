"""Which checkpoints load, what is refused of others, and what a checkpoint does not hold."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import nn

import flatmin
from flatmin import methods as parts
from tests.helpers import BASES, REPRESENTATIVES, Session, batch, noisy_net, same_bits, train

every_representative = pytest.mark.parametrize("method", REPRESENTATIVES)
every_base = pytest.mark.parametrize("base", BASES)


def size_of(checkpoint) -> int:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getbuffer().nbytes


# -- other checkpoints --------------------------------------------------------------------------------------------


@every_base
@every_representative
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
    if method != "ssam-d":  # its draws have gone on
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
@every_representative
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


@pytest.mark.parametrize("method", ["vasso", "ssam-d", "sam", "asam", "sam-magnitude"])
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
    with pytest.raises(ValueError, match=r"recipe vasso\+asam.* runs sam.*rho is then this optimizer's"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"the keys 'optimizer_states'; .*\['optimizer_states'\]\[0\]"):
        flatmin.base_state_dict({"optimizer_states": [saved]})
    optimizer.load_state_dict(flatmin.base_state_dict(saved))
    assert optimizer.param_groups[0]["rho"] == 0.05
    with pytest.raises(ValueError, match=r"recipe recipe\(\), but this optimizer runs recipe\(\)"):
        small(flatmin.Recipe(geometry=parts.Unnormalised()))[1].load_state_dict(small(flatmin.Recipe())[1].state_dict())


def test_other_parameters_of_the_same_method():
    """Refused where the recipe's memory was made with them, said where there is none; functions cannot be compared."""
    checkpoint = small("vasso", theta=0.5)[1].state_dict()
    with pytest.raises(ValueError, match=r"theta=0\.5.*theta=0\.9"):
        small("vasso")[1].load_state_dict(checkpoint)
    with pytest.warns(UserWarning, match=r"made with schedule\.k=3; this optimizer continues with schedule\.k=4\."):
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
    with pytest.warns(UserWarning, match="does not save the base optimizer"):
        optimizer.load_state_dict(saved)
    train(net, optimizer, nn.CrossEntropyLoss(), [0])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["rho"], "adaptive" in group) == (0.01, 0.3, False)
    assert all("exp_avg" in entries and "old_p" not in entries for entries in optimizer.state_dict()["state"].values())
    with pytest.raises(ValueError, match=rf"single-file SAM with adaptive={adaptive}, but this optimizer runs "):
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


def test_neither_pickle_nor_checkpoint_holds_the_model():
    class Marked(nn.Linear):
        marker = None

    model = Marked(50, 50)
    model.marker = "held-by-the-model" * 10
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    assert b"held-by-the-model" not in pickle.dumps(optimizer)
    assert "model" not in optimizer.state_dict()


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
def test_nothing_is_saved_or_added_during_an_update(act, text):
    """Inside the perturbed pass the weights are elsewhere; after it the update still waits for step()."""
    for place in ("inside", "after"):
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
