"""Files are whole or absent."""

import json

import pytest

from flatmin.train.files import reason, write_atomically, write_json


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_half_a_file_is_never_left(tmp_path, error):
    def half(file):
        file.write(b"half")
        raise error

    path = tmp_path / "x.bin"
    with pytest.raises(type(error)):
        write_atomically(path, half)
    assert not list(tmp_path.iterdir())
    write_atomically(path, lambda file: file.write(b"whole"))
    with pytest.raises(type(error)):
        write_atomically(path, half)
    assert path.read_bytes() == b"whole" and [p.name for p in tmp_path.iterdir()] == ["x.bin"]


@pytest.mark.parametrize(
    ("text", "words"), [("", "truncated or damaged"), ('{"a": 1', "truncated or damaged"), ("{}", "no entry 'a'")]
)
def test_why_a_file_cannot_be_read(text, words):
    with pytest.raises((ValueError, KeyError)) as error:
        json.loads(text)["a"]
    assert reason(error.value) == words


def test_an_error_without_words_is_named():
    assert reason(ValueError()) == "ValueError" and reason(ValueError("no.")) == "no"
