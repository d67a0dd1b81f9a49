import gzip
import struct

import numpy as np
import pytest
import torch

from flatmin.data.idx import load_idx, read_idx, read_idx_parts


def idx(array, kind=8):
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


def write(folder, *, end="", dot="-", train=20, test=5):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    content = {}
    for prefix, n in (("train", train), ("t10k", test)):
        x = rng.integers(0, 256, (n, 4, 6), dtype=np.uint8)
        y = rng.integers(0, 10, n, dtype=np.uint8)
        for what, array in (("images", x), ("labels", y)):
            data = idx(array)
            path = folder / f"{prefix}-{what}{dot}idx{array.ndim}-ubyte{end}"
            path.write_bytes(gzip.compress(data) if end else data)
        content[prefix] = (x, y)
    return content


@pytest.mark.parametrize(
    ("end", "dot", "below"), [("", "-", "."), (".gz", "-", "raw"), ("", ".", "raw"), (".gz", ".", ".")]
)
def test_the_four_files(end, dot, below, tmp_path):
    content = write(tmp_path / below, end=end, dot=dot)
    for part, prefix in zip(read_idx_parts(tmp_path), ("train", "t10k"), strict=True):
        x, y = content[prefix]
        np.testing.assert_array_equal(part.x.numpy(), x[:, None])
        np.testing.assert_array_equal(part.y.numpy(), y)
        assert part.x.dtype == torch.uint8
        assert part.y.dtype == torch.int64


def test_three_parts(tmp_path):
    write(tmp_path)
    data = load_idx(tmp_path, name="fashion-mnist", validation=0.25)
    assert (len(data.train), len(data.val), len(data.test)) == (15, 5, 5)
    assert data.train.x.shape[1:] == (1, 4, 6)
    assert (data.num_classes, data.name) == (10, "fashion-mnist")


def test_pixels_can_be_changed(tmp_path):
    write(tmp_path)
    read_idx(tmp_path / "t10k-labels-idx1-ubyte").zero_()


def test_no_numbers(tmp_path):
    path = tmp_path / "none"
    path.write_bytes(idx(np.zeros((0, 4, 4), dtype=np.uint8)))
    assert read_idx(path).shape == (0, 4, 4)


def test_not_such_a_file(tmp_path):
    for data, words in [
        (b"", "not an idx file: it starts with the bytes , expected 00 00 08"),
        (b"\x89PNG\r\n", "not an idx file: it starts with the bytes 89 50 4e 47"),
        (b"\0\0\x08\0", "not an idx file"),
        (idx(np.zeros(3, dtype=np.float32), kind=13), r"values of type 0x0d, expected 0x08 \(unsigned bytes\)"),
        (idx(np.zeros((3, 2), dtype=np.uint8))[:-1], r"has 17 bytes, expected 18 for shape \(3, 2\); it is incomplete"),
        (idx(np.zeros((3, 2), dtype=np.uint8)) + b"x", "has 19 bytes, expected 18"),
        (b"\0\0\x08\x03\0\0", "has 6 bytes, expected"),
        (b"\0\0\x08\x02" + b"\xff" * 8, "has 12 bytes, expected"),
    ]:
        path = tmp_path / "images"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=words):
            read_idx(path)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"<html>", lambda data: data[:30] + data[40:]])
def test_a_packed_file_that_is_damaged(damage, tmp_path):
    path = tmp_path / "images.gz"
    noise = np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8)
    path.write_bytes(damage(gzip.compress(idx(noise))))
    with pytest.raises(ValueError, match=r"images.gz (cannot be decompressed|has)"):
        read_idx(path)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_idx_parts(tmp_path / "nowhere")
    write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte \(or the same with .gz\) is missing"):
        read_idx_parts(tmp_path)


def test_files_that_do_not_fit_together(tmp_path):
    write(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(19, dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"shape \(19,\), expected \(20,\), one label per image"):
        read_idx_parts(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros(20, dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"shape \(20,\), expected \(n, rows, columns\)"):
        read_idx_parts(tmp_path)
