"""Rules: their values, what is known of them, their words, and sums."""

import math

import numpy as np
import pytest

from flatmin.theory import (
    Asymptotics,
    ConstantRule,
    Cosine,
    Custom,
    Diminish,
    PowerRule,
    Tied,
    read_radius,
    read_rule,
    sums,
)
from flatmin.theory.parse import as_radius, as_step
from flatmin.theory.rules import Horizon, as_rule
from flatmin.train.schedule import LearningRateSchedule


def test_values():
    assert [PowerRule(0.5, 1.0).at(n) for n in (1, 2, 5)] == [0.5, 0.25, 0.1]
    assert PowerRule(1.0, 1.0, shift=4).at(1) == 0.2
    assert read_rule("nlogn:2").at(1) == pytest.approx(2 / (2 * math.log(2)))
    assert [round(Diminish(1).at(n), 6) for n in (1, 2, 3)] == [0.1, 0.05, 0.033333]
    assert Diminish(2).at(2) == pytest.approx(0.0707, abs=1e-4)
    assert Diminish(3).at(1) == Diminish(3).at(5) == pytest.approx(0.1 / (2 * math.log(2)))
    assert Diminish(3).at(6) == pytest.approx(0.03034, abs=1e-5)
    assert Diminish(1, epoch=10).at(10) == 0.1 and Diminish(1, epoch=10).at(11) == 0.05
    cosine = Cosine(200)
    assert cosine.at(1) == 0.1 and cosine.at(101) == pytest.approx(0.05) and cosine.at(201) == 0.0


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_diminish_is_the_schedule_of_training(kind):
    schedule = LearningRateSchedule(kind=f"diminish{kind}", lr=0.2, epochs=30, steps_per_epoch=7)
    rule = Diminish(kind, 0.2, 7)
    assert [rule.at(n) for n in range(1, 211)] == [schedule.at(step) for step in range(210)]


@pytest.mark.parametrize(("kind", "as_coded"), [(1, 0.588), (2, 2.778), (3, 0.797)])
def test_sums_over_two_hundred_epochs(kind, as_coded):
    """The published sums are those of the code, which steps its counters late."""
    coded = LearningRateSchedule(kind=f"diminish{kind}", lr=0.1, epochs=200, steps_per_epoch=1, as_coded=True)
    assert sum(coded.at(e) for e in range(200)) == pytest.approx(as_coded, abs=6e-4)


@pytest.mark.parametrize(
    "words",
    ["constant:0.1", "power:c=0.5,p=0.5001", "nlogn:0.3", "diminish1", "diminish2:0.2", "diminish3:lr=1,epoch=390",
     "cosine:T=200,floor=0.01", "harmonic:1,shift=4"],
)  # fmt: skip
def test_asymptotics_are_the_growth(words):
    rule = read_rule(words)
    growth = rule.asymptotics
    assert isinstance(growth, Asymptotics)
    n = 10**14
    predicted = growth.c * n**-growth.p * math.log(n) ** -growth.q
    assert rule.at(n) == pytest.approx(predicted, rel=0.3 if growth.q else 1e-6)


def test_words_read_what_rules_print():
    for words in (
        *("constant:0.1", "power:c=0.5,p=0.5001", "power:c=1.0,p=1.0,q=2.0,shift=1.0", "diminish3:lr=0.1,epoch=2"),
        *("cosine:T=200,lr=0.1,floor=0.0", "constant:0.5*power:c=1.0,p=1.0"),
    ):
        assert str(read_rule(words)) == words


def test_products_and_ties():
    assert (ConstantRule(0.5) * PowerRule(2.0, 1.0)).at(4) == 0.25
    assert (0.5 * PowerRule(2.0, 1.0)).asymptotics == Asymptotics(1.0, 1.0)
    assert (Cosine(7) * PowerRule()).asymptotics == Horizon(7)
    assert (PowerRule() * Custom(lambda n: 1.0)).asymptotics is None
    tied = as_radius("tied:0.5", read_rule("harmonic:0.1"))
    assert tied.at(2) == pytest.approx(0.025) and tied.asymptotics == Asymptotics(0.05, 1.0)
    assert read_radius("tied:0.5") == Tied(0.5)


def test_series():
    for p, q in ((0, 0), (0.5, 0), (1, 0), (1, 1), (0.99, 5)):
        assert sums.sum_is_finite(PowerRule(1.0, p, q, shift=1)).holds is False, (p, q)
    for p, q in ((1, 2), (1.01, 0), (2, 0), (1, 1.001)):
        assert sums.sum_is_finite(PowerRule(1.0, p, q, shift=1)).holds is True, (p, q)


def test_exponents_that_add_up_to_one_are_the_borderline():
    step, radius = (
        PowerRule(1.0, 0.1),
        PowerRule(1.0, 0.2) * PowerRule(1.0, 0.7),
    )  # 0.1 + (0.2 + 0.7) = 0.9999999999999999
    assert sums.sum_is_finite(step * radius).holds is False
    assert (step * radius).asymptotics == Asymptotics(1.0, 1.0)
    assert (
        PowerRule(1.0, 0.7) * PowerRule(1.0, 0.1) * PowerRule(1.0, 0.2) * PowerRule(1.0, 0, 2, 1)
    ).asymptotics.p == 1.0


def test_tails_agree_with_sums():
    for terms in (Asymptotics(2.0, 1.5), Asymptotics(1.0, 2.0), Asymptotics(0.5, 3.0)):
        n = np.arange(1000, 3_000_000, dtype=np.float64)
        found, beyond = sums.tail(terms), sums.tail(terms)
        total = terms.c * (n**-terms.p).sum() + beyond.c * 3e6**-beyond.p
        assert found.c * 1000**-found.p == pytest.approx(total, rel=2e-3)
    assert sums.tail(Asymptotics(1.0, 1.0, 3.0)) == Asymptotics(0.5, 0.0, 2.0)
    with pytest.raises(ValueError, match="diverges and has no tails"):
        sums.tail(Asymptotics(1.0, 1.0))


def test_unknown_rules_get_numeric_evidence_that_says_so():
    square = sums.sum_is_finite(Custom(lambda n: n**-2.0))
    assert square.holds is True and square.proof == "numeric" and "not a proof" in square.reason
    assert sums.sum_is_finite(Custom(lambda n: 1 / n)).holds is False
    assert sums.sum_is_finite(Custom(lambda n: 1 / (n * math.log(n + 1)))).holds is None
    assert sums.is_decreasing(Custom(lambda n: 1 / n + (n == 5))).holds is False
    assert sums.tends_to_zero(Custom(lambda n: 0.1 + 1 / n)).holds is False


def test_bad_rules_are_refused_in_a_sentence():
    for call, message in [
        (lambda: read_rule("harmnic:0.1"), r"^unknown rule 'harmnic'; did you mean 'harmonic'\? \(rules: a number, "),
        (lambda: read_rule("power:c=1"), "^power needs p, as in 'power:p=0.5'.$"),
        (lambda: read_rule("power:p=1,z=2"), r"^power has no key 'z' \(keys: c, p, q, shift\).$"),
        (lambda: read_rule("power:p=one"), "p must be given one number, got 'one'"),
        (lambda: read_rule("tied:0.5"), "cannot be used as the step size"),
        (lambda: as_step(Tied(0.5)), "cannot be used as the step size"),
        (lambda: read_radius("tied:1*power:p=1"), "cannot be part of a product"),
        (lambda: ConstantRule(-1), "^constant: c must be a finite number >= 0, got -1.$"),
        (lambda: PowerRule(1.0, 1.0, 1.0), "shift must be at least 1, as log 1 = 0"),
        (lambda: Diminish(4), "must be 1, 2 or 3, got 4"),
        (lambda: Cosine(0), "T must be a whole number >= 1, got 0"),
        (lambda: Cosine(9, lr=0.1, floor=0.2), "floor must be at most lr"),
        (lambda: Tied(0), "the factor must be positive"),
        (lambda: PowerRule().at(0), "numbered from 1, got n = 0"),
        (lambda: Custom(lambda n: -1.0, "mine").at(3), "^mine must give finite numbers >= 0, got -1.0 at n = 3.$"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="a rule must be a number, text"):
        as_rule([0.1])
    with pytest.raises(TypeError, match="must be a function"):
        Custom(3)
