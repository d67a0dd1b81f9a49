import dataclasses
import itertools
import math
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from flatmin.train.schedule import DIMINISH, SCHEDULES, LearningRateSchedule

ROUNDING = 1e-12
FOUR_DIGITS = 5e-4


def by_epoch(**options):
    """The rates of all epochs, at one update an epoch."""
    schedule = LearningRateSchedule(**{"lr": 0.1, "epochs": 200, "steps_per_epoch": 1, **options})
    return [schedule.at(step) for step in range(schedule.epochs * schedule.steps_per_epoch)]


def of_torch(scheduler, count, lr=0.1, **options):
    """The rates of a torch scheduler that is stepped after each of `count` updates."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    stepped = scheduler(optimizer, **options)
    rates = []
    for _ in range(count):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        stepped.step()
    return rates


def counted_late(kind, epochs, lr=0.1):
    """The published diminishing schedules, as counters that are advanced after each epoch and start at 0."""
    rates, rate, base = [], lr, 2
    for finished in range(epochs):
        rates.append(rate)
        if kind == "diminish2":
            rate = lr / (finished + 1) ** 0.5001
        elif finished % 5 == 0:
            base += 1
            rate = lr / (base * math.log(base))
    return rates


@st.composite
def schedules(draw):
    kind = draw(st.sampled_from(SCHEDULES))
    epochs = draw(st.integers(2, 12))
    steps = draw(st.integers(1, 7))
    options = {"kind": kind, "epochs": epochs, "steps_per_epoch": steps, "lr": draw(st.floats(1e-6, 10.0))}
    if kind in DIMINISH:
        return LearningRateSchedule(**options, as_coded=draw(st.booleans()))
    options["unit"] = draw(st.sampled_from(("epoch", "step")))
    shortest = 1.0 if options["unit"] == "epoch" else 1 / steps
    if draw(st.booleans()):
        lengths = st.floats(shortest, epochs, exclude_min=True, exclude_max=True)
        options["warmup"] = draw(lengths.filter(lambda one: one * (1 if options["unit"] == "epoch" else steps) > 1))
        options["warmup_lr"] = draw(st.floats(0.0, 2.0))
    if kind in ("cosine", "linear"):
        options["lr_min"] = options["lr"] * draw(st.floats(0.0, 1.0))
    if kind in ("multistep", "exponential"):
        options["gamma"] = draw(st.floats(0.01, 1.0))
    if kind == "multistep":
        options["milestones"] = tuple(sorted(draw(st.sets(st.integers(1, epochs - 1), min_size=1))))
    return LearningRateSchedule(**options)


def rates_of(schedule):
    return [schedule.at(step) for step in range(schedule.epochs * schedule.steps_per_epoch + 1)]


def parted(schedule):
    """The rates of the warm-up, and those after it."""
    rates, per = rates_of(schedule), schedule.steps_per_epoch
    begun = [step // per if schedule.unit == "epoch" else step / per for step in range(len(rates))]
    early = [rate for rate, e in zip(rates, begun, strict=True) if e < schedule.warmup]
    return early, rates[len(early) :]


@pytest.mark.parametrize(
    ("options", "golden"),
    [
        ({"kind": "diminish1"}, {0: 0.1, 1: 0.05, 2: 0.03333, 199: 5e-4}),
        ({"kind": "diminish2"}, {0: 0.1, 1: 0.07071, 2: 0.05773, 199: 0.007067}),
        ({"kind": "diminish2", "as_coded": True}, {0: 0.1, 1: 0.1, 2: 0.07071, 3: 0.05773, 199: 0.007085}),
        ({"kind": "diminish3"}, {0: 0.07213, 4: 0.07213, 5: 0.03034, 9: 0.03034, 10: 0.01803, 199: 6.568e-4}),
        (
            {"kind": "diminish3", "as_coded": True},
            {0: 0.1, 1: 0.03034, 5: 0.03034, 6: 0.01803, 10: 0.01803, 11: 0.01243, 15: 0.01243, 199: 6.370e-4},
        ),
        ({"kind": "constant"}, {0: 0.1, 199: 0.1}),
        ({"kind": "cosine"}, {0: 0.1, 50: 0.08536, 100: 0.05, 150: 0.01464, 199: 6.168e-6}),
        (
            {"kind": "multistep", "lr": 0.05, "milestones": (60, 120, 160), "gamma": 0.2},
            {59: 0.05, 60: 0.01, 119: 0.01, 120: 0.002, 159: 0.002, 160: 0.0004, 199: 0.0004},
        ),
    ],
)
def test_golden_rates_of_200_epochs(options, golden):
    rates = by_epoch(**options)
    assert {epoch: rates[epoch] for epoch in golden} == pytest.approx(golden, rel=FOUR_DIGITS)


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"kind": "constant"}, 20.0),
        ({"kind": "diminish1"}, 0.588),
        ({"kind": "diminish1", "as_coded": True}, 0.588),
        ({"kind": "diminish2", "as_coded": True}, 2.778),
        ({"kind": "diminish3", "as_coded": True}, 0.797),
        ({"kind": "diminish2"}, 2.685),
        ({"kind": "diminish3"}, 1.055),
        ({"kind": "cosine"}, 10.05),
        ({"kind": "linear"}, 10.05),
    ],
)
def test_sums_over_200_epochs(options, total):
    assert math.fsum(by_epoch(**options)) == pytest.approx(total, abs=5e-4)


@pytest.mark.parametrize("kind", ["diminish2", "diminish3"])
def test_as_coded_is_a_counter_that_runs_late(kind):
    assert by_epoch(kind=kind, as_coded=True) == pytest.approx(counted_late(kind, 200), rel=ROUNDING)


def test_diminish3_is_1_over_b_ln_b_on_every_plateau():
    plateaus = [0.1 / (b * math.log(b)) for b in range(2, 42) for _ in range(5)]
    assert by_epoch(kind="diminish3") == pytest.approx(plateaus, rel=ROUNDING)


@pytest.mark.parametrize(
    ("options", "scheduler", "same"),
    [
        ({}, lr_scheduler.CosineAnnealingLR, {"T_max": 200}),
        ({"lr_min": 0.01}, lr_scheduler.CosineAnnealingLR, {"T_max": 200, "eta_min": 0.01}),
        (
            {"kind": "multistep", "milestones": (60, 120, 160), "gamma": 0.2},
            lr_scheduler.MultiStepLR,
            {"milestones": [60, 120, 160], "gamma": 0.2},
        ),
        ({"kind": "exponential", "gamma": 0.97}, lr_scheduler.ExponentialLR, {"gamma": 0.97}),
        ({"kind": "diminish1"}, lr_scheduler.LambdaLR, {"lr_lambda": lambda epoch: 1 / (epoch + 1)}),
        (
            {"kind": "linear", "lr_min": 0.02},
            lr_scheduler.LinearLR,
            {"start_factor": 1.0, "end_factor": 0.2, "total_iters": 200},
        ),
    ],
)
def test_one_update_an_epoch_is_torchs_scheduler(options, scheduler, same):
    # torch multiplies its way from epoch to epoch, hence the digits lost over 200 of them.
    assert by_epoch(**options) == pytest.approx(of_torch(scheduler, 200, **same), rel=1e-8, abs=1e-15)


def test_unit_step_is_torchs_cosine_stepped_at_every_update():
    rates = by_epoch(unit="step", epochs=5, steps_per_epoch=13, lr_min=0.01)
    assert rates == pytest.approx(of_torch(lr_scheduler.CosineAnnealingLR, 65, T_max=65, eta_min=0.01), rel=1e-10)


def test_cosine_by_epoch_holds_within_an_epoch():
    expected = [rate for rate in of_torch(lr_scheduler.CosineAnnealingLR, 6, T_max=6) for _ in range(4)]
    assert by_epoch(epochs=6, steps_per_epoch=4) == pytest.approx(expected, rel=1e-10)


def test_linear_falls_by_equal_steps():
    rates = by_epoch(kind="linear", unit="step", lr=1.0, epochs=2, steps_per_epoch=5, lr_min=0.5)
    assert rates == pytest.approx([1 - 0.05 * step for step in range(10)], rel=ROUNDING)


def test_exponential_by_step_reaches_the_same_rate_at_every_epoch():
    options = {"kind": "exponential", "gamma": 0.9, "epochs": 6, "steps_per_epoch": 4}
    each, held = by_epoch(unit="step", **options), by_epoch(unit="epoch", **options)
    assert each[::4] == pytest.approx(held[::4], rel=ROUNDING)
    assert each[1] == pytest.approx(0.1 * 0.9**0.25, rel=ROUNDING)


def test_warm_up_by_step_is_counted_at_the_end_of_an_update():
    rates = by_epoch(unit="step", lr=1.0, epochs=3, steps_per_epoch=4, warmup=1.0, warmup_lr=0.2)
    assert rates[:4] == pytest.approx([0.4, 0.6, 0.8, 1.0], rel=ROUNDING)
    cosine = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates[4:] == pytest.approx(cosine, rel=ROUNDING)


def test_warm_up_by_epoch_is_counted_at_the_end_of_an_epoch():
    rates = by_epoch(lr=1.0, epochs=6, steps_per_epoch=2, warmup=2)
    assert rates[:6] == pytest.approx([0.5, 0.5, 1.0, 1.0, 1.0, 1.0], rel=ROUNDING)
    assert rates[6] == pytest.approx((1 + math.cos(math.pi / 4)) / 2, rel=ROUNDING)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"unit": "step", "epochs": 2, "steps_per_epoch": 4, "warmup": 0.625}, 1.25 / 1.375),
        ({"unit": "epoch", "epochs": 8, "steps_per_epoch": 1, "warmup": 2.5}, 5 / 5.5),
    ],
)
def test_two_and_a_half_units_of_warm_up(options, left):
    rates = by_epoch(kind="linear", lr=1.0, **options)
    assert rates[:4] == pytest.approx([0.4, 0.8, 1.0, left], rel=ROUNDING)


@pytest.mark.parametrize(
    ("options", "after"),
    [
        ({"kind": "constant"}, [1.0, 1.0, 1.0]),
        ({"kind": "multistep", "milestones": (4,)}, [1.0, 1.0, 0.1]),
        ({"kind": "multistep", "milestones": (1, 3)}, [0.1, 0.01, 0.01]),
        ({"kind": "exponential", "gamma": 0.5}, [0.25, 0.125, 0.0625]),
    ],
)
def test_milestones_and_exponential_count_from_the_start_of_training(options, after):
    rates = by_epoch(lr=1.0, epochs=5, warmup=2.0, **options)
    assert rates == pytest.approx([0.5, 1.0, *after], rel=ROUNDING)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_rate_after_the_end_is_lr_min(kind):
    schedule = LearningRateSchedule(kind=kind, lr=0.1, epochs=3, steps_per_epoch=7, lr_min=0.03)
    assert schedule.at(0) == 0.1
    assert schedule.at(21) == 0.03
    assert schedule.at(20) > 0.03


@given(schedules())
def test_rates_are_within_bounds(schedule):
    top = max(schedule.lr, schedule.warmup_lr)
    assert all(0 <= rate <= top * (1 + ROUNDING) for rate in rates_of(schedule))


@given(schedules())
def test_rates_never_rise_after_the_warm_up(schedule):
    _, late = parted(schedule)
    assert late[0] <= schedule.lr * (1 + ROUNDING)
    assert all(after <= before * (1 + ROUNDING) for before, after in itertools.pairwise(late))


@given(schedules())
def test_a_warm_up_moves_one_way_and_ends_at_lr(schedule):
    early, _ = parted(schedule)
    if schedule.warmup:
        rises = schedule.lr >= schedule.warmup_lr
        room = ROUNDING * max(schedule.lr, schedule.warmup_lr)
        pairs = list(itertools.pairwise([schedule.warmup_lr, *early]))
        assert all((b >= a - room) if rises else (b <= a + room) for a, b in pairs)
        assert early[-1] == schedule.lr


@given(schedules())
def test_unit_epoch_holds_the_rate_within_an_epoch(schedule):
    rates = rates_of(schedule)
    per = schedule.steps_per_epoch
    if schedule.unit == "epoch":
        assert all(rates[step] == rates[step // per * per] for step in range(len(rates)))


@given(schedules(), st.data())
def test_a_rate_depends_on_the_step_alone(schedule, data):
    rates = rates_of(schedule)
    resumed = pickle.loads(pickle.dumps(schedule))
    step = data.draw(st.integers(0, len(rates) - 1))
    assert resumed == schedule
    assert resumed.at(step) == schedule.at(step) == rates[step]


def test_a_schedule_is_a_value():
    schedule = LearningRateSchedule(lr=0.1, epochs=2, steps_per_epoch=3)
    assert {schedule: 1}[LearningRateSchedule(lr=0.1, epochs=2, steps_per_epoch=3)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.lr = 1.0


def test_lr_zero_stays_zero():
    assert set(by_epoch(lr=0.0, epochs=5)) == {0.0}


MULTISTEP = {"kind": "multistep"}


def test_bad_input_is_one_sentence():
    for options, words in [
        ({"kind": "cos"}, "unknown schedule 'cos'; did you mean 'cosine'? (schedules: cosine, multistep,"),
        ({"kind": ""}, "unknown schedule '' (schedules: cosine,"),
        ({"unit": "steps"}, "unknown unit 'steps'; did you mean 'step'? (units: epoch, step)."),
        ({"lr": -0.1}, "lr must be at least 0, got -0.1."),
        ({"lr": math.nan}, "lr must be at least 0, got nan."),
        ({"epochs": 0}, "epochs must be at least 1, got 0."),
        ({"epochs": 2.5}, "epochs must be a whole number, got 2.5."),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be at least 1, got 0."),
        ({"steps_per_epoch": 1.5}, "steps_per_epoch must be a whole number, got 1.5."),
        ({"lr_min": -0.1}, "lr_min must be at least 0, got -0.1."),
        ({"lr_min": 0.2}, "lr_min must be at most lr = 0.1, got 0.2."),
        ({"kind": "constant", "lr_min": 0.01}, "constant does not use lr_min, got 0.01; leave it out, or set kind to"),
        (
            {"gamma": 0.97},
            "cosine does not use gamma, got 0.97; leave it out, or set kind to multistep or exponential.",
        ),
        ({"kind": "exponential", "gamma": 0.0}, "gamma must be above 0 and at most 1, got 0.0."),
        ({"kind": "exponential", "gamma": 1.1}, "gamma must be above 0 and at most 1, got 1.1."),
        ({"as_coded": True}, "cosine does not use as_coded, got True; leave it out, or set kind to diminish1 or"),
        ({"milestones": (3,)}, "cosine does not use milestones, got (3,); leave it out, or set kind to multistep."),
        (MULTISTEP, "multistep needs milestones: whole epochs in increasing order from 1 to 9, got ()."),
        ({**MULTISTEP, "milestones": (0, 3)}, "whole epochs in increasing order from 1 to 9, got (0, 3)."),
        ({**MULTISTEP, "milestones": (3, 10)}, "whole epochs in increasing order from 1 to 9, got (3, 10)."),
        ({**MULTISTEP, "milestones": (5, 3)}, "whole epochs in increasing order from 1 to 9, got (5, 3)."),
        ({**MULTISTEP, "milestones": (3, 3)}, "whole epochs in increasing order from 1 to 9, got (3, 3)."),
        ({**MULTISTEP, "milestones": (2.5,)}, "whole epochs in increasing order from 1 to 9, got (2.5,)."),
        ({"warmup": -1}, "warmup must be at least 0, got -1."),
        ({"warmup": 10}, "warmup must be shorter than the training of 10 epochs, got 10."),
        ({"warmup": 2, "warmup_lr": -0.1}, "warmup_lr must be at least 0, got -0.1."),
        ({"warmup_lr": 0.01}, "warmup_lr = 0.01 has no effect without a warm-up; set warmup, in epochs."),
        (
            {"warmup": 1},
            "warmup = 1 has no effect, because it ends within the first epoch; use a longer one, or unit 'step'.",
        ),
        (
            {"warmup": 0.2, "unit": "step"},
            "warmup = 0.2 has no effect, because it ends within the first step; use a longer one, or 0.",
        ),
        (
            {"kind": "diminish1", "warmup": 2},
            "diminish1 starts at its largest value and cannot have a warm-up; set warmup to 0.",
        ),
        (
            {"kind": "diminish3", "unit": "step"},
            "diminish3 is defined by epoch; set unit to 'epoch', got 'step'.",
        ),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            LearningRateSchedule(**{"lr": 0.1, "epochs": 10, "steps_per_epoch": 5, **options})


@pytest.mark.parametrize("step", [-1, 51])
def test_a_step_outside_of_the_training(step):
    words = f"step must be from 0 to 50 (10 epochs of 5 updates), got {step}."
    with pytest.raises(ValueError, match=re.escape(words)):
        LearningRateSchedule(lr=0.1, epochs=10, steps_per_epoch=5).at(step)
