import pytest

from flatmin.study.arms import candidates
from flatmin.study.config import CompareConfig, load
from flatmin.study.timing import Speed, guess_seconds, measure_speed, time_ratios
from flatmin.train.config import RunConfig
from flatmin.train.trainer import Trainer

BASE = RunConfig(method="sgd", batch_size=16, data="tests.user_side:data", model="tests.user_side:slow")


def test_ratios_follow_the_number_of_gradients():
    """Each forward pass sleeps for 20 ms, so two of them take twice as long whatever else the machine does."""
    sam = RunConfig(**{**vars(BASE), "method": "sam", "rho": 0.05})
    found = time_ratios({"copy": BASE, "sam": sam}, BASE, rounds=3)
    assert found["copy"].median == pytest.approx(1, abs=0.25)
    assert found["sam"].median == pytest.approx(2, abs=0.4)
    assert found["sam"].q25 <= found["sam"].median <= found["sam"].q75


def test_one_round_has_no_spread():
    found = time_ratios({"copy": BASE}, BASE, rounds=1)["copy"]
    assert found.q25 == found.median == found.q75


def test_a_guess_is_made_of_steps_scores_and_curvature():
    speed = Speed(step=0.01, score=0.1, steps=10)
    quiet = RunConfig(method="sgd", epochs=5)
    assert guess_seconds([quiet], speed, 0) == pytest.approx(5 * (10 * 0.01 + 0.1))
    climbing = RunConfig(method="sam", rho=0.1, epochs=5)
    assert guess_seconds([climbing], speed, 0) == pytest.approx(5 * (2 * 10 * 0.01 + 0.1))
    assert guess_seconds([quiet] * 4, speed, 2) < guess_seconds([quiet] * 4, speed, 1)
    measured = RunConfig(method="sgd", epochs=5, measure=True)
    assert guess_seconds([measured], speed, 0) > guess_seconds([quiet], speed, 0)


def test_speed_is_measured_on_the_trainer():
    speed = measure_speed(Trainer(BASE), most=0.1)
    assert speed.step >= 0.02
    assert speed.score >= 0.02
    assert speed.steps == 4


def test_every_candidate_has_a_guess():
    config: CompareConfig = load("digits")
    speed = Speed(step=0.002, score=0.01, steps=15)
    assert guess_seconds([c.config for c in candidates(config)], speed, 2) > 0
