"""The loops of docs/loops/several-networks.md train as a loop of SAM written by hand does."""

import re
from pathlib import Path

import pytest
import torch

import flatmin
from tests.helpers import sam_by_hand

PAGE = (Path(__file__).parents[2] / "docs/loops/several-networks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def page():
    """Runs the page up to a block, and that block on batches, or on none: the networks as its loop finds them."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)

    def run(word, batches):
        torch.manual_seed(0)
        loader = [(torch.randn(12, 6), torch.randint(3, (12,))) for _ in range(3)]
        names = {"torch": torch, "flatmin": flatmin, "loss_fn": torch.nn.CrossEntropyLoss(), "loader": []}
        (last,) = (k for k, block in enumerate(BLOCKS) if word in block)
        for block in BLOCKS[:last]:
            exec(compile(block, "page", "exec"), names)
        names["loader"] = loader if batches else []
        torch.manual_seed(1)
        exec(compile(BLOCKS[last], "page", "exec"), names)
        return names, loader

    yield run
    torch.set_default_dtype(default)


def once(state, backward):
    """A pass that is run twice, on the same random numbers, and advances these tensors once."""
    generator, first = torch.get_rng_state(), None

    def run():
        nonlocal first
        if first is None:
            backward()
            first = [x.clone() for x in state]
            return
        torch.set_rng_state(generator)
        backward()
        for x, then in zip(state, first, strict=True):
            x.copy_(then)

    return run


def hand(parameters, rho, loss, base, *modules):
    sam_by_hand(parameters, rho, once([b for m in modules for b in m.buffers()], lambda: loss().backward()), base)


def same(a, b):
    for x, y in zip([*a.parameters(), *a.buffers()], [*b.parameters(), *b.buffers()], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("word", "at_w"),
    [("# or in the closure", False), ("with sam.perturbed()", True), ("sam.first_step", False)],
)
def test_a_plain_head_takes_one_gradient(page, word, at_w):
    ours, _ = page(word, True)
    right, loader = page(word, False)
    net, backbone, head = right["model"], right["backbone"], right["head"]
    base = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    plain = torch.optim.SGD(head.parameters(), lr=0.01)
    for x, y in loader:
        grads = []

        def loss(x=x, y=y, grads=grads):
            value = right["loss_fn"](net(x), y)
            grads.append(torch.autograd.grad(value, list(head.parameters()), retain_graph=True))
            return value

        hand(backbone.parameters(), 0.05, loss, base, net)
        for p, g in zip(head.parameters(), grads[0 if at_w else 1], strict=True):
            p.grad = g
        plain.step()
    same(ours["model"], net)


@pytest.mark.parametrize("word", ["optimizer_d.step(closure_d)", "optimizer_d.perturbed()"])
def test_a_gan(page, word):
    ours, _ = page(word, True)
    right, loader = page(word, False)
    g, d = right["generator"], right["discriminator"]
    betas = (0.5, 0.9) if "closure_d" in word else (0.9, 0.999)
    base_g, base_d = (torch.optim.Adam(net.parameters(), lr=1e-3, betas=betas) for net in (g, d))

    def shared(own):
        return (g, d) if "closure_d" in word else (own,)  # what model= holds

    for real, _ in loader:
        with torch.no_grad():
            fake = g(torch.randn(len(real), 4))
        hand(d.parameters(), 0.02, lambda real=real, fake=fake: right["loss_d"](real, fake), base_d, *shared(d))
        latent = torch.randn(len(real), 4)
        hand(g.parameters(), 0.02, lambda latent=latent: right["loss_g"](latent), base_g, *shared(g))
    same(ours["generator"], g)
    same(ours["discriminator"], d)


def test_two_wrapped_optimizers_take_turns(page):
    ours, _ = page("for optimizer in (sam_b, sam_h)", True)
    right, loader = page("for optimizer in (sam_b, sam_h)", False)
    net = right["model"]
    parts = [(right["backbone"], 0.05), (right["head"], 0.1)]
    bases = [torch.optim.SGD(part.parameters(), lr=0.1) for part, _ in parts]
    for x, y in loader:
        for (part, rho), base in zip(parts, bases, strict=True):
            hand(part.parameters(), rho, lambda x=x, y=y: right["loss_fn"](net(x), y), base, net)
    same(ours["model"], net)


def test_two_wrapped_optimizers_are_perturbed_at_once(page):
    ours, _ = page("sam_h.perturbed()", True)
    right, loader = page("sam_h.perturbed()", False)
    net, loss_fn = right["model"], right["loss_fn"]
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in loader:
        net.zero_grad()
        loss_fn(net(x), y).backward()
        buffers, start = [b.clone() for b in net.buffers()], [p.detach().clone() for p in net.parameters()]
        with torch.no_grad():
            for part, rho in ((right["backbone"], 0.05), (right["head"], 0.1)):
                size = torch.cat([p.grad.flatten() for p in part.parameters()]).norm()
                for p in part.parameters():
                    p.add_(p.grad, alpha=rho / float(size))
        net.zero_grad()
        loss_fn(net(x), y).backward()
        with torch.no_grad():
            for now, then in zip([*net.parameters(), *net.buffers()], [*start, *buffers], strict=True):
                now.copy_(then)
        base.step()
    same(ours["model"], net)


def test_a_teacher_and_an_average(page):
    ours, _ = page("average.update_parameters", True)
    right, loader = page("average.update_parameters", False)
    student, teacher, loss_fn = right["student"], right["teacher"], right["loss_fn"]
    base = torch.optim.SGD(student.parameters(), lr=0.1)
    slow = None
    for x, y in loader:
        taught = teacher(x).softmax(dim=1).detach()

        def loss(x=x, y=y, taught=taught):
            out = student(x)
            return loss_fn(out, y) + loss_fn(out, taught)

        hand(student.parameters(), 0.05, loss, base, student)
        now = [p.detach().clone() for p in student.parameters()]
        slow = now if slow is None else [0.9 * a + 0.1 * b for a, b in zip(slow, now, strict=True)]
    same(ours["student"], student)
    for a, b in zip(ours["average"].module.parameters(), slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_a_target_inside_the_model(page):
    ours, _ = page("class Byol", True)
    right, loader = page("class Byol", False)
    net, trained = right["byol"], right["trained"]
    base = torch.optim.SGD(trained, lr=0.1)
    for x, _ in loader:
        a, b = x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)
        hand(trained, 0.05, lambda a=a, b=b: net(a, b), base, net)
        net.move_target()
    same(ours["byol"], net)


def test_a_part_that_is_thawed(page):
    ours, _ = page("backbone.eval()", True)
    right, loader = page("backbone.eval()", False)
    net, backbone = right["model"], right["backbone"]
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    for epoch in range(2):
        backbone.requires_grad_(epoch == 1)
        backbone.train(epoch == 1)
        weights = [p for p in net.parameters() if p.requires_grad]
        for x, y in loader:
            hand(weights, 0.05, lambda x=x, y=y: right["loss_fn"](net(x), y), base, net)
    same(ours["model"], net)
