import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flatmin.data.augment import Augment, normalise
from flatmin.data.images import CIFAR10, Statistics

PLAIN = Statistics((0.0,), (1.0,))


def images(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def one_image(x, u, augment, statistics):
    """The papers' steps on one image, each in its own words; u are the six draws of this image."""
    _, height, width = x.shape
    pad = augment.crop
    padded = F.pad(x, (pad,) * 4)
    top, left = (int(v * (2 * pad + 1)) for v in u[:2])
    x = padded[:, top : top + height, left : left + width]
    if augment.flip and u[2] < 0.5:
        x = x.flip(-1)
    x = x.float()
    for c, (mean, std) in enumerate(zip(statistics.mean, statistics.std, strict=True)):
        x[c] = (x[c] - torch.tensor(255 * mean, dtype=torch.float32)) * torch.tensor(1 / (255 * std))
    if augment.cutout and u[3] < augment.cutout_p:
        row, column = int(u[4] * height), int(u[5] * width)
        top, left = row - augment.cutout // 2, column - augment.cutout // 2
        bottom, right = top + augment.cutout, left + augment.cutout
        x[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = 0
    return x


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 6),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    crop=st.integers(0, 5),
    flip=st.booleans(),
    cutout=st.integers(0, 14),
    cutout_p=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**40),
)
def test_a_batch_is_its_images_one_by_one(n, channels, height, width, crop, flip, cutout, cutout_p, seed):
    x = images(n, channels, height, width, seed=seed)
    statistics = Statistics((0.3, 0.5, 0.7)[:channels], (0.1, 0.2, 0.3)[:channels])
    augment = Augment(crop=crop, flip=flip, cutout=cutout, cutout_p=cutout_p)
    before = x.clone()
    out = augment(x, statistics, seeded(seed))
    u = torch.rand(6, n, generator=seeded(seed))
    expected = torch.stack([one_image(image, u[:, i], augment, statistics) for i, image in enumerate(x)])
    assert torch.equal(out, expected)
    assert out.dtype == torch.float32
    assert torch.equal(x, before)


def test_cifar_size_with_the_defaults():
    x = images(64, 3, 32, 32)
    augment = Augment()
    out = augment(x, CIFAR10, seeded(5))
    u = torch.rand(6, 64, generator=seeded(5))
    assert torch.equal(out, torch.stack([one_image(x[i], u[:, i], augment, CIFAR10) for i in range(64)]))


def test_normalise_is_the_usual_formula():
    x = images(4, 3, 8, 8)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (CIFAR10.mean, CIFAR10.std))
    torch.testing.assert_close(normalise(x, CIFAR10).double(), (x / 255.0 - mean) / std, rtol=1e-6, atol=1e-6)


def test_everything_off_is_normalise():
    x = images(4, 3, 8, 8)
    off = Augment(crop=0, flip=False, cutout=0)
    assert torch.equal(off(x, CIFAR10, seeded()), normalise(x, CIFAR10))


def test_padding_is_black_and_cutout_is_the_mean():
    x = torch.full((200, 1, 8, 8), 200, dtype=torch.uint8)
    statistics = Statistics((0.5,), (0.25,))
    black, bright = normalise(torch.tensor([[[[0, 200]]]], dtype=torch.uint8), statistics).flatten().tolist()
    assert black == pytest.approx(-2)
    cropped = Augment(cutout=0)(x, statistics, seeded())
    assert set(cropped.unique().tolist()) == {black, bright}
    cut = Augment(crop=0)(x, statistics, seeded())
    assert set(cut.unique().tolist()) == {0.0, bright}


@pytest.mark.parametrize("source", ["contiguous", "channels_last", "view"])
def test_channels_last_has_the_same_values(source):
    x = images(6, 3, 8, 10)
    other = {"channels_last": x.contiguous(memory_format=torch.channels_last), "view": torch.cat([x, x], 3)[..., :10]}
    given_x = other.get(source, x)
    for function in (normalise, lambda x, s, **k: Augment()(x, s, seeded(), **k)):
        plain = function(x, CIFAR10)
        assert plain.is_contiguous()
        assert torch.equal(function(given_x, CIFAR10), plain)
        last = function(given_x, CIFAR10, channels_last=True)
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(last, plain)


def test_the_generator_decides_and_the_global_state_does_not():
    x = images(8, 3, 32, 32)
    before = torch.get_rng_state()
    first = Augment()(x, CIFAR10, seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(Augment()(x, CIFAR10, seeded(1)), first)
    assert not torch.equal(Augment()(x, CIFAR10, seeded(2)), first)


def test_what_is_switched_off_does_not_move_the_other_draws():
    x = images(8, 3, 32, 32)
    states = []
    for augment in (Augment(), Augment(cutout=0), Augment(crop=0, flip=False), Augment(cutout_p=0)):
        generator = seeded(1)
        augment(x, CIFAR10, generator)
        states.append(generator.get_state())
    assert all(torch.equal(state, states[0]) for state in states)
    both, uncut = Augment()(x, CIFAR10, seeded(1)), Augment(cutout=0)(x, CIFAR10, seeded(1))
    assert torch.equal(both[both != 0], uncut[both != 0])
    assert (both == 0).any()


def test_crops_are_uniform():
    n, x = 20_000, torch.zeros(20_000, 1, 9, 9, dtype=torch.uint8)
    x[:, 0, 4, 4] = 255  # stays in sight wherever the window lies
    out = Augment(flip=False, cutout=0)(x, PLAIN, seeded())
    counts = out.flatten(1).argmax(1).bincount(minlength=81)
    assert int(counts.sum()) == int((out == 1).sum()) == n
    expected = n / 81
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_half_of_the_images_are_flipped():
    n, x = 20_000, torch.tensor([0, 255], dtype=torch.uint8).expand(20_000, 1, 1, 2)
    out = Augment(crop=0, cutout=0)(x, PLAIN, seeded())
    assert abs(out[:, 0, 0, 0].mean().item() - 0.5) < 5 * 0.5 / n**0.5


def test_area_of_the_cut_square_with_the_border():
    n = 8000
    x = torch.full((n, 1, 32, 32), 255, dtype=torch.uint8)
    out = Augment(crop=0, flip=False)(x, PLAIN, seeded())
    areas = (out == 0).flatten(1).sum(1).double()
    cut = areas[areas > 0]
    assert abs(len(cut) / n - 0.5) < 5 * 0.5 / n**0.5
    lengths = torch.tensor([min(32, c + 8) - max(0, c - 8) for c in range(32)]).double()
    expected = lengths.outer(lengths).flatten()
    assert abs(cut.mean() - expected.mean()) < 5 * expected.std() / len(cut) ** 0.5
    assert cut.min() == expected.min() == 64
    assert cut.max() == expected.max() == 256
    # Each pixel is as often cut as there are centres whose square reaches it.
    reach = torch.tensor([sum(c - 8 <= i < c + 8 for c in range(32)) / 32 for i in range(32)])
    share = (out == 0).float().mean((0, 1))
    assert (share - 0.5 * reach.outer(reach)).abs().max() < 5 * 0.5 / n**0.5


def test_no_loop_over_images():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    calls = []
    for n in (2, 2, 64):  # the first call also makes the constants
        x, generator = images(n, 3, 32, 32), seeded()
        with Count() as count:
            Augment()(x, CIFAR10, generator)
        calls.append(count.calls)
    assert calls[1] == calls[2] <= 60  # half of them views, which launch nothing


def test_misuse():
    with pytest.raises(ValueError, match=r"uint8 of shape \(n, C, H, W\), got torch.float32"):
        Augment()(torch.zeros(2, 3, 8, 8), CIFAR10, seeded())
    with pytest.raises(ValueError, match=r"uint8 of shape .* \(3, 8, 8\)"):
        normalise(torch.zeros(3, 8, 8, dtype=torch.uint8), CIFAR10)
    with pytest.raises(ValueError, match="statistics have 3 channels, but the images have 1"):
        normalise(images(2, 1, 8, 8), CIFAR10)
    with pytest.raises(ValueError, match="crop and cutout must be at least 0, got -1 and 16"):
        Augment(crop=-1)
    with pytest.raises(ValueError, match=r"cutout_p must be a probability in \[0, 1\], got 1.5"):
        Augment(cutout_p=1.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cpu_generator_gives_the_same_images_on_every_device():
    x = images(16, 3, 32, 32)
    assert torch.equal(Augment()(x.cuda(), CIFAR10, seeded()).cpu(), Augment()(x, CIFAR10, seeded()))
