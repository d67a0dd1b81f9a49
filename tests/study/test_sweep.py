"""Words that name axes, and the points that they span."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatmin.study.sweep import Axis, overrides, points, read_axis, tidy


@pytest.mark.parametrize(
    ("word", "key", "values"),
    [
        ("rho=.1,0.2", "rho", ("0.1", "0.2")),
        ("seed=0..4", "seed", ("0", "1", "2", "3", "4")),
        ("seed=0..2,7", "seed", ("0", "1", "2", "7")),
        ("k=-1..1", "k", ("-1", "0", "1")),
        ("seed=3..3", "seed", ("3",)),
        (" model = resnet18 , wrn28-10 ", "model", ("resnet18", "wrn28-10")),
        ("lr=1e-3,", "lr", ("0.001",)),
        ("epochs=1e2", "epochs", ("100",)),
        ("data=a.b:load", "data", ("a.b:load",)),
        ("as_coded=true", "as_coded", ("true",)),
    ],
)
def test_grammar(word, key, values):
    axis = read_axis(word)
    assert (axis.key, axis.values) == (key, values)


def test_a_key_whose_value_is_a_list_has_slashes_between_points():
    assert read_axis("milestones=60,120").values == ("60,120",)
    assert read_axis("milestones=60,120 / 80").values == ("60,120", "80")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rho", "'rho' is not a setting; write KEY=VALUE"),
        ("=1", "'=1' is not a setting"),
        ("rho=", "rho= has no value"),
        ("rho=,", "rho= has no value"),
        ("rho=.1,0.10", "rho has the value 0.1 twice"),
        ("seed=0..2,1", "seed has the value 1 twice"),
        ("seed=4..0", "seed=4..0 is not a valid range; write the smaller end first"),
        ("seed=0..10000", "at most 10000 numbers"),
    ],
)
def test_bad_words_are_one_sentence(word, message):
    with pytest.raises(ValueError, match=message) as error:
        read_axis(word)
    assert "\n" not in str(error.value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_keep_their_value_and_have_one_way_of_writing(number):
    assert float(tidy(repr(number))) == number
    assert tidy(tidy(repr(number))) == tidy(repr(number))


@given(st.integers())
def test_whole_numbers_keep_all_digits(number):
    assert tidy(str(number)) == str(number)


@pytest.mark.parametrize("word", ["nan", "inf", "none", "resnet18", "a:b", "60,120", "1..3"])
def test_other_words_stay(word):
    assert tidy(word) == word


def test_points_are_all_combinations_the_last_axis_fastest():
    found = points([Axis("a", ("x", "y")), Axis("b", ("1", "2", "3"))])
    assert [tuple(point.values()) for point in found] == [(a, b) for a in "xy" for b in "123"]
    assert points([]) == [{}]
    assert overrides({"a": "x", "b": "1"}) == ["a=x", "b=1"]


def test_a_key_is_an_axis_once():
    with pytest.raises(ValueError, match="rho is an axis twice"):
        points([Axis("rho", ("1",)), Axis("rho", ("2",))])
