"""The reader of settings, and what it knows of each: type, default, range, words, help."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from flatmin.measure.report import ReportSettings
from flatmin.study.executors.settings import SETTINGS
from flatmin.study.measuring import View
from flatmin.study.record import Record
from flatmin.study.spec import StudySpec
from flatmin.train import settings
from flatmin.train.config import RunConfig, differences, identity
from flatmin.train.keys import Key, OneOf, Range, check, keys_of, keywords_of
from flatmin.train.options import Options


@dataclass(frozen=True, kw_only=True)
class Toy:
    epochs: int = 3
    lr: float = 0.1
    on: bool = True
    name: str = "x"
    noise: float | None = None
    methods: tuple[str, ...] = ("a",)
    rho: dict[str, float] = field(default_factory=dict)
    size: Literal["auto"] | int = "auto"


KINDS = settings.field_types(Toy)


def test_words_become_typed_values():
    for key, text, value in [
        ("epochs", "12", 12),
        ("lr", "1e-2", 0.01),
        ("lr", "3", 3.0),
        ("on", "false", False),
        ("on", "Yes", True),
        ("name", "0.5", "0.5"),
        ("noise", "none", None),
        ("noise", ".4", 0.4),
        ("methods", "sam, vasso+asam", ("sam", "vasso+asam")),
        ("methods", "", ()),
        ("size", "auto", "auto"),
        ("size", "7", 7),
    ]:
        found = settings.parse(key, text, KINDS[key])
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("epochs", "1.5", "epochs=1.5 is not a whole number"),
        ("lr", "fast", "lr=fast is not a number"),
        ("on", "maybe", "on=maybe is not true or false"),
        ("noise", "much", "noise=much is not a number"),
        ("size", "large", "size=large is not auto or whole number"),
        ("rho", "1", "rho is a table; set one of its entries with rho.NAME=value"),
    ],
)
def test_words_of_another_type(key, text, words):
    with pytest.raises(ValueError, match=words):
        settings.parse(key, text, KINDS[key])


def test_a_table_fills_the_dataclass():
    toy = settings.fill(Toy, {"lr": 1, "methods": ["b", "c"], "rho": {"sam": 1}, "noise": 0.2, "size": 3})
    assert toy == Toy(lr=1.0, methods=("b", "c"), rho={"sam": 1.0}, noise=0.2, size=3)
    assert settings.fill(Toy, {"size": "auto"}) == Toy()
    assert isinstance(toy.lr, float)


def test_a_table_that_does_not_fit():
    for table, words in [
        ({"epoch": 3}, "preset p: unknown option 'epoch'; did you mean 'epochs'\\?"),
        ({"epochs": 1.5}, "epochs = 1.5 is a float, expected a whole number"),
        ({"epochs": True}, "epochs = True is a bool, expected a whole number"),
        ({"lr": "fast"}, "lr = 'fast' is a str, expected a number"),
        ({"methods": "sam"}, "methods = 'sam' is a str, expected a list of text"),
        ({"methods": [1]}, "methods = 1 is an int, expected text"),
        ({"size": "large"}, "size = 'large' is a str, expected auto or whole number"),
        ({"rho": {"sam": "x"}}, "rho.sam = 'x' is a str, expected a number"),
    ]:
        with pytest.raises(ValueError, match=words):
            settings.fill(Toy, table, origin="preset p")


def test_presets():
    assert {"digits", "smoke"} <= set(settings.preset_names("study")) & set(settings.preset_names("train"))
    assert settings.read_preset("digits")["epochs"] == 30
    with pytest.raises(ValueError, match="unknown preset 'digit'; did you mean 'digits'"):
        settings.read_preset("digit")
    with pytest.raises(ValueError, match=r"preset file 'no.toml' does not exist"):
        settings.read_preset("no.toml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_preset_file_from_any_editor(tmp_path, encoding):
    for end in ("\n", "\r\n", "\r"):
        text = end.join(['title = "Größe"', "epochs = 3", ""])
        mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
        (tmp_path / "mine.TOML").write_bytes(mark + text.encode(encoding))
        assert settings.read_preset(str(tmp_path / "mine.TOML")) == {"title": "Größe", "epochs": 3}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('a = 1\ntitle = "Größe"\n'.encode("latin-1"), "line 2 has the byte 0xf6, as in Latin-1 or Windows-1252; save"),
        ("a = 1\n".encode("utf-16-le"), "looks like UTF-16 without a byte order mark; save it as UTF-8"),
        ('a = "ß"\n'.encode("utf-16-le"), "as in UTF-16 without a byte order mark; save it as UTF-8"),
        (b"\xff\xfea", "begins like UTF-16 text but is damaged; save it as UTF-8"),
    ],
)
def test_a_preset_file_in_another_encoding_is_refused_in_a_sentence(tmp_path, content, words):
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'mine.toml'))} .*{words}[^\n]*$"):
        settings.read_preset(str(tmp_path / "mine.toml"), "study")


def test_a_preset_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("epochs = 2\n")
    assert settings.read_preset(str(file)) == {"epochs": 2}
    file.write_text("epochs = = 2\n")
    with pytest.raises(ValueError, match="is not valid TOML"):
        settings.read_preset(str(file))


@pytest.mark.parametrize("word", ["epochs", "=3", ""])
def test_words_that_are_no_overrides(word):
    with pytest.raises(ValueError, match="write KEY=VALUE"):
        settings.split_override(word)


def test_words_by_key():
    words = ["epochs=3", "theta=0.8", "rho.sam=1", " epochs = 4 ", "size=2"]
    assert settings.read_words(words, KINDS) == ({"epochs": 4, "rho": {"sam": 1.0}, "size": 2}, {"theta": "0.8"})
    assert settings.read_table(Toy, ["lr=1"]) == {"lr": 1.0}
    with pytest.raises(ValueError, match=r"^x has no 'epoch'; did you mean 'epochs'\? \(settings: epochs, lr, "):
        settings.read_table(Toy, ["epoch=1"], unknown="x has no")


@pytest.mark.parametrize("value", [True, None, 3, 5e-4, 2.5, "fp16", ("sam", "vasso+asam")])
def test_what_is_written_is_read_again(value):
    kind = {tuple: tuple[str, ...], type(None): int | None}.get(type(value), type(value))
    assert settings.parse("key", settings.written(value), kind) == value


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base.

    Args:
        Sizes

        low, high: how
            many.
    """

    low: int = 1
    high: Annotated[int | None, Range(0, 5, open_low=True)] = None

    def __post_init__(self):
        check(self)


@dataclass(frozen=True, kw_only=True)
class Derived(Base):
    """A class with a key of its own, and another default of an inherited one.

    Args:
        Words

        word: which: of two.

    Raises:
        ValueError: never: mind.
    """

    low: int = 2
    word: Annotated[str, OneOf(("fast", "slow"))] = "fast"


def test_a_key_is_what_the_field_and_the_docstring_say():
    assert keys_of(Derived) == [
        Key(name="low", kind="whole number", default="2", help="how many.", group="Sizes"),
        Key(name="high", kind="whole number or none", default="none", help="how many.", group="Sizes"),
        Key(name="word", kind="text", default="fast", help="which: of two.", group="Words", choices=("fast", "slow")),
    ]
    assert Derived(high=5) and Derived(high=None)
    for bad in ({"high": 0}, {"high": 6}, {"word": "fsat"}):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))}"):
            Derived(**bad)


def test_keywords_of_a_function():
    def net(classes, width=64, *, pool=False, blocks=(1, 2)):
        """A network.

        Args:
            width: of what.
        """

    assert keywords_of(net) == [
        Key(name="width", kind="whole number", default="64", help="of what."),
        Key(name="pool", kind="true or false", default="false", help=""),
    ]


@pytest.mark.parametrize("cls", [RunConfig, Options, Record, ReportSettings, View, StudySpec, *SETTINGS.values()])
def test_every_setting_has_a_sentence(cls):
    for key in keys_of(cls):
        assert key.help.endswith(".") and key.help.count("`") % 2 == 0, key


def test_guessing_a_parts_parameter():
    assert [settings.guess(w) for w in ("true", "3", ".5", "tensor")] == [True, 3, 0.5, "tensor"]


def test_runs_that_were_recorded_before_a_field_existed_keep_their_identity():
    plain, flat = RunConfig(method="sam"), RunConfig(method="sam", flat=True)
    assert "flat" not in identity(plain)
    assert identity(flat) == {**identity(plain), "flat": True}
    assert differences(identity(plain), plain) == differences(identity(flat), flat) == {}
    assert differences(identity(flat), plain) == {"flat": "flat is True there and False here"}
    assert differences(identity(plain), flat) == {"flat": "flat is False there and True here"}


def test_content_hash_ignores_the_order_of_keys_and_nothing_else():
    assert settings.content_hash({"a": 1, "b": (1, 2)}) == settings.content_hash({"b": [1, 2], "a": 1})
    assert settings.content_hash({"a": 1}) != settings.content_hash({"a": 1.5})
    assert settings.content_hash(Toy()) != settings.content_hash(Toy(lr=0.2))
    with pytest.raises(ValueError, match="not JSON compliant"):
        settings.content_hash(float("nan"))
