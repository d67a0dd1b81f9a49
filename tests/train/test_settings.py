import re
from dataclasses import dataclass, field

import pytest

from flatmin.train import settings


@dataclass(frozen=True, kw_only=True)
class Toy:
    epochs: int = 3
    lr: float = 0.1
    on: bool = True
    name: str = "x"
    noise: float | None = None
    methods: tuple[str, ...] = ("a",)
    rho: dict[str, float] = field(default_factory=dict)


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
    ]:
        found = settings.parse(key, text, KINDS[key])
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("epochs", "1.5", "epochs=1.5 is not a whole number"),
        ("lr", "fast", "lr=fast is not a number"),
        ("on", "maybe", "on=maybe is not a true or false"),
        ("noise", "much", "noise=much is not a number"),
        ("rho", "1", "rho is a table: set one entry of it with rho.NAME=value"),
    ],
)
def test_words_of_another_type(key, text, words):
    with pytest.raises(ValueError, match=words):
        settings.parse(key, text, KINDS[key])


def test_a_table_fills_the_dataclass():
    toy = settings.fill(Toy, {"lr": 1, "methods": ["b", "c"], "rho": {"sam": 1}, "noise": 0.2})
    assert toy == Toy(lr=1.0, methods=("b", "c"), rho={"sam": 1.0}, noise=0.2)
    assert isinstance(toy.lr, float)


def test_a_table_that_does_not_fit():
    for table, words in [
        ({"epoch": 3}, "preset p: unknown option 'epoch'; did you mean 'epochs'\\?"),
        ({"epochs": 1.5}, "epochs = 1.5 is a float, expected a whole number"),
        ({"epochs": True}, "epochs = True is a bool, expected a whole number"),
        ({"lr": "fast"}, "lr = 'fast' is a str, expected a number"),
        ({"methods": "sam"}, "methods = 'sam' is a str, expected a list of text"),
        ({"methods": [1]}, "methods = 1 is a int, expected a text"),
        ({"rho": {"sam": "x"}}, "rho.sam = 'x' is a str, expected a number"),
    ]:
        with pytest.raises(ValueError, match=words):
            settings.fill(Toy, table, origin="preset p")


def test_presets():
    assert {"digits", "smoke"} <= set(settings.preset_names())
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
        (b"\xff\xfea", "begins like UTF-16 but is damaged; save it as UTF-8"),
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
    with pytest.raises(ValueError, match="write key=value"):
        settings.split_override(word)


def test_guessing_a_parts_parameter():
    assert [settings.guess(w) for w in ("true", "3", ".5", "tensor")] == [True, 3, 0.5, "tensor"]


def test_content_hash_ignores_the_order_of_keys_and_nothing_else():
    assert settings.content_hash({"a": 1, "b": (1, 2)}) == settings.content_hash({"b": [1, 2], "a": 1})
    assert settings.content_hash({"a": 1}) != settings.content_hash({"a": 1.5})
    assert settings.content_hash(Toy()) != settings.content_hash(Toy(lr=0.2))
    with pytest.raises(ValueError, match="not JSON compliant"):
        settings.content_hash(float("nan"))
