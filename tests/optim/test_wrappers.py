"""Wrappers of frameworks, and closures where a loop has run the passes already."""

import copy

import pytest
import torch
from torch import nn

import flatmin
from tests.helpers import ENTRY_POINTS, drive, same_bits
from tests.optim.loops import batch, closure_for, net, sgd, vector


class Wrapper:
    """As Lightning's and Fabric's: imitates the class of what it wraps, forwards reads, always steps with a closure."""

    def __init__(self, optimizer):
        self._optimizer, self.steps = optimizer, 0
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=None):
        self.steps += 1
        return self._optimizer.step(closure=(lambda: None) if closure is None else closure)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


@pytest.mark.parametrize("entry", ENTRY_POINTS)
@pytest.mark.parametrize("method", ("sam", "vasso", "looksam"))
def test_a_wrapper_that_imitates_the_class_has_every_entry_point(method, entry):
    """davda54/sam#31 and #42."""
    nets = [net() for _ in range(2)]
    inside = [flatmin.wrap(sgd(model), method, rho=0.1, model=model) for model in nets]
    wrapper = Wrapper(inside[0])
    wrapper.clip_norm, inside[1].clip_norm = 0.2, 0.2
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in (wrapper, inside[1])]
    for k in range(4):
        x, y = batch(k)
        for model, one, scheduler in zip(nets, (wrapper, inside[1]), schedulers, strict=True):

            def backward(model=model, x=x, y=y):
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            drive(one, backward, entry)
            scheduler.step()
    assert isinstance(wrapper, flatmin.SAM) and wrapper.steps == 4
    assert same_bits([*nets[0].parameters()], [*nets[1].parameters()])
    assert same_bits(inside[0].state_dict(), inside[1].state_dict()) and inside[0].clip_norm == 0.2
    assert set(vars(wrapper)) == {"_optimizer", "steps", "step"}, "the scheduler counts calls of the wrapper's step()"
    assert type(copy.deepcopy(wrapper)) is flatmin.SAM


def test_a_closure_after_the_passes_of_an_update():
    """One that computes nothing ends it, as Lightning's step() gives it; one that computes a loss is refused."""
    nets = [net() for _ in range(3)]
    opts = [flatmin.SAM(sgd(model), rho=0.1, model=model) for model in nets]
    for model, opt, closure in zip(nets, opts, (None, lambda: None, lambda: torch.zeros(())), strict=True):
        for evaluation in opt.passes():
            with evaluation:
                nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
        if opt is opts[2]:
            with pytest.raises(RuntimeError, match="the passes of this update are done"):
                opt.step(closure)
        else:
            assert opt.step(closure) is None
    assert torch.equal(vector(nets[0]), vector(nets[1])) and torch.equal(vector(nets[2]), vector(net()))
    with pytest.raises(RuntimeError, match=r"\(In Lightning, step\(\) without a closure passes an empty one"):
        opts[0].step(lambda: None)


def test_closures_between_train_and_eval():
    """The loop without passes may hand its backward over as a closure: it runs once, at w + eps."""
    nets = [net() for _ in range(2)]
    opts = [flatmin.wrap(sgd(model), "momentum-sam", rho=0.1, model=model) for model in nets]
    for opt in opts:
        opt.train()
    for k in range(3):
        closures = [closure_for(model, opt, *batch(k)) for model, opt in zip(nets, opts, strict=True)]
        loss = closures[0]()
        opts[0].step()
        assert torch.equal(opts[1].step(closures[1]), loss.detach()) and opts[1].loss_point == "w + eps"
    for opt in opts:
        opt.eval()
    assert torch.equal(vector(nets[0]), vector(nets[1]))
    opts[1].scaler = torch.amp.GradScaler("cpu")
    opts[1].train()
    with pytest.raises(RuntimeError, match="without a closure"):
        opts[1].step(closures[1])


def test_gradients_that_a_subclass_replaces_in_its_step_are_looked_at():
    """`second_step()` ends in `step()`, where frameworks clip by assigning gradients."""

    class Spoils(flatmin.SAM):
        def step(self, closure=None):
            for p in model.parameters():
                p.grad = p.grad * float("inf")
            return super().step(closure)

    model = nn.Linear(4, 2)
    optimizer = Spoils(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    x = torch.randn(8, 4)
    model(x).square().mean().backward()
    optimizer.first_step()
    model(x).square().mean().backward()
    optimizer.second_step()
    assert optimizer.counts()["skipped_steps"] == 1 and all(p.isfinite().all() for p in model.parameters())


def test_a_criterion_may_be_exchanged_between_updates_and_the_base_may_not():
    model = nn.Linear(4, 3)
    first, second = (flatmin.Criterion(nn.CrossEntropyLoss()) for _ in range(2))
    optimizer = flatmin.wrap(torch.optim.SGD(model.parameters(), lr=0.1), "bisam-log", criterion=first)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    optimizer.criterion = second

    def closure():
        optimizer.zero_grad()
        loss = second(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(TypeError, match=r"criterion must be a flatmin\.Criterion"):
        optimizer.criterion = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="bisam-log needs the loss"):
        optimizer.criterion = None
    for name in ("base", "recipe"):
        with pytest.raises(AttributeError):
            setattr(optimizer, name, None)


def test_an_update_is_under_way_until_the_base_has_stepped():
    """Hooks of the base's step are inside an update: what they would save is neither before nor after it."""
    model = nn.Linear(4, 2)
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    said = []

    def hook(*_):
        with pytest.raises(RuntimeError, match="an update is under way") as refused:
            optimizer.state_dict()
        said.append(refused)

    optimizer.base.register_step_post_hook(hook)
    x = torch.randn(8, 4)

    def closure(abort=False):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if abort:
            optimizer.abort()
        return loss

    optimizer.step(closure)
    with pytest.raises(RuntimeError, match=r"the closure called abort\(\)"):
        optimizer.step(lambda: closure(abort=True))
    optimizer.step(closure)
    assert len(said) == 2 and optimizer.state_dict()["param_groups"][0]["flatmin.step"] == 2
