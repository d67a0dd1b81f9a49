"""Names compose into recipes, and what does not go together is refused with a sentence."""

import dataclasses
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
import torch

import flatmin
from flatmin import methods as parts
from flatmin.methods import (
    METHODS,
    Combine,
    Direction,
    Method,
    Need,
    Objective,
    Radius,
    Recipe,
    compose,
    method_table,
)


@dataclass(frozen=True, kw_only=True)
class Mix(Combine):
    """Needs g itself."""

    needs: ClassVar = frozenset({Need.GRADIENT_AT_W})
    uses_gradient: ClassVar = True
    alpha: float = 0.5

    def __call__(self, g, gs, state, c):
        return gs[0], {}


@dataclass(frozen=True, kw_only=True)
class Shrink(Radius):
    """Has a parameter named like BiSAM's."""

    alpha: float = 1.0
    on: bool = True
    rule: str = "power"

    def __call__(self, c):
        return self.alpha


@dataclass(frozen=True, kw_only=True)
class NoPass(Direction):
    """Takes no pass 1."""

    evaluates: ClassVar = False

    def __call__(self, g, state, c):
        return None, {}


@dataclass(frozen=True, kw_only=True)
class Moved(Direction):
    """Takes pass 1 elsewhere."""

    moves_start: ClassVar = True


def entry(name, *its_parts):
    return Method(name=name, title=name.upper(), parts=its_parts, formula="u = u", paper="none", summary="For tests.")


TABLE = {
    **METHODS,
    "mix": entry("mix", Mix()),
    "shrink": entry("shrink", Shrink()),
    "no-pass": entry("no-pass", NoPass()),
    "moved": entry("moved", Moved()),
}


# -- composition --------------------------------------------------------------------------------------------------


def test_a_composition_has_the_parameters_of_all_its_names():
    recipe = compose("asam + vasso+bisam-log", theta=0.8)
    assert recipe == compose("asam+vasso+bisam-log", theta=0.8)
    assert recipe.parts == compose("vasso+bisam-log+asam", theta=0.8).parts
    assert recipe.parameters() == {
        "objective.mu": 1.0,
        "direction.theta": 0.8,
        "geometry.eta": 0.0,
        "geometry.weights_only": False,
    }


def test_a_composition_inherits_the_radius_of_its_geometry():
    """L2 0.05, ASAM 0.5, USAM its own."""
    expected = {
        "sam": 0.05,
        "asam": 0.5,
        "usam": 0.05,
        "vasso+asam": 0.5,
        "fsam+bisam-tanh+asam": 0.5,
        "vasso": 0.05,
    }
    assert {name: compose(name).default_rho for name in expected} == expected


def test_cost_and_needs():
    costs = {
        n: (compose(n).gradient_evaluations, compose(n).extra_copies) for n in ("sgd", "sam", "vasso", "bisam-log")
    }
    assert costs == {"sgd": (1.0, 0), "sam": (2.0, 1), "vasso": (2.0, 3), "bisam-log": (2.0, 1)}
    assert compose("mix", TABLE).extra_copies == 2
    assert compose("no-pass", TABLE).gradient_evaluations == 1.0
    assert compose("imbsam+every-k", k=4).gradient_evaluations == 0.25 * 3 + 0.75 * 2
    assert compose("sam").needs == frozenset()
    assert compose("vasso+bisam-log").needs == {Need.CRITERION}
    assert compose("asam", weights_only=True).needs == {Need.NAMES}
    assert compose("asam").needs == frozenset()
    # What parts ask of each other is settled by then, and no concern of the loop.
    assert compose("mix", TABLE).needs == frozenset()


def test_recipes_are_frozen_values():
    recipe = compose("vasso+asam")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.direction = parts.Gradient()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.direction.theta = 0.1
    assert recipe == compose("vasso+asam") and hash(recipe) == hash(compose("vasso+asam"))
    assert recipe != compose("vasso+asam", theta=0.1)
    assert compose("sam") == Recipe(name="sam")
    assert str(compose("vasso", theta=0.25)) == "vasso(direction.theta=0.25)"


def test_composition_changes_no_table_entry():
    before = dict(METHODS)
    compose("vasso+asam", theta=0.1, eta=0.5)
    assert dict(METHODS) == before and METHODS["vasso"].parts[0] == parts.EMA(theta=0.9)


# -- refusals -----------------------------------------------------------------------------------------------------


def test_unknown_names():
    for name, text in [
        ("assam", r"unknown method 'assam'; did you mean 'asam'\?"),
        ("bisam", "did you mean 'bisam-"),
        ("sam+fsma", "unknown method 'fsma'; did you mean 'fsam'"),
        ("zzzzzz", r"unknown method 'zzzzzz' \(methods: sgd, sam, asam"),
        ("", "unknown method ''"),
        ("tilted-sam", r"unknown method 'tilted-sam' \(methods: "),  # near nothing: no guess
        ("SS-SAM", "unknown method 'SS-SAM'; did you mean 'bernoulli'"),  # by its title in the literature
    ]:
        with pytest.raises(ValueError, match=text):
            compose(name)


def test_the_case_of_a_name_does_not_matter_unless_two_methods_share_it():
    assert compose("VaSSO+BiSAM-LOG+asam") == compose("vasso+bisam-log+asam")
    table = {n: dataclasses.replace(METHODS["sam"], name=n) for n in ("Mine", "mine")}
    assert compose("Mine", table).name == "Mine"
    with pytest.raises(ValueError, match="unknown method 'MINE'; did you mean 'Mine'"):
        compose("MINE", table)


def test_lengths_and_numbers_of_numpy():
    assert compose("late", total=np.int64(9), fraction=np.float32(0.5)) == compose("late", total=9, fraction=0.5)
    assert compose("late").for_length(np.int32(9)) == compose("late", total=9)
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="for_length: total must be a whole number of updates >= 1, got"):
            compose("sam").for_length(bad)


def test_phase_must_fit_its_fellows():
    """Masks refresh on steps 0, interval, ...: of these at least some must ascend."""
    with pytest.raises(ValueError, match=r"phase must be below k = 5, got 5"):
        compose("every-k", phase=5)
    with pytest.raises(ValueError, match=r"every 100th step, but EveryK\(k=5, phase=4\) ascends on none of these"):
        compose("every-k+ssam-d", phase=4)
    assert compose("every-k+ssam-d", phase=4, interval=99).schedule.phase == 4


def test_clashes_say_which_and_why():
    for name, text in [
        ("asam+usam", "'asam' and 'usam' both set the geometry; choose one"),
        ("bisam-log+bisam-tanh", "both set the objective"),
        ("vasso+vasso", "'vasso' and 'vasso' both set the direction"),
        (
            "mix+bisam-log",
            "'mix' and 'bisam-log' cannot be combined: combine .* needs the gradient of the training loss at w, "
            "but objective .* does not provide it: pass 1 maximises another loss",
        ),
        ("bisam-tanh+vasso+mix", "cannot be combined: .*pass 1 maximises another loss"),
        ("mix+moved", "needs the gradient of the training loss at w, .*pass 1 is not taken at w"),
        ("mix+no-pass", "it takes no pass 1"),
        (
            "sgd+vasso",
            "'sgd' and 'vasso' cannot be combined: direction .* needs an ascent .*it never ascends",
        ),
    ]:
        with pytest.raises(ValueError, match=text):
            compose(name, TABLE)


def test_parts_that_clash_are_refused_in_a_recipe_too():
    with pytest.raises(ValueError, match=r"Mix.* needs the gradient of the training loss at w"):
        Recipe(combine=Mix(), objective=parts.BiSAMLog())
    with pytest.raises(TypeError, match="geometry must be a part of kind 'geometry', got EMA"):
        Recipe(geometry=parts.EMA())
    with pytest.raises(TypeError, match="direction must be a part of kind 'direction', got 'ema'"):
        Recipe(direction="ema")


# -- parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"theta": 0.3},
        {"direction.theta": 0.3},
        {"direction": {"theta": 0.3}},
        {"direction": parts.EMA(theta=0.3)},
    ],
    ids=["bare", "qualified", "dict", "part"],
)
def test_four_ways_to_write_a_parameter(params):
    assert compose("vasso+asam", **params).direction == parts.EMA(theta=0.3)


def test_a_name_that_two_parts_share_must_be_qualified():
    with pytest.raises(
        ValueError,
        match=r"several parameters 'alpha'; write objective\.alpha or radius\.alpha\.|"
        r"several parameters 'alpha'; write radius\.alpha or objective\.alpha\.",
    ):
        compose("bisam-tanh+shrink", TABLE, alpha=0.2)
    recipe = compose("bisam-tanh+shrink", TABLE, **{"objective.alpha": 0.2}, radius={"alpha": 3.0})
    assert recipe.objective.alpha == 0.2 and recipe.radius.alpha == 3.0
    assert compose("shrink", TABLE, alpha=0.2).radius.alpha == 0.2


def test_a_default_part_can_be_replaced_by_keyword():
    assert compose("sam", geometry=parts.Adaptive(eta=0.1)).default_rho == 0.5
    with pytest.raises(ValueError, match=r"geometry L2\(\) has no parameter 'eta'"):
        compose("sam", **{"geometry.eta": 0.1})


def test_whole_numbers_are_taken_where_a_float_is_meant():
    recipe = compose("vasso", theta=1)
    assert recipe == compose("vasso", theta=1.0) and isinstance(recipe.direction.theta, float)
    assert str(recipe) == str(compose("vasso", theta=1.0))


def test_bad_parameters_are_refused():
    for name, params, text in [
        (
            "vasso",
            {"tehta": 0.3},
            r"'vasso' has no parameter 'tehta'; did you mean 'theta'\? \(parameters: theta\)",
        ),
        ("sam", {"theta": 0.3}, r"'sam' has no parameter 'theta' \(it has none\)"),
        ("vasso", {"direction": {"tehta": 0.3}}, "has no parameter 'tehta'; did you mean 'theta'"),
        ("vasso", {"direction.tehta": 0.3}, "has no parameter 'tehta'; did you mean 'theta'"),
        (
            "vasso",
            {"directoin.theta": 0.3},
            "unknown part 'directoin' in 'directoin.theta'; did you mean 'direction'",
        ),
        ("vasso", {"direction": 0.3}, "direction must be a part or a dict of its parameters, got 0.3"),
        (
            "vasso",
            {"direction": parts.EMA(), "theta": 0.3},
            "direction is given both as a part and by 'theta'",
        ),
        ("vasso", {"theta": 0.0}, r"EMA: theta must be in \(0, 1\], got 0.0"),
        ("vasso", {"theta": float("nan")}, "theta must be in"),
        ("vasso", {"theta": "0.3"}, "theta must be in .* got '0.3'"),
        ("fsam", {"lam": 1.0}, "lam must be below 1"),
        ("fsam", {"ema": "next"}, "ema must be 'current' .* got 'next'"),
        ("fsam", {"ema": 3}, "direction.ema must be str, got 3"),
        ("asam", {"eta": -1.0}, "eta must be in"),
        ("asam", {"weights_only": 1}, "geometry.weights_only must be bool, got 1"),
        ("bisam-log", {"mu": 0.0}, "mu must be in"),
    ]:
        with pytest.raises(ValueError, match=text):
            compose(name, **params)


# -- what parts may declare ---------------------------------------------------------------------------------------


def test_a_parameter_must_not_be_named_like_a_kind_or_an_option_of_the_optimizer():
    """`rho=` and `direction=` would be ambiguous in `wrap`."""
    for reserved in ("rho", "direction", "closure", "lr"):
        with pytest.raises(TypeError, match=reserved):
            type("Bad", (Radius,), {"__annotations__": {reserved: float}, reserved: 0.1})


# -- the table ----------------------------------------------------------------------------------------------------


def test_every_built_in_entry_is_complete():
    for name, method in METHODS.items():
        assert method.name == name and "+" not in name
        assert method.title and method.formula and method.paper
        assert method.summary.endswith(".") and method.when.endswith(".") and method.when[0].isupper()
        assert method.url.startswith("https://") or not method.url
        assert method.recipe() == compose(name) and method.recipe().name == name
        for part in method.parts:
            assert getattr(parts, type(part).__name__) is type(part), f"{part} is not in the __all__ of its file"
            for parameter in part.parameters():
                assert f"{parameter}:" in type(part).__doc__, f"{type(part).__name__} does not document {parameter}"


def plugin(monkeypatch, name="flatmin_test_plugin", **contents):
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return name


def test_a_plugin_adds_its_methods(monkeypatch):
    name = plugin(monkeypatch, METHODS={"mix": TABLE["mix"]})
    table = method_table([name])
    assert set(table) >= {*METHODS, "mix"} and "mix" not in METHODS
    assert compose("mix+vasso", table).combine == Mix()
    assert method_table([name, name]).keys() == table.keys()


def test_bad_plugins_are_refused(monkeypatch):
    for contents, text in [
        ({}, "plugin 'flatmin_test_plugin' must define a dict METHODS that maps names to flatmin.methods.Method"),
        ({"METHODS": [TABLE["mix"]]}, "must define a dict METHODS"),
        ({"METHODS": {"mix": Mix()}}, "must define a dict METHODS"),
        ({"METHODS": {"other": TABLE["mix"]}}, "key 'other' must equal the method's name"),
        ({"METHODS": {"a+b": entry("a+b", Mix())}}, r"must not contain '\+'"),
        ({"METHODS": {"sam": entry("sam", Mix())}}, "the name 'sam' is already taken"),
    ]:
        with pytest.raises(ValueError, match=text):
            method_table([plugin(monkeypatch, **contents)])


def test_a_plugin_that_cannot_be_imported():
    with pytest.raises(ValueError, match="plugin 'no_such_module' could not be imported: No module named"):
        method_table(["no_such_module"])


def test_an_entry_point_is_found_without_naming_it(monkeypatch, tmp_path):
    """compose() looks there only for names that are not built in, and once for each path."""
    flatmin.method_table()
    monkeypatch.syspath_prepend(tmp_path)
    name = plugin(monkeypatch, METHODS={"mix": TABLE["mix"]})
    found = EntryPoints([EntryPoint("mine", f"{name}:METHODS", "flatmin.methods")])
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found.select(group=group))
    assert compose("mix+asam").combine == Mix()
    assert flatmin.method_table()["mix"] is TABLE["mix"]
    with pytest.raises(ValueError, match="unknown method 'mxi'; did you mean 'mix'"):
        compose("mxi")


def test_built_in_names_do_not_read_entry_points(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: pytest.fail("read"))
    assert compose("vasso+asam").name == "vasso+asam"


# -- the engine refuses what it cannot serve -----------------------------------------------------------------------


@pytest.mark.parametrize("need", [Need.PER_SAMPLE, Need.LAYERS, Need.BASE_MOMENTUM])
def test_needs_that_a_bare_optimizer_cannot_serve_are_refused_at_construction(need):
    @dataclass(frozen=True, kw_only=True)
    class Wants(Objective):
        """Asks for something."""

        needs: ClassVar = frozenset({need})

    base = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match=f"^wanting needs {need.value[:14]}"):
        flatmin.SAM(base, recipe=Recipe(objective=Wants(), name="wanting"))
