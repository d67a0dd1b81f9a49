"""Training batches: every sample once, by the seed's order, with the same images for every number of processes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatmin.data.augment import Augment, normalise
from flatmin.data.dataset import Data, Split
from flatmin.data.images import Statistics
from flatmin.train import feed as feeding
from flatmin.train.config import RunConfig, derive_seed
from flatmin.train.feed import Batch, Feed, steps_of
from flatmin.train.processes import World


def config(**changes):
    return RunConfig(**{"method": "sgd", "batch_size": 16, **changes})


USUAL = Augment(crop=2, cutout=4)


def images(n=50, *, augment=USUAL, side=8):
    """Bytes of 3 x 8 x 8 in 5 classes."""
    x = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part = Split(x, torch.arange(n) % 5)
    return Data(part, part, part, num_classes=5, statistics=Statistics.of(x), augment=augment)


def points(n=50):
    part = Split(torch.arange(4.0 * n).view(n, 4), torch.arange(n) % 5)
    return Data(part, part, part, num_classes=5)


def feed(data=None, *, rank=0, size=1, **changes):
    return Feed(images() if data is None else data, config(**changes), World(rank, size, rank))


def joined(batches):
    """Images, labels and indices of several batches."""
    return tuple(torch.cat([getattr(b, name) for b in batches]) for name in ("x", "y", "index"))


def same(one, two):
    return len(one) == len(two) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one, two, strict=True)
        for name in ("x", "y", "index")
    )


def whole(size, data=None, epochs=3, **changes):
    """The batches of all processes put together again, epoch by epoch."""
    feeds = [feed(data, rank=rank, size=size, **changes) for rank in range(size)]
    return [
        [Batch(*joined(shares)) for shares in zip(*(list(one.epoch()) for one in feeds), strict=True)]
        for _ in range(epochs)
    ]


class TestOrder:
    @pytest.mark.parametrize("data", [images(), points()], ids=["images", "points"])
    def test_every_sample_once_with_its_own_label(self, data):
        one = feed(data)
        orders = []
        for _ in range(3):
            x, y, index = joined(list(one.epoch()))
            assert sorted(index.tolist()) == list(range(50))
            assert torch.equal(y, data.train.y[index])
            assert len(x) == 50
            orders.append(index.tolist())
        assert len(set(map(tuple, orders))) == 3, "another order every epoch"

    def test_the_order_is_that_of_the_seed_and_of_nothing_else(self):
        torch.manual_seed(1)
        one = joined(list(feed(seed=3).epoch()))
        torch.manual_seed(2)
        two = joined(list(feed(images(augment=None), seed=3, batch_size=25).epoch()))
        assert torch.equal(one[2], two[2])
        assert not torch.equal(one[2], joined(list(feed(seed=4).epoch()))[2])
        expected = torch.randperm(50, generator=torch.Generator().manual_seed(derive_seed(3, "order")))
        assert torch.equal(one[2], expected)

    def test_the_global_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        list(feed().epoch())
        assert torch.equal(torch.get_rng_state(), before)

    def test_sizes(self):
        for n, size, drop_last, sizes in [
            (50, 16, False, [16, 16, 16, 2]),
            (50, 16, True, [16, 16, 16]),
            (48, 16, False, [16, 16, 16]),
            (48, 16, True, [16, 16, 16]),
            (50, 50, False, [50]),
            (50, 1, False, [1] * 50),
            (50, 49, False, [49, 1]),
            (50, 49, True, [49]),
        ]:
            one = feed(images(n), batch_size=size, drop_last=drop_last)
            assert [len(batch) for batch in one.epoch()] == sizes
            assert one.steps == steps_of(config(batch_size=size, drop_last=drop_last), n) == len(sizes)

    def test_what_is_left_out_changes(self):
        one = feed(drop_last=True)
        left = [set(range(50)) - set(joined(list(one.epoch()))[2].tolist()) for _ in range(4)]
        assert all(len(part) == 2 for part in left) and len(set(map(frozenset, left))) > 1


class TestImages:
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize(
        "augment",
        [Augment(crop=2, cutout=4), Augment(crop=0, cutout=0), Augment(crop=1, flip=False, cutout=3, cutout_p=1.0)],
    )
    def test_they_are_those_of_the_augmentation_by_hand(self, augment, channels_last):
        data = images(augment=augment)
        one = feed(data, channels_last=channels_last, seed=5)
        draws = torch.Generator().manual_seed(derive_seed(5, "augment"))
        for _ in range(2):
            for batch in one.epoch():
                expected = augment(data.train.x[batch.index], data.statistics, draws)
                assert torch.equal(batch.x, expected)
                assert batch.x.dtype == torch.float32
                assert batch.x.is_contiguous(
                    memory_format=torch.channels_last if channels_last else torch.contiguous_format
                )

    def test_without_augmentation_they_are_normalised(self):
        data = images(augment=None)
        for batch in feed(data).epoch():
            assert torch.equal(batch.x, normalise(data.train.x[batch.index], data.statistics))

    def test_other_inputs_are_as_they_are(self):
        data = points()
        for batch in feed(data).epoch():
            assert torch.equal(batch.x, data.train.x[batch.index])

    def test_the_data_stay_as_they_are(self):
        data = images()
        before = data.train.x.clone()
        for batch in feed(data).epoch():
            batch.x.zero_()
        assert torch.equal(data.train.x, before)

    def test_order_and_augmentation_are_drawn_apart(self):
        """A run with augmentation sees the samples in the order of one without."""
        orders = [[b.index.tolist() for b in feed(images(augment=one)).epoch()] for one in (None, Augment(crop=1))]
        assert orders[0] == orders[1]


class TestProcesses:
    @pytest.mark.parametrize("size", [2, 4, 8])
    def test_the_same_images_for_every_number(self, size):
        """50 = 3 * 16 + 2: of the last batch two processes have one each, four leave it out."""
        alone = whole(1)
        for one, several in zip(alone, whole(size), strict=True):
            assert same(one[:3], several[:3])
            assert len(several) == (4 if size == 2 else 3)
            assert same(one[3:], several[3:]) or size > 2

    @pytest.mark.parametrize(("n", "size", "steps"), [(55, 2, 4), (55, 4, 4), (49, 2, 3), (63, 16, 3), (64, 16, 4)])
    def test_a_last_batch_that_cannot_be_shared_evenly(self, n, size, steps):
        """What is left out of it changes nothing of what follows."""
        data = images(n)
        for one, several in zip(whole(1, data), whole(size, data), strict=True):
            assert len(several) == steps
            assert same(one[:3], several[:3])
            for a, b in zip(one[3:], several[3:], strict=False):
                kept = len(a) // size * size
                assert len(b) == kept
                assert torch.equal(a.index[:kept], b.index) and torch.equal(a.x[:kept], b.x)

    def test_shares_are_equal_and_follow_each_other(self):
        batches = [list(feed(rank=rank, size=4).epoch()) for rank in range(4)]
        assert {len(batch) for one in batches for batch in one} == {4}
        order = torch.randperm(50, generator=torch.Generator().manual_seed(derive_seed(0, "order")))
        assert [batches[rank][0].index.tolist() for rank in range(4)] == [part.tolist() for part in order[:16].split(4)]

    def test_dropping_the_last(self):
        for one, several in zip(whole(1, drop_last=True), whole(2, drop_last=True), strict=True):
            assert same(one, several)


class TestStart:
    @pytest.mark.parametrize("start", range(5))
    def test_what_comes_before_is_skipped_and_no_more(self, start):
        one, two = feed(), feed()
        assert same(list(one.epoch())[start:], list(two.epoch(start)))
        assert same(list(one.epoch()), list(two.epoch())), "and the next epoch is the same"

    @pytest.mark.parametrize("start", [0, 1, 3, 4])
    def test_from_the_state_inside_an_epoch(self, start):
        one = feed()
        list(one.epoch())
        epoch = one.epoch()
        seen = list(itertools.islice(epoch, start))
        state = one.state_dict(inside=True) if start else one.state_dict(inside=False)
        rest = list(epoch)
        two = feed()
        two.load_state_dict(state)
        assert same(rest, list(two.epoch(start)))
        assert len(seen) + len(rest) == 4
        assert same(list(one.epoch()), list(two.epoch()))

    def test_from_the_state_between_two_epochs(self):
        one, two = feed(), feed()
        list(one.epoch())
        two.load_state_dict(one.state_dict(inside=False))
        assert same(list(one.epoch()), list(two.epoch()))

    def test_a_state_is_a_copy(self):
        one = feed()
        state = one.state_dict(inside=False)
        first = list(one.epoch())
        list(one.epoch())
        one.load_state_dict(state)
        assert same(first, list(one.epoch()))


class TestAhead:
    """On a GPU several batches are made at once; here a CPU is told to."""

    @pytest.mark.parametrize("drop_last", [False, True])
    def test_the_same_batches_as_one_at_a_time(self, monkeypatch, drop_last):
        alone = feed(drop_last=drop_last)
        expected = [list(alone.epoch()) for _ in range(3)]
        for ahead in (32, 40, 48, 64, 4096):
            monkeypatch.setitem(feeding._AHEAD, "cpu", ahead)
            several = feed(drop_last=drop_last)
            assert all(same(one, list(several.epoch())) for one in expected), ahead

    @pytest.mark.parametrize("start", range(5))
    def test_from_any_start(self, monkeypatch, start):
        one = feed()
        expected = [list(one.epoch())[start:], list(one.epoch())]
        monkeypatch.setitem(feeding._AHEAD, "cpu", 32)
        two = feed()
        assert same(expected[0], list(two.epoch(start))) and same(expected[1], list(two.epoch()))

    @pytest.mark.parametrize("size", [2, 4])
    def test_in_several_processes(self, monkeypatch, size):
        data = images(55)
        expected = whole(size, data)
        monkeypatch.setitem(feeding._AHEAD, "cpu", 48)
        assert all(map(same, expected, whole(size, data)))

    @pytest.mark.parametrize("data", [images(augment=None), points()], ids=["images", "points"])
    def test_without_augmentation(self, monkeypatch, data):
        expected = list(feed(data).epoch())
        monkeypatch.setitem(feeding._AHEAD, "cpu", 4096)
        assert same(expected, list(feed(data).epoch()))

    def test_they_are_made_in_one_go(self, monkeypatch):
        monkeypatch.setitem(feeding._AHEAD, "cpu", 48)
        made = []
        apply = Augment.apply
        monkeypatch.setattr(Augment, "apply", lambda self, x, *a, **k: made.append(len(x)) or apply(self, x, *a, **k))
        assert len(list(feed().epoch())) == 4
        assert made == [48, 2]
        made.clear()
        list(feed().epoch(3))
        assert made == [2], "what comes before is drawn and not made"

    def test_a_batch_on_a_cpu_is_made_when_it_is_asked_for(self, monkeypatch):
        made = []
        apply = Augment.apply
        monkeypatch.setattr(Augment, "apply", lambda self, x, *a, **k: made.append(len(x)) or apply(self, x, *a, **k))
        epoch = feed().epoch()
        next(epoch)
        assert made == [16]


class TestAnyFeed:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_against_a_feed_by_hand(self, data):
        n = data.draw(st.integers(1, 40), label="samples")
        size = data.draw(st.sampled_from([one for one in (1, 2, 3, 4) if one <= n]), label="processes")
        batch = data.draw(st.sampled_from([b for b in range(size, n + 1) if b % size == 0]), label="batch")
        drop_last, ahead = data.draw(st.booleans(), label="drop_last"), data.draw(st.sampled_from((1, 7, 20, 100)))
        seed, start = data.draw(st.integers(0, 3), label="seed"), data.draw(st.integers(0, n), label="start")
        stock = images(n, side=4, augment=Augment(crop=1, cutout=2))
        order = torch.Generator().manual_seed(derive_seed(seed, "order"))
        augment = torch.Generator().manual_seed(derive_seed(seed, "augment"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(feeding._AHEAD, "cpu", ahead)
            feeds = [
                feed(stock, rank=r, size=size, batch_size=batch, drop_last=drop_last, seed=seed) for r in range(size)
            ]
            for epoch in range(2):
                begin = min(start, feeds[0].steps) if epoch else 0
                found = [list(one.epoch(begin)) for one in feeds]
                expected = []
                for part in torch.randperm(n, generator=order).split(batch):
                    if len(part) == batch or not drop_last:
                        expected.append((part, stock.augment(stock.train.x[part], stock.statistics, augment)))
                expected = [(part, x) for part, x in expected if len(part) >= size][begin:]
                assert [len(one) for one in found] == [len(expected)] * size
                for number, (part, x) in enumerate(expected):
                    got_x, _, index = joined([one[number] for one in found])
                    kept = len(part) // size * size
                    assert torch.equal(index, part[:kept]) and torch.equal(got_x, x[:kept])


class TestSplit:
    @pytest.mark.parametrize(
        ("n", "parts", "sizes"), [(16, 4, [4] * 4), (16, 3, [6, 5, 5]), (2, 4, [1, 1]), (3, 1, [3])]
    )
    def test_equal_parts(self, n, parts, sizes):
        batch = Batch(torch.arange(2.0 * n).view(n, 2), torch.arange(n), torch.arange(n) + 5)
        pieces = batch.split(parts)
        assert [len(piece) for piece in pieces] == sizes
        assert same([batch], [Batch(*joined(pieces))])


class TestRefused:
    def test_batches_that_cannot_be(self):
        for n, changes, size, words in [
            (50, {"batch_size": 51}, 1, r"^batch_size=51 is larger than the 50 training samples; use 50 or fewer\.$"),
            (50, {"batch_size": 51, "drop_last": True}, 1, r"^batch_size=51 is larger than the 50"),
            (50, {"batch_size": 15}, 2, r"^batch_size=15 cannot be divided evenly among 2 processes; use a mul"),
            (50, {"batch_size": 4}, 8, r"^batch_size=4 cannot be divided evenly among 8 processes"),
            (
                50,
                {"accumulate": 17},
                1,
                r"^accumulate=17 is more than the 16 samples of a batch in each process",
            ),
            (50, {"accumulate": 5}, 4, r"^accumulate=5 is more than the 4 samples of a batch"),
        ]:
            with pytest.raises(ValueError, match=words):
                feed(images(n), size=size, **changes)
