import dataclasses
import hashlib
import os
import tarfile
import urllib.request

import numpy as np
import pytest
import torch

from flatmin.data.cifar import RELEASES, download_cifar, load_cifar, read_cifar
from flatmin.data.images import CIFAR100_COARSE, STATISTICS, Statistics

NAMES = ("cifar10", "cifar100")
PER_FILE = 4


@pytest.fixture(autouse=True)
def few_records(monkeypatch, request):
    """Files of four records instead of 10 000 or 50 000, and no way out."""
    if "slow" in request.keywords:
        return
    for name in NAMES:
        release = RELEASES[name]
        small = dataclasses.replace(release, records=dict.fromkeys(release.records, PER_FILE))
        monkeypatch.setitem(RELEASES, name, small)


def files_of(name):
    return (*RELEASES[name].train, RELEASES[name].test)


def write(name, folder):
    """The files of a release with random pixels and labels; for each file its labels, column by column, and pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    content = {}
    for file in files_of(name):
        labels = [rng.integers(0, classes, PER_FILE, dtype=np.uint8) for classes in RELEASES[name].classes]
        pixels = rng.integers(0, 256, (PER_FILE, 3, 32, 32), dtype=np.uint8)
        (folder / file).write_bytes(np.concatenate([np.stack(labels, 1), pixels.reshape(PER_FILE, -1)], 1).tobytes())
        content[file] = (labels, pixels)
    return content


def pack(name, folder, monkeypatch):
    """The archive of a release in `folder`, whose checksum becomes the expected one; and its content."""
    release = RELEASES[name]
    content = write(name, folder / "source")
    (folder / "source" / "readme.html").write_text("not data")
    with tarfile.open(folder / release.archive, "w:gz") as archive:
        archive.add(folder / "source", arcname=release.folders[0])
    for file in (folder / "source").iterdir():
        file.unlink()
    (folder / "source").rmdir()
    md5 = hashlib.md5((folder / release.archive).read_bytes()).hexdigest()
    monkeypatch.setitem(RELEASES, name, dataclasses.replace(release, md5=md5))
    return folder / release.archive, content


def check(name, content, parts, coarse=False):
    train, test = parts
    expected = [content[file] for file in RELEASES[name].train]
    np.testing.assert_array_equal(train.x.numpy(), np.concatenate([pixels for _, pixels in expected]))
    np.testing.assert_array_equal(train.y.numpy(), np.concatenate([y[0 if coarse else -1] for y, _ in expected]))
    labels, pixels = content[RELEASES[name].test]
    np.testing.assert_array_equal(test.x.numpy(), pixels)
    np.testing.assert_array_equal(test.y.numpy(), labels[0 if coarse else -1])
    assert train.x.dtype == test.x.dtype == torch.uint8
    assert train.y.dtype == test.y.dtype == torch.int64
    assert train.x.is_contiguous() and test.x.is_contiguous()


def test_the_official_sizes(monkeypatch):
    monkeypatch.undo()
    sizes = {file: RELEASES["cifar10"].records[file] * RELEASES["cifar10"].record for file in files_of("cifar10")}
    assert set(sizes.values()) == {30_730_000}
    hundred = RELEASES["cifar100"]
    assert [hundred.records[file] * hundred.record for file in files_of("cifar100")] == [153_700_000, 30_740_000]


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_itself(name, tmp_path):
    check(name, write(name, tmp_path), read_cifar(name, tmp_path))


@pytest.mark.parametrize(("name", "folder"), [(name, folder) for name in NAMES for folder in RELEASES[name].folders])
def test_the_parent_of_the_folder(name, folder, tmp_path):
    check(name, write(name, tmp_path / folder), read_cifar(name, str(tmp_path)))


def test_both_in_one_place(tmp_path):
    contents = {name: write(name, tmp_path / RELEASES[name].folders[0]) for name in NAMES}
    for name in NAMES:
        check(name, contents[name], read_cifar(name, tmp_path))


def test_coarse_labels(tmp_path):
    content = write("cifar100", tmp_path)
    check("cifar100", content, read_cifar("cifar100", tmp_path, coarse=True), coarse=True)
    data = load_cifar("cifar100", tmp_path, coarse=True, validation=0.25)
    assert (data.num_classes, data.name) == (20, "cifar100-coarse")


@pytest.mark.parametrize("name", NAMES)
def test_the_archive(name, tmp_path, monkeypatch):
    archive, content = pack(name, tmp_path, monkeypatch)
    for place in (tmp_path, archive):
        check(name, content, read_cifar(name, place))
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]  # nothing is unpacked to disk


def test_the_parts(tmp_path):
    content = write("cifar10", tmp_path)
    data = load_cifar("cifar10", tmp_path, validation=0.2)
    assert (len(data.train), len(data.val), len(data.test)) == (16, 4, 4)
    assert (data.num_classes, data.name) == (10, "cifar10")
    assert data.train.x.dtype == torch.uint8
    seen = {x.numpy().tobytes() for part in (data.train, data.val) for x in part.x}
    assert seen == {x.tobytes() for file in RELEASES["cifar10"].train for x in content[file][1]}
    other = load_cifar("cifar10", tmp_path, validation=0.2, split_seed=1)
    assert not torch.equal(other.val.x, data.val.x)
    assert not torch.equal(load_cifar("cifar10", tmp_path, validation=0.2, stratified=True).val.x, data.val.x)


def test_superclasses():
    assert np.bincount(CIFAR100_COARSE).tolist() == [5] * 20


# --- What can be wrong ---


def test_nothing_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no CIFAR-10 in .*data_batch_1.bin .*cifar-10-batches-bin.*download=True"
    ):
        read_cifar("cifar10", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-100 in .*nowhere"):
        read_cifar("cifar100", tmp_path / "nowhere")


def test_one_file_is_missing(tmp_path):
    write("cifar10", tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3.bin is missing.*unpack cifar-10-binary.tar.gz again"):
        read_cifar("cifar10", tmp_path)


@pytest.mark.parametrize("change", [-1, -3073, 3073, 1])
def test_a_file_of_another_size(change, tmp_path):
    write("cifar10", tmp_path)
    path = tmp_path / "test_batch.bin"
    os.truncate(path, 4 * 3073 + change)
    words = rf"test_batch.bin has {12292 + change} bytes, expected 12292 \(4 records of 3073 bytes\).*unpack .* again"
    with pytest.raises(ValueError, match=words):
        read_cifar("cifar10", tmp_path)


def test_labels_that_cannot_be(tmp_path):
    write("cifar100", tmp_path)
    data = bytearray((tmp_path / "train.bin").read_bytes())
    data[3074 + 1] = 100
    (tmp_path / "train.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"train.bin contains the label 100, expected 0 to 99"):
        read_cifar("cifar100", tmp_path)


def test_an_archive_of_another_checksum(tmp_path, monkeypatch):
    archive, _ = pack("cifar10", tmp_path, monkeypatch)
    os.truncate(archive, archive.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz has MD5 [0-9a-f]{32}, expected .*delete it"):
        read_cifar("cifar10", tmp_path)


def test_an_archive_without_one_of_the_files(tmp_path, monkeypatch):
    archive = tmp_path / RELEASES["cifar100"].archive
    write("cifar100", tmp_path / "source")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "test.bin", arcname="cifar-100-binary/test.bin")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(RELEASES, "cifar100", dataclasses.replace(RELEASES["cifar100"], md5=md5))
    with pytest.raises(ValueError, match=r"does not contain train.bin; download cifar-100-binary.tar.gz again"):
        read_cifar("cifar100", archive)


def test_unknown_name_and_no_coarse_labels(tmp_path):
    with pytest.raises(ValueError, match="unknown data 'cifar'; did you mean 'cifar10'"):
        read_cifar("cifar", tmp_path)
    with pytest.raises(ValueError, match="CIFAR-10 has no coarse labels"):
        read_cifar("cifar10", tmp_path, coarse=True)


# --- Download, from a file:// address ---


@pytest.fixture
def server(tmp_path, monkeypatch):
    place = tmp_path / "server"
    place.mkdir()
    archive, content = pack("cifar10", place, monkeypatch)
    monkeypatch.setitem(RELEASES, "cifar10", dataclasses.replace(RELEASES["cifar10"], url=archive.as_uri()))
    return archive, content


def test_nothing_is_downloaded_unasked(tmp_path, server, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("went out"))
    with pytest.raises(FileNotFoundError):
        read_cifar("cifar10", tmp_path / "here")
    write("cifar10", tmp_path / "here")
    read_cifar("cifar10", tmp_path / "here", download=True)  # it is there


def test_download(tmp_path, server):
    archive, content = server
    seen = []
    here = tmp_path / "new" / "here"
    parts = read_cifar("cifar10", here, download=True, progress=lambda done, total: seen.append((done, total)))
    check("cifar10", content, parts)
    size = archive.stat().st_size
    assert seen[-1] == (size, size)
    assert [path.name for path in here.iterdir()] == [archive.name]
    assert (here / archive.name).read_bytes() == archive.read_bytes()


def test_a_download_of_another_checksum_leaves_nothing(tmp_path, server):
    os.truncate(server[0], 1000)
    with pytest.raises(ValueError, match=r"the download of file:.* has MD5 .*, expected .*try again"):
        download_cifar("cifar10", tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


def test_no_connection_leaves_nothing(tmp_path, server):
    server[0].unlink()
    with pytest.raises(OSError, match=r"could not be downloaded: .*check the connection"):
        download_cifar("cifar10", tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_stopped_download_leaves_nothing(tmp_path, server):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_cifar("cifar10", tmp_path / "here", progress=stop)
    assert list((tmp_path / "here").iterdir()) == []


# --- The real data ---


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_real_data(name):
    folder = os.environ.get("FLATMIN_CIFAR")
    if not folder:
        pytest.skip("FLATMIN_CIFAR names no folder with the binary release of CIFAR-10 and CIFAR-100")
    train, test = read_cifar(name, folder)
    assert train.x.shape == (50_000, 3, 32, 32)
    assert test.x.shape == (10_000, 3, 32, 32)
    classes = RELEASES[name].classes[-1]
    assert train.y.bincount().tolist() == [50_000 // classes] * classes
    assert test.y.bincount().tolist() == [10_000 // classes] * classes
    found, published = Statistics.of(train.x), STATISTICS[name]
    assert found.mean == pytest.approx(published.mean, abs=5.1e-5)
    assert found.std == pytest.approx(published.std, abs=5.1e-5)
    if name == "cifar100":
        coarse = read_cifar(name, folder, coarse=True)
        for fine, wide in zip((train, test), coarse, strict=True):
            assert torch.equal(torch.tensor(CIFAR100_COARSE)[fine.y], wide.y)
    data = load_cifar(name, folder)
    assert (len(data.train), len(data.val), len(data.test)) == (45_000, 5_000, 10_000)
