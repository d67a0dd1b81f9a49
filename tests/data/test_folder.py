import os
import random
import shutil
import sys

import pytest
import torch

from flatmin.data import folder
from flatmin.data.folder import Files, files_digest, scan_annotated, scan_folder
from flatmin.data.loader import FileLoader, load_files
from flatmin.data.views import Centre, RandomCrop, read_image
from tests.pictures import picture

Image = pytest.importorskip("PIL.Image", reason="Pillow makes the images that are read here")

pytestmark = [
    # A machine with one core, and Python's word on fork where other threads run: neither is what is tested here.
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def as_tensor(image):
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


@pytest.fixture
def root(tmp_path):
    for k in range(11):
        name = ("cat", "ant", "bee")[k % 3]
        picture(tmp_path / "train" / name / f"{name}_{k:02}.png", 10 + 3 * k, 40 - 2 * k, seed=k)
    return tmp_path / "train"


# --- Which files ---


def test_classes_and_files_in_order(root):
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / "._cat.png").write_text("no image")
    (root / ".cache").mkdir()
    (root / "readme.txt").write_text("no class")
    files = scan_folder(root)
    assert files.classes == ("ant", "bee", "cat")
    assert files.counts == {"ant": 4, "bee": 3, "cat": 4}
    assert files.paths[:4] == ("ant/ant_01.png", "ant/ant_04.png", "ant/ant_07.png", "ant/ant_10.png")
    assert files.labels == (0,) * 4 + (1,) * 3 + (2,) * 4
    assert len(files) == 11


def test_what_is_left_out_is_counted_and_said(root):
    assert scan_folder(root).notes == ()
    for name in ("cat/a.gif", "cat/b.GIF", "bee/notes.txt", "bee/README", "bee/Thumbs.db", "ant/.hidden.txt"):
        (root / name).write_text("no image")
    for name in ("lost.png", "cat/kittens/a.png", "cat/kittens/b.png"):
        picture(root / name, 4, 4)
    (root / "ant" / "link").symlink_to(root / "cat")
    files = scan_folder(root)
    assert files.counts == {"ant": 4, "bee": 3, "cat": 6}
    said = [note.removeprefix(f"{root}: ") for note in files.notes]
    assert said[0].endswith(": 1 of no extension, 2 of .gif, 1 of .txt.")
    assert said[1:] == [
        "skipped images beside the class folders, which have no class: 1.",
        "images in subfolders of a class folder belong to that class: 2.",
        "skipped symbolic links to folders in a class folder: 1.",
    ]
    (root / "gifs").mkdir()
    (root / "gifs" / "a.gif").write_text("")
    with pytest.raises(
        ValueError, match=r"gifs contains no images; expected files .* \(files skipped so far: .*of \.gif"
    ):
        scan_folder(root)


def test_a_digest_is_of_names_and_content_wherever_they_lie(root, tmp_path, monkeypatch):
    def digest(place=root):
        return files_digest([scan_folder(place)])

    first = digest()
    shutil.copytree(root, tmp_path / "moved")
    assert digest(tmp_path / "moved") == first
    path = root / "cat" / "cat_00.png"
    content = path.read_bytes()
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(folder, "WHOLE", 0)
            first = digest()
        path.write_bytes(content[:-1] + b"x")
        assert digest() != first, "of the same size"
        path.write_bytes(content)
        os.utime(path, ns=(5, 5))
        assert digest() == first
        path.rename(root / "bee" / "cat_00.png")
        assert digest() != first
        (root / "bee" / "cat_00.png").rename(path)


def test_subfolders_and_capital_endings(tmp_path):
    picture(tmp_path / "n01" / "images" / "n01_0.JPEG", 8, 8, format="JPEG")
    picture(tmp_path / "n02" / "n02_0.jpg", 8, 8)
    assert scan_folder(tmp_path).paths == ("n01/images/n01_0.JPEG", "n02/n02_0.jpg")


def test_a_validation_part_has_the_labels_of_the_training_part(root, tmp_path):
    for name in ("bee", "cat", "ant"):
        picture(tmp_path / "val" / name / "x.png", 4, 4)
    assert scan_folder(tmp_path / "val", classes=["ant", "bee", "cat"]).labels == (0, 1, 2)
    with pytest.raises(ValueError, match="ant is not one of the 2 classes of the training part"):
        scan_folder(tmp_path / "val", classes=["bee", "cat"])
    with pytest.raises(ValueError, match="dog contains no images"):
        scan_folder(tmp_path / "val", classes=["ant", "bee", "cat", "dog"])


def test_no_such_data(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        scan_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="contains no folders; expected one folder of images per class"):
        scan_folder(root / "cat")
    (root / "dog").mkdir()
    with pytest.raises(ValueError, match=r"dog contains no images; expected files that end in .jpg"):
        scan_folder(root)


@pytest.fixture
def tiny(tmp_path):
    rows = []
    for k, name in enumerate(("n02", "n01", "n02", "n01")):
        picture(tmp_path / "val" / "images" / f"val_{k}.JPEG", 8, 8, seed=k, format="JPEG")
        rows.append(f"val_{k}.JPEG\t{name}\t0\t0\t7\t7\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(rows))
    return tmp_path / "val"


def test_tiny_imagenet_val(tiny):
    files = scan_annotated(tiny, classes=["n01", "n02"])
    assert files.paths == tuple(f"images/val_{k}.JPEG" for k in (1, 3, 0, 2))
    assert files.labels == (0, 0, 1, 1)
    assert files.classes == ("n01", "n02")
    assert load_files(files, Centre(8, 8)).x.shape == (4, 3, 8, 8)


def test_tiny_imagenet_val_that_does_not_fit(tiny):
    with pytest.raises(ValueError, match=r"line 2: 'n01' is not one of the 1 classes"):
        scan_annotated(tiny, classes=["n02"])
    (tiny / "images" / "val_2.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"line 3: .*val_2.JPEG is missing"):
        scan_annotated(tiny, classes=["n01", "n02"])
    (tiny / "val_annotations.txt").write_text("val_0.JPEG n02\n")
    with pytest.raises(ValueError, match="line 1: expected a file name and its class, separated by a tab"):
        scan_annotated(tiny, classes=["n01", "n02"])
    (tiny / "val_annotations.txt").write_text("")
    with pytest.raises(ValueError, match=r"val_annotations.txt is empty"):
        scan_annotated(tiny, classes=["n01", "n02"])
    (tiny / "val_annotations.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val_annotations.txt is missing; give the val folder"):
        scan_annotated(tiny, classes=["n01", "n02"])


# --- One file ---


def test_the_middle(tmp_path):
    path = tmp_path / "x.png"
    whole = as_tensor(picture(path, 12, 8))
    assert torch.equal(read_image(path, Centre(8, 8)), whole[:, :, 2:10])
    assert torch.equal(read_image(path, Centre(4, 8)), whole[:, 2:6, 4:8])


def test_the_middle_of_the_resized_image(tmp_path):
    path = tmp_path / "x.png"
    image = picture(path, 96, 64)
    resized = as_tensor(image.resize((48, 32), Image.Resampling.BILINEAR))
    found = read_image(path, Centre(24, 32))
    assert (found.int() - resized[:, 4:28, 12:36].int()).abs().max() <= 1


def test_the_usual_resize():
    sizes = []
    image = type(
        "Recorder", (), {"size": (512, 512), "resize": lambda self, size, how, box: sizes.append((size, box))}
    )()
    Centre(224)(image, random.Random(0))
    assert sizes == [((224, 224), (32.0, 32.0, 480.0, 480.0))]  # 224 of 256, in pixels of the file


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (333, 7), (224, 224)])
def test_any_size(size, tmp_path):
    path = tmp_path / "x.png"
    picture(path, *size)
    for view in (Centre(24), Centre(24, 24), RandomCrop(24)):
        for index in range(5):
            assert read_image(path, view, index=index).shape == (3, 24, 24)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_other_colours(mode, tmp_path):
    path = tmp_path / "x.png"
    image = Image.new("RGB", (8, 8), (200, 30, 90)).convert(mode)
    image.save(path)
    assert torch.equal(read_image(path, Centre(8, 8)), as_tensor(image.convert("RGB")))


def test_the_part_depends_on_seed_epoch_and_index(tmp_path):
    path = tmp_path / "x.png"
    picture(path, 60, 50)
    view = RandomCrop(16)
    state = random.getstate()
    first = read_image(path, view, seed=1, epoch=2, index=3)
    assert random.getstate() == state
    assert torch.equal(read_image(path, view, seed=1, epoch=2, index=3), first)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (1, 23, 0), (12, 3, 3)):
        seed, epoch, index = other
        assert not torch.equal(read_image(path, view, seed=seed, epoch=epoch, index=index), first)


def test_parts_have_the_area_and_the_ratio():
    view, draw, n = RandomCrop(8, scale=(0.08, 0.5)), random.Random(0), 4000
    boxes = torch.tensor([view.box(1000, 1000, draw) for _ in range(n)]).double()
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 1000 and bottom.max() <= 1000
    area, ratio = width * height / 1e6, (width / height).log()
    assert area.min() > 0.079 and area.max() < 0.501
    assert abs(area.mean() - 0.29) < 5 * (0.42 / 12**0.5) / n**0.5
    bound = torch.tensor(4 / 3).log()
    assert ratio.abs().max() < bound + 0.01
    assert abs(ratio.mean()) < 5 * (2 * bound / 12**0.5) / n**0.5
    for begin, length in ((left, width), (top, height)):
        assert abs((begin / (1000 - length)).mean() - 0.5) < 5 / 12**0.5 / n**0.5


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506)), ((1, 1), (0, 0, 1, 1))]
)
def test_where_no_part_fits(size, box):
    assert RandomCrop(8, scale=(1, 1)).box(*size, random.Random(0)) == box


@pytest.mark.parametrize("arguments", [{"size": 0}, {"resize": 10}])
def test_bad_centre(arguments):
    with pytest.raises(ValueError, match="resize at least size"):
        Centre(**arguments)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"scale": (0, 1)}, {"scale": (0.5, 0.1)}, {"ratio": (2, 1)}])
def test_bad_random_crop(arguments):
    with pytest.raises(ValueError, match="scale must be ascending in"):
        RandomCrop(**arguments)


def test_a_file_that_is_no_image(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_text("<html>")
    with pytest.raises(ValueError, match=r"x.jpg cannot be read as an image: .*; replace the file or remove it"):
        read_image(path, Centre(8))
    picture(path, 64, 64)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"x.jpg cannot be read as an image: .*truncated"):
        read_image(path, Centre(8))
    with pytest.raises(ValueError, match=r"y.jpg cannot be read as an image: .*No such file"):
        read_image(tmp_path / "y.jpg", Centre(8))


def test_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    files = Files(tmp_path, ("a",), ("a/x.png",), (0,))
    for attempt in (
        lambda: FileLoader(files, Centre(8), batch_size=1),
        lambda: read_image(tmp_path / "x.png", Centre(8)),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"needs Pillow: pip install '\.\[vision\]'"):
            attempt()


# --- Batches ---


def epochs(loader, *numbers):
    return [[(x.clone(), y.clone()) for x, y in loader.epoch(number)] for number in numbers]


def same(a, b):
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in pairs)


def test_the_same_batches_for_any_number_of_workers(root):
    files = scan_folder(root)
    alone, helped, third = (
        FileLoader(files, RandomCrop(16), batch_size=4, workers=workers, seed=5) for workers in (0, 2, 1)
    )
    first, again = epochs(alone, 0, 1), epochs(helped, 0, 1)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not same(first[0], first[1])
    assert same(epochs(third, 1)[0], first[1])  # an epoch alone
    assert same(epochs(helped, 0)[0], first[0])  # an epoch again


def test_the_order_depends_on_seed_and_epoch(root):
    files = scan_folder(root)

    def order(seed, epoch):
        loader = FileLoader(files, Centre(8), batch_size=11, seed=seed)
        return epochs(loader, epoch)[0][0][0]

    assert torch.equal(order(0, 1), order(0, 1))
    assert not torch.equal(order(0, 1), order(1, 1))
    assert not torch.equal(order(0, 1), order(0, 0))


def test_an_epoch_left_early(root):
    files = scan_folder(root)
    loader = FileLoader(files, RandomCrop(16), batch_size=2, workers=2)
    next(loader.epoch(0))
    assert same(epochs(loader, 1)[0], epochs(FileLoader(files, RandomCrop(16), batch_size=2), 1)[0])


def test_the_global_state_is_left_alone(root):
    before, python = torch.get_rng_state(), random.getstate()
    for workers in (0, 2):
        epochs(FileLoader(scan_folder(root), RandomCrop(8), batch_size=4, workers=workers), 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def test_every_image_once(root):
    files = scan_folder(root)
    loader = FileLoader(files, Centre(8), batch_size=4)
    (batches,) = epochs(loader, 0)
    assert [len(y) for _, y in batches] == [4, 4, 3]
    assert len(loader) == 3
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    assert x.dtype == torch.uint8 and y.dtype == torch.int64
    whole = load_files(files, Centre(8))
    assert torch.equal(whole.y, torch.tensor(files.labels))
    key = {image.numpy().tobytes(): int(label) for image, label in zip(whole.x, whole.y, strict=True)}
    assert len(key) == 11
    assert {image.numpy().tobytes(): int(label) for image, label in zip(x, y, strict=True)} == key
    assert not torch.equal(x, whole.x)


def test_in_order_and_whole_batches_only(root):
    files = scan_folder(root)
    loader = FileLoader(files, Centre(8), batch_size=4, shuffle=False, drop_last=True)
    (batches,) = epochs(loader, 3)
    assert len(loader) == len(batches) == 2
    assert torch.equal(torch.cat([x for x, _ in batches]), load_files(files, Centre(8), workers=2).x[:8])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_named_without_a_traceback_of_a_worker(workers, root):
    (root / "bee" / "bee_02.png").write_bytes(b"broken")
    loader = FileLoader(scan_folder(root), Centre(8), batch_size=4, workers=workers)
    with pytest.raises(ValueError, match=r"^\S*bee_02.png cannot be read as an image: [^\n]*$"):
        epochs(loader, 0)


def test_bad_loaders(root):
    files = scan_folder(root)
    with pytest.raises(ValueError, match="batch_size must be at least 1 and workers at least 0, got 0 and 0"):
        FileLoader(files, Centre(8), batch_size=0)
    with pytest.raises(ValueError, match="11 images, too few for a batch of 12; use a smaller batch_size"):
        FileLoader(files, Centre(8), batch_size=12, drop_last=True)


def test_pixels_of_16_bits_are_refused(tmp_path):
    Image.new("I;16", (8, 8), 3000).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png cannot be read as an image: its pixels have more than 8 bits"):
        read_image(tmp_path / "deep.png", Centre(8))
