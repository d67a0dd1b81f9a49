"""Inputs that stay files."""

import os
import random

import numpy as np
import pytest
import torch

from flatmin.data import named, streamed
from flatmin.data.dataset import Data, Split, Stored
from flatmin.data.folder import scan_folder
from flatmin.data.images import IMAGENET, Statistics
from flatmin.data.loader import FileStream, load_files
from flatmin.data.named import Reading, read_named
from flatmin.data.official import three_parts
from flatmin.data.streamed import FileImages
from flatmin.data.views import Centre, RandomCrop, read_image
from tests.pictures import CLASSES, cut_short, picture, tree

Image = pytest.importorskip("PIL.Image", reason="Pillow makes the images that are read here")

pytestmark = [
    # A machine with one core, and Python's word on fork where other threads run: neither is what is tested here.
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

SIDE = 8
UNREADABLE = r"^\S*{} cannot be read as an image: [^\n]*$"


@pytest.fixture
def root(tmp_path):
    return tree(tmp_path, train=11)


@pytest.fixture
def files(root):
    return scan_folder(root / "train")


def images(files, **options):
    return FileImages(files, Centre(SIDE), **options)


def held(files):
    return load_files(files, Centre(SIDE)).x


def streamed_batches(x, *batches, seed=0, epoch=0):
    return list(x.stream(seed).epoch(epoch, [torch.tensor(batch) for batch in batches]))


class TestInPlaceOfATensor:
    def test_shape_and_type(self, files):
        x = images(files)
        assert isinstance(x, Stored)
        assert (len(x), x.shape, x.dim(), x.dtype) == (11, torch.Size((11, 3, SIDE, SIDE)), 4, torch.uint8)
        assert x.device == torch.device("cpu")

    @pytest.mark.parametrize("workers", [0, 3])
    def test_what_is_read_is_what_would_be_in_memory(self, files, workers):
        some = (
            slice(None),
            slice(3, 7),
            slice(1, None, 4),
            slice(5, 5),
            torch.tensor([7, 0, 7]),
            torch.arange(11) % 2 == 0,
        )
        for index in some:
            x = images(files, workers=workers)[index]
            assert x.dtype == torch.uint8 and torch.equal(x, held(files)[index])

    def test_some_are_chosen_and_not_read(self, files):
        some = images(files).only(torch.arange(11) > 2).only(slice(0, 4)).only(torch.tensor([3, 1]))
        assert len(some) == 2 and some.shape[0] == 2
        assert torch.equal(some[:], held(files)[[6, 4]])
        cut_short(files.root / files.paths[0])
        assert len(images(files).only(slice(0, 2))) == 2

    def test_on_another_device(self, files):
        x = images(files).to("meta")
        assert x.device.type == "meta" and x[:2].device.type == "meta"
        assert x.only(slice(2)).device.type == "meta"
        assert streamed_batches(x, [1, 2])[0].device.type == "meta"

    def test_what_changes_when_a_file_changes(self, files):
        x = images(files)
        before = list(x.facts())
        assert before == list(images(files, workers=2).facts())
        os.utime(files.root / files.paths[3], ns=(0, 0))
        assert list(x.facts()) == before, "the time of a change is none"
        picture(files.root / files.paths[3], 20, 20, seed=99)
        assert [a == b for a, b in zip(before, x.facts(), strict=True)] == [True, False, True]
        assert next(FileImages(files, Centre(4)).facts()) != before[0]
        assert list(x.only(slice(3)).facts()) != list(x.facts())

    def test_views_of_two_sizes(self, files):
        with pytest.raises(ValueError, match="must have the same size, got 8 and 16"):
            FileImages(files, Centre(8), RandomCrop(16))

    def test_too_many_at_once(self, files, monkeypatch):
        monkeypatch.setattr(streamed, "HELD", 4 * 3 * SIDE**2)
        assert len(images(files)[:4]) == 4
        with pytest.raises(ValueError, match=r"^5 images of shape \(3, 8, 8\) would take 0 GiB of memory; read fewer"):
            images(files)[:5]


class TestStream:
    def test_the_same_for_any_number_of_workers(self, files):
        batches = ([3, 1, 4], [10, 5], [9], [2, 6])
        found = []
        for workers in (0, 1, 2):
            stream = images(files, workers=workers).stream(7)
            found.append([list(stream.epoch(epoch, [torch.tensor(b) for b in batches])) for epoch in (0, 1)])
        for other in found[1:]:
            for epoch, same in zip(other, found[0], strict=True):
                assert [torch.equal(a, b) for a, b in zip(epoch, same, strict=True)] == [True] * 4
        assert not torch.equal(found[0][0][0], found[0][1][0])

    def test_a_view_without_draws_gives_what_would_be_in_memory(self, files):
        x = FileImages(files, Centre(SIDE), training=Centre(SIDE))
        first, second = streamed_batches(x, [5, 2, 8], [0])
        assert torch.equal(first, held(files)[[5, 2, 8]]) and torch.equal(second, held(files)[[0]])

    def test_a_view_depends_on_seed_epoch_and_file_and_not_on_its_place(self, files):
        x = images(files)
        ((first,),) = [streamed_batches(x, [4, 6], seed=1, epoch=2)]
        expected = [read_image(files.root / files.paths[k], RandomCrop(SIDE), seed=1, epoch=2, index=k) for k in (4, 6)]
        assert torch.equal(first, torch.stack(expected))
        some = x.only(torch.tensor([9, 6, 4]))
        assert torch.equal(streamed_batches(some, [0], [2, 1], seed=1, epoch=2)[1], first)
        for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
            assert not torch.equal(streamed_batches(x, [4, 6], **other)[0], first)

    def test_no_batches_and_an_epoch_left_early(self, files):
        stream = images(files, workers=2).stream(0)
        assert list(stream.epoch(0, [])) == []
        next(stream.epoch(0, [torch.tensor([k]) for k in range(11)]))
        (found,) = stream.epoch(1, [torch.tensor([1, 2])])
        assert torch.equal(found, streamed_batches(images(files), [1, 2], epoch=1)[0])

    def test_the_global_state_is_left_alone(self, files):
        before, python = torch.get_rng_state(), random.getstate()
        for workers in (0, 2):
            x = images(files, workers=workers)
            streamed_batches(x, [1, 2], [3])
            x.check()
            x[:]
        assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python

    def test_a_negative_number_of_workers(self, files):
        with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
            FileStream(files, Centre(SIDE), workers=-1)


class Dying:
    """A view that takes its process with it."""

    size = SIDE

    def __call__(self, image, draw):
        os._exit(3)


class TestFilesThatCannotBeRead:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_cut_short(self, files, workers):
        """The header is good; reading tells, in one sentence."""
        cut_short(files.root / files.paths[4])
        x = images(files, workers=workers)
        x.check()
        said = UNREADABLE.format(files.paths[4].rpartition("/")[2])
        with pytest.raises(ValueError, match=said):
            x[:]
        stream = x.stream(0).epoch(0, [torch.tensor(batch) for batch in ([1, 2], [3, 4], [5, 6])])
        assert next(stream).shape == (2, 3, SIDE, SIDE)
        with pytest.raises(ValueError, match=said):
            next(stream)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_what_a_look_at_the_headers_finds(self, files, workers):
        x = images(files, workers=workers)
        first, second, third = (files.root / files.paths[k] for k in (2, 5, 9))
        first.write_text("<html>")
        with pytest.raises(ValueError, match=UNREADABLE.format(first.name)):
            x.check()
        second.unlink()
        Image.new("I;16", (8, 8), 3000).save(third, format="PNG")
        with pytest.raises(ValueError, match=rf"{first.name} cannot be .* In total, 3 files cannot be read\.$"):
            x.check()
        x.only(torch.tensor([0, 1, 3])).check()
        with pytest.raises(ValueError, match=rf"{third.name} cannot be .* its pixels have more than 8 bits"):
            x.only(slice(9, 10)).check()

    def test_a_process_that_ends(self, files):
        x = FileImages(files, Centre(SIDE), training=Dying(), workers=1)
        with pytest.raises(ValueError, match=r"^a worker process .* was terminated, .*; use fewer workers\.$"):
            streamed_batches(x, [0, 1])


class TestData:
    @pytest.fixture
    def part(self, files):
        return Split(images(files), torch.tensor(files.labels))

    def test_all_that_data_can(self, part, files):
        data = Data(part, part.only(slice(5)), part, num_classes=3, statistics=IMAGENET)
        noisy = data.with_labels((part.y + (torch.arange(11) % 4 == 1)) % 3)
        assert noisy.wrong.nonzero().flatten().tolist() == [1, 5, 9]
        wrong = noisy.train.only(noisy.wrong)
        assert torch.equal(wrong.x[:], held(files)[[1, 5, 9]]) and torch.equal(wrong.y, noisy.train.y[[1, 5, 9]])
        assert data.inputs(data.val.x[:]).shape == (5, 3, SIDE, SIDE)
        moved = data.train.to("meta")
        assert moved.x.device.type == moved.y.device.type == "meta"

    def test_what_does_not_fit(self, part):
        with pytest.raises(ValueError, match="statistics are required for images of bytes"):
            Data(part, part, part, num_classes=3)
        with pytest.raises(ValueError, match="as many inputs as labels"):
            Data(Split(part.x, part.y[:5]), part, part, num_classes=3, statistics=IMAGENET)
        with pytest.raises(ValueError, match=r"train must hold tensors, got ndarray and Tensor"):
            Data(Split(np.zeros((11, 3)), part.y), part, part, num_classes=3)

    def test_statistics_of_all_that_is_read(self, part, files):
        data = three_parts(part, part, num_classes=3, name="mine", validation=0.2)
        assert data.statistics == Statistics.of(held(files))
        assert (len(data.train), len(data.val)) == (9, 2)
        assert all(isinstance(one.x, FileImages) for one in (data.train, data.val, data.test))


class TestByName:
    def test_imagenet(self, tmp_path):
        tree(tmp_path / "imagenet", train=20, val=6)
        data = read_named("imagenet", Reading(folder=tmp_path, validation=0.25, workers=2))
        assert [len(part) for part in (data.train, data.val, data.test)] == [15, 5, 6]
        assert data.train.x.shape[1:] == data.test.x.shape[1:] == (3, 224, 224)
        assert (data.statistics, data.num_classes, data.name) == (IMAGENET, 3, "imagenet")
        assert (data.augment.crop, data.augment.flip, data.augment.cutout) == (0, True, 0)
        files = scan_folder(tmp_path / "imagenet" / "train")
        both = torch.cat([data.train.x.chosen, data.val.x.chosen])
        assert sorted(both.tolist()) == list(range(20))
        assert torch.equal(data.val.y, torch.tensor(files.labels)[data.val.x.chosen])
        assert data.train.x.view == Centre(224) and data.train.x.training == RandomCrop(224)
        assert data.train.x.workers == 2
        assert data.test.x.files.root == tmp_path / "imagenet" / "val"

    def test_imagenet_of_another_size_without_a_part_for_validation(self, tmp_path):
        tree(tmp_path, train=20, val=6)
        data = read_named("imagenet", Reading(folder=tmp_path, validation=None, image_size=SIDE))
        assert data.val is data.test and len(data.train) == 20
        assert data.train.x.shape[1:] == (3, SIDE, SIDE)

    def test_imagenet_whose_val_is_not_sorted_into_classes(self, tmp_path):
        tree(tmp_path, train=6)
        picture(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", 8, 8)
        with pytest.raises(ValueError, match="val contains no folders; expected one folder of images per class"):
            read_named("imagenet", Reading(folder=tmp_path))

    @pytest.mark.parametrize("others", [{"test": 5}, {"val": 4, "test": 5}])
    def test_folders_are_read_once_if_they_are_small_and_stay_files_if_not(self, tmp_path, monkeypatch, others):
        tree(tmp_path, train=20, **others)
        reading = Reading(folder=tmp_path, image_size=SIDE)
        total = 3 * SIDE**2 * (20 + sum(others.values()))
        monkeypatch.setattr(named, "HELD", total)
        small = read_named("images", reading)
        assert isinstance(small.train.x, torch.Tensor)
        monkeypatch.setattr(named, "HELD", total - 1)
        large = read_named("images", reading)
        parts = ("train", "val", "test")
        assert all(isinstance(getattr(large, part).x, FileImages) for part in parts)
        assert all(torch.equal(getattr(large, part).y, getattr(small, part).y) for part in parts)
        assert small.augment.crop == 1 and large.augment.crop == 0
        assert small.statistics == Statistics.of(load_files(scan_folder(tmp_path / "train"), Centre(SIDE, SIDE)).x)
        assert large.statistics == IMAGENET
        assert {CLASSES[k] for k in large.train.y.tolist()} == set(CLASSES)

    @pytest.mark.parametrize("name", ["flowers102", "pets"])
    def test_sets_to_fine_tune_on(self, tmp_path, name):
        tree(tmp_path / name, train=20, test=6)
        data = read_named(name, Reading(folder=tmp_path, validation=0.1))
        assert [len(part) for part in (data.train, data.val, data.test)] == [18, 2, 6]
        assert data.train.x.shape[1:] == named.DATASETS[name].shape
        assert (data.statistics, data.num_classes, data.name) == (IMAGENET, 3, name)
        assert data.train.x.training == RandomCrop(224) and data.test.x.view == Centre(224)
        assert data.test.x.files.root == tmp_path / name / "test"
