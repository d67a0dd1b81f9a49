"""Before any clock: the pipelines make the same images, and the arms take the same step."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import images
from benchmarks.results import Gate
from benchmarks.training import METHODS, Ours, Plain, TimedTraining, config_of
from flatmin.train.numerics import numerics

SAME_IMAGES, SAME_WEIGHTS = 1e-5, 1e-5


def gates(net: str, device: str) -> list[Gate]:
    """The images of the pipelines, and two updates of each method in float64."""
    values = {"images of the three pipelines": (image_difference(), SAME_IMAGES)}
    for method in METHODS:
        name = f"{net}, {method}: two updates in float64 beside the plain step"
        values[name] = (difference_in_double(net, method, device), SAME_WEIGHTS)
    return [Gate(name, f"{value:.1e}", f"<= {limit:g}", value <= limit) for name, (value, limit) in values.items()]


def image_difference(count: int = 256) -> float:
    """Largest difference between the images of the three pipelines, for the same draws."""
    data, statistics = images.synthetic(count), images.CIFAR10
    u = images.AUGMENT.draw(count, torch.Generator().manual_seed(1))
    expected = images.AUGMENT.apply(data.train.x, statistics, u)
    draws = images.Draw.of(u)
    pairs = list(zip(data.train.x, draws, strict=True))
    rows, columns = torch.tensor([draw.centre or images.NOWHERE for draw in draws]).unbind(1)
    made = (
        torch.stack([images.prepared(*pair) for pair in pairs]),
        images.finished(torch.stack([images.moved(*pair) for pair in pairs]), rows, columns),
    )
    return max(float((x - expected).abs().max()) for x in made)


def beside_plain(arm: TimedTraining, reference: Plain, x: Tensor, y: Tensor) -> tuple[float, float]:
    """One update of an arm against one of plain float32 from the same weights: (difference over the way, cosine)."""
    reference.model.load_state_dict(arm.model.state_dict())
    ways = []
    for one in (arm, reference):
        before = [w.detach().double() for w in one.model.parameters()]
        with numerics(reference.config):
            one.forget()
            one.update(x, y)
        after = [w.detach().double() for w in one.model.parameters()]
        ways.append(torch.cat([(b - a).flatten() for a, b in zip(before, after, strict=True)]))
    mine, expected = ways
    scale = float(expected.norm())
    return float((mine - expected).norm()) / scale, float(mine @ expected) / (float(mine.norm()) * scale)


def difference_in_double(net: str, method: str, device: str, updates: int = 2) -> float:
    """The weights of flatmin against the plain step's after some updates in float64, in units of the way gone.

    The trainer takes its loss in float32, so that they agree to about 1e-7.
    """
    data = images.synthetic(64, device)
    config = config_of(net, method, 16, device)
    arms = Ours(config, data), Plain(config, data, images.Bytes(data.train), workers=0)
    for arm in arms:
        arm.model.double()
    start = [w.detach().clone() for w in arms[0].model.parameters()]
    for number in range(updates):
        u = images.AUGMENT.draw(16, torch.Generator().manual_seed(number))
        x = images.AUGMENT.apply(data.train.x[16 * number :][:16], images.CIFAR10, u).double()
        for arm in arms:
            with numerics(config):
                arm.update(x, data.train.y[16 * number :][:16])
    ends = [torch.cat([w.detach().flatten() for w in arm.model.parameters()]) for arm in arms]
    way = ends[1] - torch.cat([w.flatten() for w in start])
    return float((ends[0] - ends[1]).norm() / way.norm())
