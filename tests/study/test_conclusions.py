"""What a study's sentences claim, on made-up results that go through the real tabulation."""

import dataclasses

import pytest

from flatmin.study.conclusions import protocol, verdicts
from flatmin.study.executors import RunOutcome
from flatmin.study.tables import body
from flatmin.study.timing import Ratio
from tests.study.made import made_result, made_table

SGD, SAM, ASAM = (77.0, 78.0, 76.0), (95.0, 94.0, 95.5), (95.5, 93.0, 96.0)
OTHERS = {"m": "vasso", "usam": "usam", "bad": "fsam"}


def table(folder, accuracies, *, baselines=None, curvature=None, train_ce=None, words=(), seeds=3, **changes):
    """Accuracies, one a seed, by label: an arm of that method, or a baseline with the settings that are given."""
    lines = ['title = "Made"', 'train = "smoke"', f"seeds = {list(range(seeds))}", 'baseline = "sgd"']
    lines += ['columns = ["test_acc", "train_ce", "lambda_max"]']
    for label in accuracies:
        settings = (baselines or {}).get(label)
        kind = "arms" if settings is None else "baselines"
        method = "sgd" if settings is not None else OTHERS.get(label.rstrip("0123456789"), label)
        theta = f'"direction.theta" = 0.{int(label[1:]) + 1}' if label[1:].isdigit() else ""
        lines += [f"[[{kind}]]", f'label = "{label}"', f'method = "{method}"', settings or "", theta]

    def result_of(point, seed):
        value, found = accuracies[point.arm][seed], dict(changes)
        if curvature is not None:
            eigenvalue = {"value": curvature[point.arm], "residual": 1e-3, "converged": True}
            found |= {"lambda_max": eigenvalue, "train_ce": train_ce[point.arm]}
        return RunOutcome(result=made_result(point.configs[seed], value, **found))

    return made_table("\n".join(lines), folder, result_of, words)


def told(*arguments, **options):
    shown = table(*arguments, **options)
    return "\n".join([*verdicts(shown), *protocol(shown)])


def test_against_the_baseline_by_each_interval_and_among_all_tests(tmp_path):
    others = {"sam": SAM, "usam": (70.0, 80.0, 90.0), "bad": (50.0, 51.5, 49.0), "asam": (80.0, 82.0, 78.6)}
    shown = table(tmp_path, {"sgd": SGD, **others})
    (text, *_) = verdicts(shown)
    assert "above sgd (p < 0.05 after correction for 4 tests): sam" in text and "below sgd (p < 0.05" in text
    assert "not significantly different from sgd (the interval of the difference contains 0): usam" in text
    values = {row.arm: row.columns["test_acc"] for row in shown.rows}
    assert values["asam"].p < 0.05 and values["asam"].corrected == pytest.approx(2 * values["asam"].p)
    weak = {"sgd": SGD, "sam": (79.0, 81.0, 77.6), "usam": SGD, "m1": SGD, "asam": SGD}
    assert "above sgd by the 95 % interval of the difference, but not after correction for 4 tests: sam" in told(
        tmp_path, weak
    )


def test_few_seeds_show_nothing(tmp_path):
    two = told(tmp_path, {"sgd": (77.0, 78.0), "sam": (90.0, 91.0), "asam": (95.0, 96.0)}, seeds=2)
    assert "Two seeds are too few for a comparison" in two and "significantly" not in two
    one = told(tmp_path, {"sgd": (77.0,), "sam": (95.0,)}, seeds=1)
    assert "With one seed there are no intervals" in one and "paired by seed, is" not in one


def test_methods_are_ranked_only_beyond_the_noise_of_all_pairs(tmp_path):
    close = told(tmp_path, {"sgd": SGD, "sam": SAM, "asam": ASAM})
    assert "The difference between sam and asam is not significant: +0.0 ± 2.2 points." in close
    far = told(tmp_path, {"sgd": SGD, "sam": SAM, "asam": (85.0, 84.1, 85.4)})
    assert "1 of 1 pair differs significantly" in far and "sam over asam by +10.0 ±" in far
    # A difference that a single 95 % interval would show is not claimed among ten pairs.
    two = {"sgd": SGD, "sam": (90.0, 90.0, 90.0), "asam": (91.0, 91.3, 91.6)}
    assert "asam over sam" in told(tmp_path, two)
    more = {f"m{i}": (90.0 + i, 91.0 - i, 89.0 + i) for i in (1, 2, 3)}
    assert "The 5 methods that perturb the weights do not differ significantly from each other" in told(
        tmp_path, {**two, **more}
    )
    # Equal differences: their spread counts as one of the 797 samples, 17.3 * 0.1255 / sqrt(3).
    levels = {f"m{i}": tuple(50.0 + 5 * i + x for x in (0.0, 0.01, 0.02)) for i in range(6)}
    many = told(tmp_path, {"sgd": (50.0, 51.0, 52.0), **levels})
    assert "15 of 15 pairs differ" in many and "m5 over m0 by +25.0 ± 1.3" in many and "and 7 more" in many


def test_cheap_baselines_and_equal_cost(tmp_path):
    decay = {"decay": "weight_decay = 0.02"}
    good = told(tmp_path, {"sgd": SGD, "sam": SAM, "asam": ASAM, "decay": (95.0, 94.0, 95.0)}, baselines=decay)
    assert "decay, which needs no second gradient, differs from sgd by +17.7 ± 3.8 points" in good
    assert "which is not significant." in good
    early = {"early stop": 'epochs = "0.5x"'}
    poor = told(tmp_path, {"sgd": SGD, "sam": SAM, "early stop": (80.0, 80.0, 80.0)}, baselines=early)
    assert "sam differs from 'early stop' by" in poor and "which is significant." in poor
    long = {"2x epochs": 'epochs = "2x"'}
    equal = told(tmp_path, {"sgd": SGD, "sam": SAM, "usam": (67.0, 99.0, 70.0), "2x epochs": SGD}, baselines=long)
    assert "Compared with plain training at equal cost ('2x epochs'), test accuracy is higher (p < 0.05 after" in equal
    assert "after correction for 2 tests): sam; not significantly different: usam." in equal
    two = {"sgd": (77.0, 78.0), "sam": (95.0, 94.0), "early stop": (80.0, 80.0)}
    assert "differs from 'early stop'" not in told(tmp_path, two, baselines=early, seeds=2), (
        "two seeds show nothing here either"
    )


def test_rows_of_two_tasks_are_not_compared_with_each_other(tmp_path):
    """An arm that sets its own network shares the empty point of the axes."""
    text = 'title = "Two"\ntrain = "smoke"\nseeds = [0, 1, 2]\n'
    text += '[[arms]]\nlabel = "small"\nmethod = "sam"\n[[arms]]\nlabel = "other"\nmethod = "sam"\nmodel = "conv"\n'
    shown = made_table(text, tmp_path, lambda point, seed: 90.0 + seed + 5 * (point.arm == "other"))
    assert not any("differ" in text for text in verdicts(shown))


def test_a_small_eigenvalue_at_a_small_loss_is_pointed_out_only_if_it_is_there(tmp_path):
    values = {"sgd": SGD, "sam": SAM, "asam": SAM, "2x epochs": (67.0, 68.0, 66.0)}
    loss = {"sgd": 0.8, "sam": 1.4, "asam": 1.4, "2x epochs": 0.05}

    def of(value):
        curvature = {"sgd": 6.0, "sam": 2.1, "asam": 1.5, "2x epochs": value}
        return told(tmp_path, values, baselines={"2x epochs": 'epochs = "2x"'}, curvature=curvature, train_ce=loss)

    assert "'2x epochs' has 1, sam has 2.1, and '2x epochs' has the lower test accuracy" in of(1.0)
    assert "'2x epochs' has 4, sgd has 6, and '2x epochs' has the lower test accuracy" in of(4.0)
    assert "does not mean a better minimum" not in of(8.0) and "Compare lambda_max at equal training loss" in of(8.0)


def test_the_protocol(tmp_path):
    text = told(tmp_path, {"sgd": SGD, "sam": SAM}, words=["noise=0.4"])
    assert "900 training, 100 validation and 797 test samples" in text and "over 3 seeds" in text
    assert "Wrong training labels are drawn for each seed" in text and "about training with wrong labels" in text
    assert "rho was given, not chosen by this study" in text
    clean = told(tmp_path, {"sgd": SGD, "sam": SAM}, words=["rho=.05"])
    assert "wrong labels" not in clean and "rho is each method's default" in clean
    assert "would select on test data" in told(tmp_path, {"sgd": SGD, "sam": SAM}, words=["rho=.1,.2"])
    flagged = told(tmp_path, {"sgd": SGD, "sam": SAM}, trained=False)
    assert "not clearly below chance level" in flagged
    shown = table(tmp_path, {"sgd": SGD, "sam": SAM})
    timed = [dataclasses.replace(row, time=Ratio(median=1.0, q25=0.98, q75=1.03)) for row in shown.rows]
    assert "a copy of itself gives 0.98 to 1.03" in "\n".join(protocol(dataclasses.replace(shown, rows=timed)))


@pytest.mark.parametrize(("best", "edge"), [("0.1", ""), ("0.2", "upper end"), ("0.05", "lower end")])
def test_choices_and_the_ends_of_their_lists(tmp_path, best, edge):
    text = 'title = "Made"\ntrain = "smoke"\nseeds = [0, 1]\nchoose = ["rho"]\n[axes]\nrho = [0.05, 0.1, 0.2]\n'
    text += '[[arms]]\nlabel = "sam"\nmethod = "sam"\n'
    shown = made_table(text, tmp_path, lambda point, seed: 91.0 if point.values["rho"] == best else 90.0)
    (sentence,) = [one for one in protocol(shown) if "is chosen by mean validation" in one]
    assert f"sam rho={best} is chosen" in sentence and "rho=0.05 9" in sentence
    assert ("beyond it" in sentence) == bool(edge) and (not edge or f"the {edge} of its list ({best}):" in sentence)


@pytest.mark.parametrize(
    ("decayed", "expected"), [(SGD, True), ((77.1, 77.9, 76.1), True), ((78.0, 77.0, 76.0), False)], ids=str
)
def test_a_weight_decay_without_effect_is_pointed_out(tmp_path, decayed, expected):
    loss = {"sgd": 0.5, "decay": 0.5 if expected else 0.6}
    shown = table(
        tmp_path,
        {"sgd": SGD, "decay": decayed},
        baselines={"decay": "weight_decay = 0.02"},
        curvature=dict.fromkeys(loss, 1.0),
        train_ce=loss,
    )
    sentence = "weight_decay=0.02 of decay has no visible effect"
    assert any(text.startswith(sentence) for text in verdicts(shown)) == expected
    assert [row[0] for row in body(shown)] == ["sgd", "decay (weight_decay=0.02)"]
