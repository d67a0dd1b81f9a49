"""A radius in proportion to the learning rate: never above rho, whichever schedule sets the rate.

The reference is the rule itself, from the rates that the schedule gave and the largest one that it tells.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR

import flatmin
from tests.helpers import same_bits

RHO, STEPS, LRS = 0.05, 24, (0.1, 0.02)


def one_cycle(o):
    return schedules.OneCycleLR(o, max_lr=[0.5, 0.2], total_steps=STEPS + 1)


def cyclic(o):
    return schedules.CyclicLR(o, base_lr=[0.01, 0.02], max_lr=[0.2, 0.1], step_size_up=4)


def warm_up_then_cosine(o):
    return schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=5), schedules.CosineAnnealingLR(o, 20)], milestones=[5]
    )


def chained(o):
    return schedules.ChainedScheduler([schedules.ConstantLR(o, 0.2, total_iters=4), schedules.ExponentialLR(o, 0.9)])


def from_zero(o):
    return schedules.LambdaLR(o, lambda k: min(k / 10, 1.0) * 0.95**k)


# The schedule, the largest rate of each group that it tells from the start, and whether it rises above that.
SCHEDULES = {
    "one cycle": (one_cycle, (0.5, 0.2), False),
    "warm-up, cosine": (warm_up_then_cosine, LRS, False),
    "warm-up from zero": (from_zero, LRS, False),
    "chained": (chained, LRS, False),
    "plateau": (lambda o: schedules.ReduceLROnPlateau(o, patience=2), (0.0, 0.0), False),
    "cyclic": (cyclic, (0.01, 0.02), True),
    "growing": (lambda o: schedules.LambdaLR(o, lambda k: 1 + k / 5), LRS, True),
    "SWA": (lambda o: SWALR(o, swa_lr=0.3, anneal_epochs=10), LRS, True),
}


class Run:
    """Two weights in groups of their own, with a gradient of length 1, so that each eps can be read off."""

    def __init__(self, make, recipe="rho-lr", *, on_base=False, **params):
        self.weights = [nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in LRS]
        groups = [{"params": [w], "lr": lr} for w, lr in zip(self.weights, LRS, strict=True)]
        base = torch.optim.SGD(groups, momentum=0.9)
        if on_base:
            self.scheduler = make(base)
        self.optimizer = flatmin.wrap(base, recipe, rho=RHO, **params)
        if not on_base:
            self.scheduler = make and make(self.optimizer)

    def steps(self, count):
        """(rate, ||eps||) of each group at each update."""
        seen = []
        for _ in range(count):
            at = []

            def closure(at=at):
                at.append([w.detach().clone() for w in self.weights])
                self.optimizer.zero_grad()
                loss = sum(w.sum() for w in self.weights) / 6**0.5
                loss.backward()
                return loss

            rates = [float(g["lr"]) for g in self.optimizer.param_groups]
            self.optimizer.step(closure)
            seen.append(
                [(lr, float((moved - w).norm()) * 2**0.5) for lr, w, moved in zip(rates, at[0], at[-1], strict=True)]
            )
            if isinstance(self.scheduler, schedules.ReduceLROnPlateau):
                self.scheduler.step(1.0)
            elif self.scheduler is not None:
                self.scheduler.step()
        return seen

    def save(self):
        parts = (self.optimizer.state_dict(), self.scheduler.state_dict(), [w.detach() for w in self.weights])
        return copy.deepcopy(parts)

    def load(self, saved):
        self.optimizer.load_state_dict(saved[0])
        self.scheduler.load_state_dict(saved[1])
        for w, value in zip(self.weights, saved[2], strict=True):
            w.data.copy_(value)


def assert_follows(seen, told):
    """||eps|| = rho lr / lr_max, lr_max the largest rate that was told or used up to then."""
    highest = list(told)
    for step in seen:
        for i, (lr, length) in enumerate(step):
            highest[i] = max(highest[i], lr)
            assert length == pytest.approx(RHO * lr / highest[i], rel=1e-9, abs=1e-15)
            assert length <= RHO * (1 + 1e-12)


@pytest.mark.parametrize(
    ("name", "on_base"),
    [*((name, len(name) % 2 == 0) for name in SCHEDULES), ("one cycle", True)],
)
def test_the_radius_follows_the_rate_and_never_exceeds_rho(name, on_base):
    """juntang-zhuang/GSAM ties rho to lr; OneCycleLR starts at a 25th of its largest rate. Resumed bit for bit."""
    make, told, rises = SCHEDULES[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Run(make, on_base=on_base)
        first = run.steps(10)
        saved = run.save()
        rest = run.steps(STEPS - 10)
    risen = [str(w.message) for w in caught if "learning rate has risen" in str(w.message)]
    assert len(risen) == (len(LRS) if rises else 0)
    assert all("peak=" in text and "group['max_lr']" in text for text in risen)
    assert_follows(first + rest, told)
    again = Run(make, on_base=on_base)
    again.load(saved)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "rho-lr")  # it has been said
        assert again.steps(STEPS - 10) == rest
    assert same_bits(again.optimizer.state_dict(), run.optimizer.state_dict())


def test_a_rate_set_by_hand_is_followed():
    """Without a scheduler: down in proportion, up with radius rho and one warning, and a base checkpoint forgets."""
    run = Run(None)
    rates = [0.1, 0.05, 0.02, 0.2, 0.4, 0.1]
    seen = []
    with pytest.warns(UserWarning, match=r"risen to 0\.2, above .* \(0\.1\)") as caught:
        for rate in rates:
            for group in run.optimizer.param_groups:
                group["lr"] = torch.tensor(rate, dtype=torch.float64)
            seen += run.steps(1)
    assert len(caught) == len(LRS)
    assert_follows(seen, (0.0, 0.0))
    run.optimizer.load_state_dict(flatmin.base_state_dict(run.optimizer.state_dict()))
    assert run.steps(1)[0][0][1] == pytest.approx(RHO)


@pytest.mark.parametrize("say", ["peak", "max_lr"])
def test_a_peak_that_is_given_is_followed_from_the_start(say):
    """CyclicLR tells its largest rate nowhere, and LambdaLR over lr = 1 never reaches the one that it tells."""
    peaks = (0.2, 0.2) if say == "peak" else (0.2, 0.1)
    run = Run(cyclic, **({"peak": 0.2} if say == "peak" else {}))
    if say == "max_lr":
        for group, peak in zip(run.optimizer.param_groups, peaks, strict=True):
            group["max_lr"] = peak
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_follows(run.steps(STEPS), peaks)


def test_plain_steps_count_as_well():
    """The rates of steps without ascent are part of the schedule: composer's interval ascends on every second one."""
    rates = iter([0.4, 0.1, 0.1, 0.2])
    run = Run(None, "every-k+rho-lr", k=2, phase=1)
    seen = []
    for rate in rates:
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        seen += run.steps(1)
    lengths = [step[0][1] for step in seen]
    assert lengths == pytest.approx([0.0, RHO / 4, 0.0, RHO / 2])


@pytest.mark.parametrize("recipe", ["rho-lr", "gsam+rho-lr", "wsam"])
def test_a_group_without_a_learning_rate_is_refused(recipe):
    """As Adafactor's with lr=None (huggingface/transformers)."""
    base = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    base.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match=r"needs the learning rate .*lr=None.*group\['lr'\]"):
        flatmin.wrap(base, recipe)
    base.param_groups[0]["lr"] = 0.1
    optimizer = flatmin.wrap(base, recipe)
    (w,) = base.param_groups[0]["params"]
    before = w.detach().clone()
    base.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="lr=None"):
        optimizer.step(lambda: (optimizer.zero_grad(), (loss := w.square().sum()).backward(), loss)[2])
    assert torch.equal(w, before)
