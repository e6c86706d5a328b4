"""ImageNet: too large for memory, so pictures are decoded when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from posterity_studies.data import hub

SOURCE = "ILSVRC/imagenet-1k"  # its terms must be accepted on the hub; a folder will do
SIDE = 224  # pixels
CLASS_NAMES = tuple(map(str, range(1000)))
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of the part that training sees (Szegedy et al. 2015)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Pictures(Dataset[Tensor]):
    """Pictures (3, 224, 224), normalised: the middle of each, or for training a random part.

    ``epoch`` and an index decide the part, whichever process cuts it.
    """

    rows: Any = field(repr=False)  # with a column image
    epoch: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        picture = self.rows[index]["image"].convert("RGB")
        width, height = picture.size
        mirrored = False
        if self.epoch is None:
            box = middle(width, height)
        else:
            generator = torch.Generator().manual_seed(2_000_003 * self.epoch + index)
            box = part(width, height, generator)
            mirrored = bool(torch.randint(2, (), generator=generator))
        cut = picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
        pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1).float().div_(255)
        mean, std = (torch.tensor(moment).view(-1, 1, 1) for moment in (MEAN, STD))
        pixels.sub_(mean).div_(std)
        return pixels.flip(2) if mirrored else pixels


def stacked(pictures: Sequence[Tensor]) -> Tensor:
    """A batch; a rank's part of one may be empty."""
    return torch.stack(list(pictures)) if pictures else torch.zeros(0, 3, SIDE, SIDE)


def middle(width: int, height: int) -> Box:
    """The square that is 224/256 of a picture's shorter side."""
    side = min(width, height) * SIDE / 256
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def part(width: int, height: int, generator: torch.Generator) -> Box:
    """A part of random area and shape; the middle where ten tries do not fit."""
    for _ in range(10):
        area, shape, x, y = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = width * height * (AREA[0] + area * (AREA[1] - AREA[0]))
        low, high = map(math.log, RATIO)
        ratio = math.exp(low + shape * (high - low))
        wide, tall = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if wide <= width and tall <= height:
            left, top = x * (width - wide), y * (height - tall)
            return left, top, left + wide, top + tall
    return middle(width, height)


def load(source: str) -> tuple[tuple[Pictures, Tensor], tuple[Pictures, Tensor]]:
    """Pictures and classes to train on and, of the validation set, to test with.

    Raises:
        DataError: they cannot be had.
    """
    found = hub.load(source)
    train, test = (
        (Pictures(found[split]), torch.tensor(found[split]["label"][:]))
        for split in ("train", "validation")
    )
    return train, test
