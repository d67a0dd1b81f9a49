"""The composition law over all names: what goes together runs, what does not is refused with a reason."""

import itertools
import re

import torch
from torch import nn

import flatmin
from flatmin.cli import matrix
from flatmin.methods import METHODS, Need, compose

PAIRS = list(itertools.combinations(METHODS, 2))
# Served by a plain closure with `model=` and `criterion=`; the net has a normalisation layer, the base momentum.
SERVED = {
    Need.CRITERION,
    Need.NAMES,
    Need.LAYERS,
    Need.RANDOM,
    Need.PER_SAMPLE,
    Need.SECOND_ORDER,
    Need.BASE_MOMENTUM,
    Need.DECIDES_BY_VALUE,
}


def outcome(name):
    """The recipe, or the sentence of the refusal."""
    try:
        return compose(name)
    except ValueError as error:
        return str(error)


def test_every_pair_composes_or_is_refused_in_one_sentence_that_names_both():
    for a, b in PAIRS:
        found = outcome(f"{a}+{b}")
        if not isinstance(found, str):
            for part in (*METHODS[a].parts, *METHODS[b].parts):
                assert found.parts[part.kind] == part
            continue
        shared = {p.kind for p in METHODS[a].parts} & {p.kind for p in METHODS[b].parts}
        if shared:
            assert re.fullmatch(rf"'{a}' and '{b}' both set the ({'|'.join(sorted(shared))}); choose one\.", found)
        else:
            assert re.fullmatch(
                rf"'{a}' and '{b}' cannot be combined: \w+ \w+\(.*\) needs .+, but \w+ \w+\(.*\) does not provide it: "
                r".+\.",
                found,
            )
        assert "\n" not in found and ". " not in re.sub(r"\(.*?\)", "", found)


def test_the_order_does_not_matter():
    for a, b in PAIRS:
        one, other = outcome(f"{a}+{b}"), outcome(f"{b}+{a}")
        if isinstance(one, str):
            assert isinstance(other, str)
            assert one == other.replace(f"'{b}' and '{a}'", f"'{a}' and '{b}'")
        else:
            assert not isinstance(other, str)
            assert one.parts == other.parts and one.needs == other.needs
            assert (one.name, other.name) == (f"{a}+{b}", f"{b}+{a}")


def test_a_rule_goes_with_everything_that_ascends_and_leaves_its_part_free():
    rules = {name: [part.kind for part in method.parts] for name, method in METHODS.items()}
    rules = {name: kinds[0] for name, kinds in rules.items() if kinds in (["schedule"], ["radius"])}
    for rule in rules.keys() - {"sgd", "ae-sam"}:  # neither of them leaves all the rest free
        kind = rules[rule]
        for name, method in METHODS.items():
            if name in ("sgd", "sgdhess") or kind in {part.kind for part in method.parts}:
                continue
            assert not isinstance(outcome(f"{name}+{rule}"), str), (name, rule)


def test_the_matrix_says_what_compose_says():
    found = matrix.compatibilities(METHODS)
    assert set(found) == set(PAIRS)
    for (a, b), verdict in found.items():
        refusal = outcome(f"{a}+{b}")
        assert verdict.reason == (refusal if isinstance(refusal, str) else None)
        assert (verdict.symbol == matrix.GOES) == (verdict.reason is None)
    symbols = {verdict.symbol for verdict in found.values()}
    assert symbols <= {matrix.GOES, matrix.CONTRADICTS, *matrix.SYMBOLS.values()}


def test_every_refusal_is_in_the_list_below_the_matrix():
    found = matrix.compatibilities(METHODS)
    text = re.sub(r"\s+", " ", matrix.as_text(METHODS, 80).split("\n\n")[-1])
    groups = [set(re.split(r"[ ,:]+", line.rstrip("."))) for line in text.split(" - ")]
    for (a, b), verdict in found.items():
        if verdict.reason is not None:
            assert any({a, b} <= group for group in groups), (a, b)


def test_what_composes_runs():
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
    for first, second in PAIRS:
        recipe = outcome(f"{first}+{second}")
        if isinstance(recipe, str) or not recipe.needs <= SERVED:
            continue
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))
        criterion = flatmin.Criterion(nn.CrossEntropyLoss())
        optimizer = flatmin.wrap(
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            recipe.for_length(2),
            model=model,
            criterion=criterion,
        )

        def closure(model=model, criterion=criterion, optimizer=optimizer):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            optimizer.backward(loss)
            return loss

        losses = [optimizer.step(closure) for _ in range(2)]
        assert all(torch.isfinite(loss) for loss in losses), recipe.name
        assert all(p.isfinite().all() for p in model.parameters()), recipe.name
        assert optimizer.counts() == {"updates": 2, "nonfinite_ascents": 0, "skipped_steps": 0}, recipe.name
