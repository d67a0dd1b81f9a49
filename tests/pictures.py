"""Image files that the tests make; Pillow is imported where one is made."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

CLASSES = ("ant", "bee", "cat")


def picture(path: Path, width: int, height: int, *, seed: int = 0, mode: str = "RGB", **options: Any) -> Any:
    """Write an image of noise; the image."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    data = random.Random(seed).randbytes(width * height * len(Image.new(mode, (1, 1)).getbands()))
    image = Image.frombytes(mode, (width, height), data)
    image.save(path, **options)
    return image


def tree(root: Path, **parts: int) -> Path:
    """One folder per class in each part, of so many images of all sizes, PNG and JPEG; the root."""
    for number, (part, count) in enumerate(parts.items()):
        for k in range(count):
            name = CLASSES[k % len(CLASSES)]
            ending = ("png", "JPEG")[k % 2]
            picture(
                root / part / name / f"{name}_{k:03}.{ending}", 10 + 3 * k % 17, 24 - 2 * k % 11, seed=100 * number + k
            )
    return root


def cut_short(path: Path) -> None:
    """Take away the last pixels of a file, of which the header is left."""
    path.write_bytes(path.read_bytes()[:-100])
