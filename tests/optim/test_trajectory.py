"""The references of the trajectory loss: an average of the weights (MESA) and recorded logits (SAF), in any method."""

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flatmin
from flatmin.methods.losses import trajectory
from flatmin.optim import RecordedLogits, WeightAverage

EPOCHS, BATCHES, LAM = 6, 2, 0.5
KINDS = ("mesa", "saf")


def net(**to):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype=torch.float64, **to)


def batch(k):
    g = torch.Generator().manual_seed(k)
    x = torch.randn(6, 4, generator=g, dtype=torch.float64)
    return 6 * k + torch.arange(6), x, torch.randint(3, (6,), generator=g)


class Run:
    """A training with the trajectory loss from epoch 2 on; `seen` has the reference of every pass."""

    def __init__(self, kind, method="sam", lam=LAM):
        self.kind, self.lam, self.model = kind, lam, net()
        base = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.optimizer = flatmin.wrap(base, method, rho=0.1, model=self.model)
        self.teacher = WeightAverage(self.model, 0.6)
        self.memory = RecordedLogits(6 * BATCHES, 3, epochs=2, dtype=torch.float64)
        self.seen, self.outputs = [], []

    def loss(self, index, x, y, epoch):
        z = self.model(x)
        loss = F.cross_entropy(z, y)
        if epoch >= 2 and self.lam is not None:
            r, known = (self.teacher(x), None) if self.kind == "mesa" else self.memory(index, epoch)
            self.seen.append(r)
            self.outputs.append(z.detach())
            loss = loss + self.lam * trajectory(z, r, known=known)
        self.memory.record(index, z, epoch)
        return loss

    def go(self, start=0, end=EPOCHS):
        for epoch in range(start, end):
            for k in range(BATCHES):
                torch.manual_seed(100 * epoch + k)

                def closure(k=k, epoch=epoch):
                    self.optimizer.zero_grad()
                    loss = self.loss(*batch(k), epoch)
                    loss.backward()
                    return loss

                self.optimizer.step(closure)
                self.teacher.update()
        return self

    def parts(self):
        return self.model, self.optimizer, self.teacher, self.memory


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_of_an_update_has_the_same_reference(kind):
    run = Run(kind).go()
    firsts, seconds = run.seen[::2], run.seen[1::2]
    assert len(firsts) == (EPOCHS - 2) * BATCHES
    assert all(map(torch.equal, firsts, seconds))
    assert not any(map(torch.equal, run.outputs[::2], run.outputs[1::2]))
    assert not any(map(torch.equal, firsts, firsts[BATCHES:]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_lam_0_is_the_training_without_the_term_bit_for_bit(kind, method):
    without, zero, one = (Run(kind, method, lam).go() for lam in (None, 0.0, LAM))
    assert same(without, zero) and not same(without, one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [2, 5])
def test_a_resumed_training_is_the_same_bit_for_bit(kind, end):
    whole, first, second = Run(kind).go(), Run(kind).go(0, end), Run(kind)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first.parts()], file)
    file.seek(0)
    for part, state in zip(second.parts(), torch.load(file), strict=True):
        part.load_state_dict(state)
    assert same(whole, second.go(end, EPOCHS))


def test_a_step_of_sam_with_the_term_is_the_formula():
    """eps and the descent gradient are those of CE + lam * trajectory with one r."""
    torch.manual_seed(1)
    x, y, r = torch.randn(6, 4), torch.randint(3, (6,)), torch.randn(6, 3)
    w = torch.randn(3, 4)

    def gradient(v):
        v = v.clone().requires_grad_()
        z = x @ v.T
        kl = (F.softmax(r / 5, 1) * (F.log_softmax(r / 5, 1) - F.log_softmax(z / 5, 1))).sum(1).mean()
        return torch.autograd.grad(F.cross_entropy(z, y) + LAM * 25 * kl, v)[0]

    g = gradient(w)
    wanted = w - 0.1 * gradient(w + 0.2 * g / g.norm())
    v = w.clone().requires_grad_()
    optimizer = flatmin.SAM(torch.optim.SGD([v], lr=0.1), rho=0.2)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ v.T, y) + LAM * trajectory(x @ v.T, r)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(v.detach(), wanted)


# -- the averaged teacher -----------------------------------------------------------------------------------------


def test_the_teacher_answers_with_the_average_of_weights_and_statistics_in_eval_mode():
    model, index = net(), 0
    teacher = WeightAverage(model, 0.75)
    with pytest.raises(RuntimeError, match="no average yet"):
        teacher(batch(0)[1])
    kept = []
    for index in range(4):
        with torch.no_grad():
            model(batch(index)[1])
            model[0].weight.add_(index)
        kept.append({name: t.clone() for name, t in model.state_dict().items()})
        teacher.update()
    wanted = {
        name: kept[0][name] * 0.75**3 + sum(0.25 * 0.75 ** (3 - k) * kept[k][name] for k in (1, 2, 3))
        if kept[0][name].is_floating_point()
        else kept[3][name]
        for name in kept[0]
    }
    other, x = net(), batch(9)[1]
    other.load_state_dict(wanted)
    before, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    answer = teacher(x)
    torch.testing.assert_close(answer, other.eval()(x))
    assert not answer.requires_grad and all(module.training for module in model.modules())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_the_average_of_bf16_weights_does_not_round_away():
    model = nn.Linear(2, 2, bias=False).bfloat16()
    teacher = WeightAverage(model, 0.9998)
    with torch.no_grad():
        for k in range(101):
            model.weight.fill_(float(k > 0))
            teacher.update()
    assert abs(float(teacher.state_dict()["weight"].mean()) - (1 - 0.9998**100)) < 1e-6
    assert teacher(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_teacher_of_tied_weights_and_in_a_manual_loop_with_dropout():
    """A forward of the teacher in one of the passes draws nothing and is not taken for a forward of the loop."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.drop = nn.Linear(3, 3), nn.Linear(3, 3), nn.Dropout(0.5)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.drop(self.a(x)))

    def train(ask):
        torch.manual_seed(0)
        model, x, y = Tied(), torch.randn(8, 3), torch.randint(3, (8,))
        optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
        teacher = WeightAverage(model, 0.5)
        teacher.update()
        for _ in range(3):
            optimizer.zero_grad()
            r = teacher(x) if ask else None
            F.cross_entropy(model(x), y).backward()
            with optimizer.perturbed():
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
            teacher.update()
        assert r is None or (r - model.eval()(x)).abs().max() > 0
        return model

    for a, b in zip(train(False).parameters(), train(True).parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_teacher_says_what_it_takes(monkeypatch):
    for decay in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=r"decay must be in \(0, 1\), got"):
            WeightAverage(net(), decay)
    monkeypatch.setattr("flatmin.optim.average.is_sharded", lambda t: True)
    with pytest.raises(RuntimeError, match=r"the weights are sharded, .* train with DDP"):
        WeightAverage(net(), 0.5)(batch(0)[1])


def test_the_average_follows_tensors_that_are_replaced():
    """By another dtype, by assignment and by load_state_dict(assign=True); one of another shape starts over."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False))
    teacher = WeightAverage(model, 0.5)

    def update(value):
        with torch.no_grad():
            model[0].weight.fill_(value)
        teacher.update()
        return float(teacher.state_dict()["0.weight"])

    assert update(8.0) == 8
    model.double()
    model[1].running_mean = torch.full((1,), 4.0, dtype=torch.float64)
    assert update(0.0) == 4 and float(teacher.state_dict()["1.running_mean"]) == 2
    assert teacher(torch.ones(2, 1, dtype=torch.float64)).dtype == torch.float64
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    assert update(0.0) == 2
    with teacher.applied():
        assert model[0].weight.item() == 2
    assert model[0].weight.item() == 0
    model[0].weight = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))
    teacher.update()
    assert teacher.state_dict()["0.weight"].tolist() == [[1, 1]]


def test_a_forward_that_writes_to_buffers_and_a_kept_state_leave_the_averages():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
            self.register_buffer("n", torch.zeros(()))
            self.register_buffer("m", torch.zeros(()), persistent=False)

        def forward(self, x):
            self.n += 1
            self.m += 1
            return self.w * x + self.n

    model = Counting()
    teacher = WeightAverage(model, 0.5)
    teacher.update()
    kept = teacher.state_dict()
    assert [float(teacher(torch.zeros(1))) for _ in range(2)] == [1, 1] and float(model.n) == float(model.m) == 0
    model(torch.zeros(1))
    teacher.update()
    assert float(kept["n"]) == 0 and float(teacher.state_dict()["n"]) == 0.5


def test_averages_that_are_loaded_fit_the_model_and_are_kept_wide():
    model = nn.Linear(2, 2).bfloat16()
    teacher = WeightAverage(model, 0.9998)
    teacher.load_state_dict({name: torch.zeros_like(t) for name, t in model.state_dict().items()})
    for _ in range(100):
        teacher.update()
    # Steps of 0.0002 round away in bf16.
    assert {t.dtype for t in teacher.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(teacher.state_dict()["bias"], (1 - 0.9998**100) * model.bias.detach().float())
    words = r"missing: bias; unknown: scale; of another shape: weight \(3, 2\) for \(2, 2\)"
    with pytest.raises(ValueError, match=words):
        teacher.load_state_dict({"weight": torch.zeros(3, 2), "scale": torch.zeros(2)})


# -- recorded logits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("age", [1, 3])
def test_a_record_is_that_of_so_many_epochs_ago_or_unknown(age):
    """Against a dict of all records, with samples that are missing in some epochs and come twice in others."""
    g, memory, kept = torch.Generator().manual_seed(0), RecordedLogits(5, 2, epochs=age), {}
    for epoch in range(9):
        for _ in range(3):
            index, z = torch.randperm(5, generator=g)[:2], torch.randn(2, 2, generator=g)
            r, known = memory(index, epoch)
            for i, row, there in zip(index.tolist(), r, known.tolist(), strict=True):
                assert there == ((i, epoch - age) in kept)
                assert torch.equal(row, kept.get((i, epoch - age), torch.zeros(2)))
            memory.record(index, z, epoch)
            again, _ = memory(index, epoch)
            assert torch.equal(again, r)
            for i, row in zip(index.tolist(), z, strict=True):
                kept.setdefault((i, epoch), row)
    assert len(kept) > 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_that_are_not_finite_leave_a_sample_without_a_record_in_this_epoch(dtype):
    """In the precision that is kept; the logits of a later pass, at w + eps, do not stand in for them."""
    memory, large = RecordedLogits(2, 2, epochs=1, dtype=dtype), torch.nan if dtype == torch.float32 else 1e5
    memory.record(torch.arange(2), torch.tensor([[0.0, large], [1.0, 2.0]]), 0)
    memory.record(torch.arange(2), torch.tensor([[7.0, 7.0], [7.0, 7.0]]), 0)
    r, known = memory(torch.arange(2), 1)
    assert known.tolist() == [False, True] and r.tolist() == [[0, 0], [1, 2]]
    kept = memory.state_dict()
    for epoch in (1, 2):
        memory.record([0, 1], torch.full((2, 2), float(epoch)), epoch)
        assert memory([0, 1], epoch + 1)[1].tolist() == [True, True]
    assert kept["logits"][0].tolist() == [[0, 0], [1, 2]]
    assert memory(1, 3)[0].tolist() == [[2, 2]] == memory(torch.tensor(1), 3)[0].tolist()


def test_recorded_logits_say_what_they_take(monkeypatch):
    memory = RecordedLogits(3, 2)
    for words, call in {
        "samples must be at least 1, got 0": lambda: RecordedLogits(0, 2),
        "epochs must be at least 1, got 0": lambda: RecordedLogits(3, 2, epochs=0),
        "from 0 to 2, got -1 to 1": lambda: memory(torch.tensor([1, -1]), 0),
        "from 0 to 2, got 3 to 3": lambda: memory.record(torch.tensor([3]), torch.zeros(1, 2), 0),
        r"indices of shape \(B,\), got \(1, 1\)": lambda: memory([[0]], 0),
        "counted from 0, got -1": lambda: memory(torch.tensor([0]), -1),
        r"logits of shape \(1, 2\), got \(1, 3\)": lambda: memory.record(torch.tensor([0]), torch.zeros(1, 3), 0),
        r"of shape \(4, 5, 2\)": lambda: memory.load_state_dict(RecordedLogits(5, 2).state_dict()),
    }.items():
        with pytest.raises((ValueError, IndexError), match=words):
            call()
    for index in (torch.tensor([True, False, True]), torch.tensor([0.0])):
        with pytest.raises(TypeError, match="expected sample indices that are whole numbers, got torch"):
            memory(index, 0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"pass own_samples=True, or train with MESA"):
        RecordedLogits(3, 2)
    assert RecordedLogits(3, 2, own_samples=True).epochs == 3
