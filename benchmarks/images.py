"""Batches as training scripts make them: one image at a time, in Python, by the workers of a data loader.

`Prepared` is the pipeline of the papers' scripts (BiSAM, VaSSO, empirical-sam, Fundamental) in their order: crop of 32
with padding 4, mirror, numbers, normalisation, cutout of 16 with probability 0.5. It is written here from its
description, on tensors; `torchvision_images` has the same with torchvision's own transforms, where that is installed.
`Bytes` is what a careful user would write instead: bytes are cropped and mirrored by the workers, and the rest is done
for the whole batch on the device (`finished`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from flatmin.data.augment import Augment
from flatmin.data.dataset import Data, Split
from flatmin.data.images import CIFAR10

AUGMENT = Augment()
SIZE, PAD, CUT = 32, AUGMENT.crop, AUGMENT.cutout
NOWHERE = (-(10**6),) * 2  # centre of a square that covers nothing


def square() -> tuple[int, int] | None:
    """The centre of the square that is cut, with its probability."""
    if float(torch.rand(1)) >= AUGMENT.cutout_p:
        return None
    return int(torch.randint(SIZE, (1,))), int(torch.randint(SIZE, (1,)))


@dataclass(frozen=True)
class Draw:
    """What is random about one image: first row and column of the crop, mirrored, centre of the square or None."""

    top: int
    left: int
    mirrored: bool
    centre: tuple[int, int] | None

    @classmethod
    def new(cls) -> Draw:
        """One after the other from torch's generator, as transforms draw."""
        top, left = (int(torch.randint(2 * PAD + 1, (1,))) for _ in range(2))
        return cls(top, left, float(torch.rand(1)) < 0.5, square())

    @classmethod
    def of(cls, u: Tensor) -> list[Draw]:
        """Those that `Augment` makes of its array u, so that pipelines can be compared."""
        tops, lefts = (u[:2] * (2 * PAD + 1)).long().tolist()
        centres = (u[4:] * SIZE).long().T.tolist()
        squares = [tuple(c) if p < AUGMENT.cutout_p else None for p, c in zip(u[3].tolist(), centres, strict=True)]
        return [cls(*one) for one in zip(tops, lefts, (u[2] < 0.5).tolist(), squares, strict=True)]


def moved(image: Tensor, draw: Draw) -> Tensor:
    """One image of bytes, cropped and mirrored."""
    image = F.pad(image, (PAD,) * 4)[:, draw.top : draw.top + SIZE, draw.left : draw.left + SIZE]
    return image.flip(2) if draw.mirrored else image


def cut(image: Tensor, centre: tuple[int, int] | None) -> Tensor:
    """One image of numbers with its square, in place."""
    if centre is not None:
        top, left = centre[0] - CUT // 2, centre[1] - CUT // 2
        image[:, max(top, 0) : top + CUT, max(left, 0) : left + CUT] = 0.0
    return image


MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR10.mean, CIFAR10.std))


def prepared(image: Tensor, draw: Draw) -> Tensor:
    """One image of bytes as the scripts hand it to the model."""
    return cut(moved(image, draw).float().div(255).sub(MEAN).div(STD), draw.centre)


class Prepared(Dataset[tuple[Tensor, int]]):
    """Images that are ready for the model, each made when it is asked for."""

    def __init__(self, split: Split) -> None:
        self.x, self.y = split.x.cpu(), split.y.tolist()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return prepared(self.x[index], Draw.new()), self.y[index]


class Bytes(Prepared):
    """Images of bytes, cropped and mirrored, with the centre of the square."""

    def __getitem__(self, index: int) -> Any:
        draw = Draw.new()
        return moved(self.x[index], draw), self.y[index], *(draw.centre or NOWHERE)


def finished(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A batch of bytes, normalised and cut on the device that it is on."""
    mean, std = _statistics(x.device)
    x = x.float().div_(255).sub_(mean).div_(std)
    lines = torch.arange(SIZE, device=x.device) + 0.5
    inside = [(lines - centre.unsqueeze(1)).abs() < CUT / 2 for centre in (rows, columns)]
    return x.masked_fill_((inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1), 0.0)


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    return MEAN.to(device), STD.to(device)


def torchvision_images(split: Split) -> Dataset[tuple[Tensor, int]] | None:
    """The scripts' pipeline with torchvision's transforms of PIL images; None where it cannot be imported."""
    if not importlib.util.find_spec("torchvision"):
        return None
    try:
        from PIL import Image
        from torchvision import transforms
    except (ImportError, RuntimeError):
        return None

    whole = transforms.Compose(
        [
            transforms.RandomCrop(SIZE, padding=PAD),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(CIFAR10.mean, CIFAR10.std),
            lambda image: cut(image, square()),
        ]
    )
    pixels = split.x.cpu().permute(0, 2, 3, 1).contiguous().numpy()

    class Pictures(Prepared):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return whole(Image.fromarray(pixels[index])), self.y[index]

    return Pictures(split)


def endless(images: Dataset[Any], batch: int, *, workers: int, pinned: bool) -> Iterator[list[Tensor]]:
    """Batches in random order, epoch after epoch; the workers stay."""
    loader = DataLoader(
        images,
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=pinned,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def synthetic(samples: int, device: str = "cpu") -> Data:
    """Random images of CIFAR's shape in ten classes, with CIFAR-10's statistics and the papers' augmentation."""
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> Split:
        x = torch.randint(256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        return Split(x, torch.randint(10, (count,), generator=generator))

    parts = {"train": part(samples), "val": part(1000), "test": part(1000)}
    return Data(**parts, num_classes=10, name="synthetic", statistics=CIFAR10, augment=AUGMENT).to(device)
