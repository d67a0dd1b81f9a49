"""Which optimizers may be a base: every one of torch, and others by what their step does."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.common_optimizers import optim_db

import flatmin
from tests.helpers import sam_by_hand

# Importing torch's test harness forbids to set flags of torch.backends, which the tests of runs do.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True
RHO, STEPS = 0.05, 3


def net(sparse=False):
    torch.manual_seed(0)
    if sparse:
        return nn.Embedding(6, 4, sparse=True)
    return nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))


def backward(model, k):
    draws = torch.Generator().manual_seed(k)
    if isinstance(model, nn.Embedding):
        loss = model(torch.randint(6, (8,), generator=draws)).square().sum()
    else:
        loss = F.cross_entropy(model(torch.randn(8, 4, generator=draws)), torch.randint(3, (8,), generator=draws))
    loss.backward()
    return loss


def closure(model, optimizer, k):
    def run():
        optimizer.zero_grad()
        return backward(model, k)

    optimizer.step(run)


def perturbed(model, optimizer, k):
    optimizer.zero_grad()
    backward(model, k)
    with optimizer.perturbed():
        backward(model, k)
    optimizer.step()


def two_calls(model, optimizer, k):
    backward(model, k)
    optimizer.first_step(zero_grad=True)
    backward(model, k)
    optimizer.second_step(zero_grad=True)


def passes(model, optimizer, k):
    for evaluation in optimizer.passes():
        with evaluation:
            backward(model, k)
    optimizer.step()


def silent(model, optimizer, k):
    """The gradients are there, and the closure calls no backward."""
    optimizer.zero_grad()
    loss = backward(model, k)
    optimizer.step(lambda: loss)


ENTRY_POINTS = [closure, perturbed, two_calls, passes]
BASES = {
    info.optim_cls: [given.kwargs for given in info.optim_inputs_func(device="cpu")]
    for info in optim_db
    if info.optim_cls is not torch.optim.LBFGS
}


@pytest.mark.parametrize("cls", BASES, ids=lambda cls: cls.__name__)
def test_every_optimizer_of_torch_is_a_base(cls):
    """By torch's own list of its optimizers and their options."""
    for options in BASES[cls]:
        is_a_base(cls, options)


def is_a_base(cls, options):
    sparse = cls is torch.optim.SparseAdam
    options = {"lr": 0.01} | options if "lr" not in options and cls is torch.optim.SGD else options

    def train(rho, drive):
        model = net(sparse)
        optimizer = flatmin.SAM(cls(list(model.parameters()), **copy.deepcopy(options)), rho=rho)
        for k in range(STEPS):
            drive(model, optimizer, k)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    model = net(sparse)
    base = cls(list(model.parameters()), **copy.deepcopy(options))
    for k in range(STEPS):
        base.zero_grad()
        backward(model, k)
        base.step()
    plain = torch.cat([p.detach().flatten() for p in model.parameters()])
    for drive in (*ENTRY_POINTS, silent):
        assert torch.equal(train(0.0, drive), plain), (options, drive.__name__)
    if options.get("maximize"):
        with pytest.raises(
            ValueError, match=r"^sam perturbs the weights towards a higher loss, .*maximize=True; minimise"
        ):
            train(RHO, closure)
        return

    model = net(sparse)
    base = cls(list(model.parameters()), **copy.deepcopy(options))
    for k in range(STEPS):
        sam_by_hand(model.parameters(), RHO, lambda k=k: backward(model, k), base)
    right = torch.cat([p.detach().flatten() for p in model.parameters()])
    for drive in ENTRY_POINTS:
        torch.testing.assert_close(train(RHO, drive), right, rtol=1e-5, atol=1e-6)


def test_a_base_keeps_an_option_called_rho_and_the_radius_has_a_name_of_its_own():
    """torch.optim.Adadelta's rho is its decay."""
    model = net()
    base = torch.optim.Adadelta(model.parameters(), lr=0.5, rho=0.8)
    optimizer = flatmin.SAM(base, rho=0.1)
    assert optimizer.rho_key == "flatmin.rho"
    assert (base.param_groups[0]["rho"], base.param_groups[0]["flatmin.rho"]) == (0.8, 0.1)
    closure(model, optimizer, 0)
    plain = flatmin.base_state_dict(optimizer.state_dict())
    assert plain["param_groups"][0]["rho"] == 0.8 and "flatmin.rho" not in plain["param_groups"][0]
    twin = net()
    alone = torch.optim.Adadelta(twin.parameters())
    alone.load_state_dict(plain)
    backward(twin, 1)
    alone.step()
    optimizer.load_state_dict(plain)
    assert optimizer.param_groups[0]["flatmin.rho"] == 0.1
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert optimizer.param_groups[1]["flatmin.rho"] == 0.1


def test_an_explicit_radius_goes_before_what_an_earlier_wrapper_filled_in_and_not_before_a_users_own():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([{"params": [a], "rho": 0.3}, {"params": [b]}], lr=0.1)
    flatmin.SAM(base, rho=0.1)
    for group in base.param_groups[1:]:
        group["rho"] = 0.01  # a scheduler
    flatmin.SAM(base)
    assert [g["rho"] for g in base.param_groups] == [0.3, 0.01]
    flatmin.SAM(base, rho=0.2)
    assert [g["rho"] for g in base.param_groups] == [0.3, 0.2]


class Polyak(torch.optim.Optimizer):
    """A step of the loss's size, which it asks of the closure."""

    def __init__(self, params, moves_first=False):
        super().__init__(params, {})
        self.moves_first = moves_first

    @torch.no_grad()
    def step(self, closure):
        weights = self.param_groups[0]["params"]
        if self.moves_first:
            torch._foreach_mul_(weights, 0.9)
        loss = closure()
        torch._foreach_add_(weights, [w.grad for w in weights], alpha=-0.1 * float(loss))
        return loss


def test_a_base_that_asks_for_the_loss_gets_that_of_the_step_without_another_pass():
    """AliG and other Polyak step sizes."""
    model, twin = net(), net()
    optimizer, calls = flatmin.SAM(Polyak(model.parameters()), rho=RHO), 0

    def run():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        return backward(model, 0)

    loss = optimizer.step(run)
    losses = []
    base = Polyak(twin.parameters())
    base.step, step = lambda: step(lambda: losses[0]), base.step
    sam_by_hand(twin.parameters(), RHO, lambda: losses.append(backward(twin, 0).detach()), base)
    assert calls == 2 and torch.equal(loss, losses[0])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"step of Polyak needs the loss: use optimizer.step\(closure\)"):
        perturbed(model, optimizer, 1)
    with pytest.raises(RuntimeError, match="Polyak moves the weights before it calls the closure"):
        closure(twin, flatmin.SAM(Polyak(twin.parameters(), moves_first=True), rho=RHO), 0)


class SecondOrder(torch.optim.SGD):
    """Differentiates its gradients once more, as AdaHessian does."""

    @torch.enable_grad()
    def step(self, closure=None, hessian=None):
        for w in self.param_groups[0]["params"]:
            (h,) = torch.autograd.grad(w.grad.sum(), w, retain_graph=True)
            w.grad = w.grad.detach() / (1 + h.abs())
        super().step()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_base_that_differentiates_the_gradients_has_their_graph_at_rho_0_and_is_refused_above():
    model, twin = net(), net()
    with pytest.raises(ValueError, match=r"SecondOrder differentiates the gradients again.*only with rho = 0"):
        flatmin.SAM(SecondOrder(model.parameters(), lr=0.1), rho=RHO)
    optimizer = flatmin.SAM(SecondOrder(model.parameters(), lr=0.1), rho=0.0)
    base = SecondOrder(twin.parameters(), lr=0.1)
    x = torch.randn(8, 4)

    def run():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        optimizer.backward(loss)
        return loss

    optimizer.step(run)
    twin(x).square().mean().backward(create_graph=True)
    base.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


class ScheduleFree(torch.optim.SGD):
    """Evaluates at an average of its weights: train() and eval() go from one to the other."""

    mode = "eval"

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"

    def step(self, closure=None):
        assert self.mode == "train"
        return super().step(closure)


@pytest.mark.parametrize("method", ["sam", "momentum-sam"])
def test_train_and_eval_reach_a_base_that_has_them(method):
    """huggingface/accelerate#2631 and #4161, kozistr/pytorch_optimizer#334."""
    model = net()
    base = ScheduleFree(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = flatmin.wrap(base, method, rho=RHO)
    optimizer.train()
    if method == "sam":
        closure(model, optimizer, 0)
    else:
        backward(model, 0)
        optimizer.step()
    optimizer.eval()
    assert base.mode == "eval"
    optimizer.train()
    assert base.mode == "train"


class OwnForm(torch.optim.SGD):
    """Keeps slow weights beside its steps, and saves them in a form of its own, as Lookahead does."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.slow = [w.detach().clone() for w in self.param_groups[0]["params"]]

    def step(self, closure=None):
        super().step()
        for w, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
            slow.lerp_(w.detach(), 0.5)
            w.data.copy_(slow)

    def state_dict(self):
        return {"inner": super().state_dict(), "slow": self.slow}

    def load_state_dict(self, state):
        super().load_state_dict(state["inner"])
        self.slow = [x.clone() for x in state["slow"]]


@pytest.mark.parametrize("method", ["sam", "vasso", "looksam"])
def test_a_base_with_its_own_form_of_state_dict_is_resumed(method):
    """kozistr/pytorch_optimizer's Lookahead; chains of optimizers."""
    model = net()
    make = lambda m: flatmin.wrap(OwnForm(m.parameters(), lr=0.1, momentum=0.9), method, rho=0.1)  # noqa: E731
    optimizer = make(model)
    for k in range(3):
        closure(model, optimizer, k)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    weights, state = torch.load(io.BytesIO(file.getvalue()))
    twin = net()
    twin.load_state_dict(weights)
    again = make(twin)
    again.load_state_dict(state)
    for k in range(3, 6):
        closure(model, optimizer, k)
        closure(twin, again, k)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    plain = OwnForm(net().parameters(), lr=0.3)
    plain.load_state_dict(flatmin.base_state_dict(state))
    again.load_state_dict(plain.state_dict())
    assert again.param_groups[0]["rho"] == 0.1


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("perturb", "sharpness-aware optimizer itself"),
        ("first_step", "sharpness-aware optimizer itself"),
        ("fused_backward", "updates the weights during the backward pass"),
    ],
)
def test_what_cannot_be_a_base_is_refused_by_its_class(extra, sentence):
    cls = type("Odd", (torch.optim.SGD,), {extra: lambda self: None})
    with pytest.raises(TypeError, match=f"Odd .*{sentence}"):
        flatmin.SAM(cls(net().parameters(), lr=0.1))


def test_options_of_the_single_file_form_reach_the_base():
    """davda54/sam: SAM(params, Adam, eps=...), and `adaptive` of a param group."""
    model = net()
    optimizer = flatmin.SAM(model.parameters(), torch.optim.Adam, rho=0.05, lr=1e-3, eps=1e-3)
    assert optimizer.base.param_groups[0]["eps"] == 1e-3 and optimizer.eps == 1e-12
    assert flatmin.SAM(model.parameters(), torch.optim.SGD, lr=0.1, eps=1e-6).eps == 1e-6
    a, b = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = flatmin.SAM([{"params": [a], "adaptive": True}, {"params": [b]}], torch.optim.SGD, rho=0.1, lr=0.0)
    (a @ torch.tensor([1.0, 2.0]) + b.sum()).backward()
    optimizer.first_step()
    size = torch.tensor([3.0, 8.0, 1.0, 1.0]).norm()  # |w| g where adaptive, g elsewhere
    moved = torch.cat([a - torch.tensor([3.0, 4.0]), b - torch.tensor([1.0, 2.0])])
    torch.testing.assert_close(moved, 0.1 * torch.tensor([9.0, 32.0, 1.0, 1.0]) / size)
    optimizer.abort()
    with pytest.raises(ValueError, match=r"adaptive=True needs a recipe with 'asam'"):
        flatmin.SAM([{"params": [a], "adaptive": True}], torch.optim.SGD, recipe="vasso", lr=0.1)
    with pytest.raises(ValueError, match="differ in adaptive but share one norm: pass rho="):
        flatmin.SAM([{"params": [a], "adaptive": True}, {"params": [b]}], torch.optim.SGD, lr=0.1)
