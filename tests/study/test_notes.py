from dataclasses import replace
from types import SimpleNamespace

import pytest

from flatmin.stats import paired, summarise
from flatmin.study.config import CompareConfig
from flatmin.study.notes import write_notes
from flatmin.study.summary import Choice, Ratio, Row

CONFIG = CompareConfig(methods=("sgd", "sam", "asam"), seeds=3, rho={"sam": 0.2})
SIZES = (900, 100, 797)


def notes(accuracies, *, config=CONFIG, choices=None, train_ce=None, curvature=None, flags=(), time=None):
    """Notes for made-up accuracies: label -> one value per seed."""
    rows, findings = [], []
    base = dict(enumerate(accuracies.get("sgd", ())))
    for label, values in accuracies.items():
        by_seed = dict(enumerate(values))
        rows.append(
            Row(
                label=label,
                method=label,
                rho=None,
                gradient_evaluations=1.0 if label.startswith("sgd") else 2.0,
                n=len(values),
                last=summarise(values),
                best=summarise(values),
                diff=None if label == "sgd" else paired(by_seed, base),
                memorised=summarise(values),
                train_ce=summarise((train_ce or {}).get(label, [])),
                lambda_max=summarise((curvature or {}).get(label, [])),
                flags=list(flags),
                time_ratio=time,
            )
        )
        findings.append(SimpleNamespace(label=label, last=lambda by_seed=by_seed: by_seed))
    ascends = {label: not label.startswith("sgd") for label in accuracies}
    return "\n".join(write_notes(config, SIZES, rows, findings, choices or {}, ascends))


FAMILY = {"sgd": (77.0, 78.0, 76.0), "sam": (95.0, 94.0, 95.5), "asam": (95.5, 93.0, 96.0)}


def test_the_protocol_is_told():
    text = notes(FAMILY)
    assert "900 training, 100 validation and 797 test samples" in text
    assert "40% of the training labels are wrong" in text
    assert "validation and test labels are clean" in text
    assert "over 3 seeds" in text


def test_methods_within_the_noise_are_not_ranked():
    text = notes(FAMILY)
    assert "Sam and asam are not ranked: they differ at the last epoch by +0.0 ± 2.2 points, within the noise." in text
    text = notes({**FAMILY, "vasso": (95.0, 95.5, 95.0)})
    assert "The 3 methods that ascend are not ranked: none of the 3 pairs differs" in text


def test_methods_beyond_the_noise_are():
    text = notes({**FAMILY, "asam": (85.0, 84.1, 85.4)})
    assert "1 of the 1 pair differ" in text
    assert "sam over asam (10.0 ±" in text


def test_two_seeds_rank_nothing_even_if_their_differences_are_equal():
    text = notes({"sgd": (77.0, 78.0), "sam": (90.0, 91.0), "asam": (95.0, 96.0)})
    assert "Two seeds are too few to tell any row from another" in text
    assert "beyond the noise" not in text and "interval without 0" not in text


def test_of_many_pairs_the_largest_are_named():
    """All differences are equal, so their spread counts as one of the 797 samples: 17.3 * 0.1255 / sqrt(3)."""
    levels = {f"m{i}": tuple(50.0 + 5 * i + x for x in (0.0, 0.01, 0.02)) for i in range(6)}
    text = notes({"sgd": (50.0, 51.0, 52.0), **levels})
    assert "15 of the 15 pairs differ" in text and "m5 over m0 (25.0 ± 1.3)" in text
    assert "and 7 more with a smaller difference" in text and "m1 over m0" not in text


def test_many_pairs_widen_the_intervals():
    """A difference that a single 95 % interval would show is not claimed among ten pairs."""
    values = {"sgd": (77.0, 78.0, 76.0), "a": (90.0, 90.0, 90.0), "b": (91.0, 91.3, 91.6)}
    assert "b over a" in notes(values)
    more = {name: (90.0 + i, 91.0 - i, 89.0 + i) for i, name in enumerate("cde")}
    assert "are not ranked" in notes({**values, **more})


def test_the_difference_to_the_base():
    text = notes({**FAMILY, "usam": (70.0, 80.0, 90.0), "bad": (50.0, 51.5, 49.0)})
    assert "Above sgd at the last epoch, interval without 0: sam, asam" in text
    assert "below sgd, interval without 0: bad" in text
    assert "interval covers 0, so no difference is shown: usam" in text


def test_baselines_that_do_as_well_and_baselines_that_do_not():
    good = notes({**FAMILY, "sgd + weight decay": (95.0, 94.0, 95.0)})
    assert "'sgd + weight decay' gains +17.7 ± 3.8 points over sgd with no second gradient" in good
    assert "no advantage of an ascent over it is shown" in good
    poor = notes({**FAMILY, "sgd, early stop": (80.0, 80.0, 80.0)})
    assert "the family is ahead" in poor


def test_twice_the_epochs():
    assert "change its accuracy by -10.0" in notes({**FAMILY, "sgd, 2x epochs": (67.0, 68.0, 66.0)})


def test_a_small_lambda_at_a_small_loss_is_pointed_out_only_if_it_is_there():
    values = {**FAMILY, "sgd, 2x epochs": (67.0, 68.0, 66.0)}
    loss = {"sgd": [0.8], "sam": [1.4], "asam": [1.4], "sgd, 2x epochs": [0.05]}

    def told(value):
        curvature = {"sgd": [6.0], "sam": [2.1], "asam": [1.5], "sgd, 2x epochs": [value]}
        return notes(values, train_ce=loss, curvature=curvature)

    assert "'sgd, 2x epochs' has 1 against 2.1 of sam, and a lower test accuracy" in told(1.0)
    assert "'sgd, 2x epochs' has 4 against 6 of sgd, and a lower test accuracy" in told(4.0)
    assert "does not mean a better minimum" not in told(8.0)
    assert "Compare λ_max at equal train loss" in told(8.0)
    assert "λ_max" not in notes(FAMILY)


def test_one_seed():
    text = notes({"sgd": (77.0,), "sam": (95.0,)}, config=replace(CONFIG, seeds=1))
    assert "One seed gives no interval" in text
    assert "Above sgd" not in text
    assert "ranked" not in text


def test_without_noise():
    text = notes(FAMILY, config=replace(CONFIG, noise=0.0))
    assert "nothing to memorise" in text
    assert "% of the training labels" not in text


@pytest.mark.parametrize(("best", "edge"), [(0.1, False), (0.2, True)])
def test_choices_and_the_ends_of_their_lists(best, edge):
    tried = [
        Choice(values={"rho": rho}, val_acc=summarise([90.0, 91.0]), chosen=rho == best) for rho in (0.05, 0.1, 0.2)
    ]
    text = notes(FAMILY, config=replace(CONFIG, tune=True), choices={"sam": tried})
    assert f"sam: rho={best}" in text
    assert ("the end of its list" in text) == edge
    assert "One validation sample is 1 % of" in text


def test_where_the_radius_comes_from():
    assert "rho was fixed before this comparison" in notes(FAMILY)
    assert "rho is each geometry's default" in notes(FAMILY, config=replace(CONFIG, rho={}))
    assert "would be choosing on test" in notes(FAMILY, config=replace(CONFIG, axes={"rho": (0.1, 0.2)}))


def test_flags_are_explained():
    assert "not clearly below chance level" in notes(FAMILY, flags=["did not train: 1 of 3"])
    assert "a run without a result" in notes(FAMILY, flags=["failed: 1 of 3"])


def test_time_is_explained_if_it_was_measured():
    assert "Time per step" not in notes(FAMILY)
    assert "A copy of sgd against itself gives 0.98-1.03" in notes(FAMILY, time=Ratio(median=1.0, q25=0.98, q75=1.03))


def test_a_comparison_without_a_base():
    assert "over sgd" not in notes({"sam": (95.0, 94.0), "asam": (93.0, 96.0)})
