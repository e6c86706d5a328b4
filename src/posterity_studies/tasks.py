"""The arrays of a recipe, and their batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from posterity_studies import data, ranks
from posterity_studies.data import imagenet
from posterity_studies.recipes import Recipe, UserError


@dataclass(frozen=True, eq=False)
class Task:
    """The arrays of a recipe: inputs are normalised, ``images`` are the inputs as pixels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    ood: Tensor | None
    images: Tensor  # of the test
    train_images: Tensor
    class_names: tuple[str, ...]
    digest: str
    wrong: Tensor | None = None  # which training labels were made wrong

    def feed(
        self, order: Sequence[Tensor], augment: bool, seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch's batches: this rank's part of each, where it computes."""
        return (picked(*self._near, augment, batch) for batch in order)

    @cached_property
    def _near(self) -> tuple[Tensor, Tensor]:
        """The training examples where this rank computes."""
        inputs, targets = self.train
        return inputs.to(ranks.device()), targets.to(ranks.device())


@dataclass(frozen=True, eq=False)
class Streamed:
    """A recipe's pictures where they are too large for memory: as :class:`Task`, but decoded."""

    train: tuple[imagenet.Pictures, Tensor]
    test: tuple[imagenet.Pictures, Tensor]
    class_names: tuple[str, ...]
    digest: str
    ood: None = None

    def feed(
        self, order: Sequence[Tensor], augment: bool, seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch's batches: this rank's part of each, where it computes."""
        pictures, targets = self.train
        cut = replace(pictures, epoch=1_000_003 * seed + epoch if augment else None)
        mine = [ranks.part(batch) for batch in order]
        loader = DataLoader(
            cut,
            batch_sampler=[batch.tolist() for batch in mine],
            collate_fn=imagenet.stacked,
            num_workers=WORKERS,
            pin_memory=torch.cuda.is_available(),
        )
        where = ranks.device()
        for batch, inputs in zip(mine, loader, strict=True):
            yield inputs.to(where, non_blocking=True), targets[batch].to(where)


WORKERS = min(os.cpu_count() or 1, 8)  # processes that decode pictures


def load(recipe: Recipe) -> Task | Streamed:
    """A recipe's data, to train on and to evaluate with.

    Raises:
        UserError: as :func:`load_task`, or what is asked needs the whole in memory.
    """
    if recipe.data != "imagenet":
        return load_task(recipe)
    if recipe.validation or recipe.label_noise or recipe.train_limit:
        raise UserError("imagenet is trained on whole: no validation, label noise or limit")
    train, test = imagenet.load(imagenet.SOURCE)
    digest = f"{imagenet.SOURCE}, {len(train[0])} pictures"
    return Streamed(train, test, imagenet.CLASS_NAMES, digest)


def load_task(recipe: Recipe) -> Task:
    """Load a recipe's data; with ``validation`` the last training images stand in for the test.

    Raises:
        UserError: more validation images than there are training images.
    """
    known = data.load(recipe.data)
    unknown = data.load(recipe.ood) if recipe.ood else None
    images, targets = known.train.inputs, known.train.targets
    test_images, test_targets = known.test.inputs, known.test.targets
    if not 0 <= recipe.validation < len(targets):
        raise UserError(f"--validation must leave some of the {len(targets)} training images")
    if recipe.validation:
        test_images, test_targets = images[-recipe.validation :], targets[-recipe.validation :]
        images, targets = images[: -recipe.validation], targets[: -recipe.validation]
    images, targets = images[: recipe.train_limit], targets[: recipe.train_limit]
    wrong = None
    if recipe.label_noise:
        targets, wrong = mislabelled(targets, len(known.class_names), recipe.label_noise)
    return Task(
        train=(known.normalise(images), targets),
        test=(known.normalise(test_images), test_targets),
        ood=known.normalise(known.as_seen(unknown.test.inputs)) if unknown else None,
        images=test_images,
        train_images=images,
        class_names=known.class_names,
        digest=f"{known.digest} {unknown.digest}" if unknown else str(known.digest),
        wrong=wrong,
    )


def mislabelled(targets: Tensor, classes: int, share: float) -> tuple[Tensor, Tensor]:
    """Targets of which a share, always the same ones, is another class; and which those are."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(targets), generator=generator)[: round(share * len(targets))]
    away = torch.randint(1, classes, (len(chosen),), generator=generator)
    targets, wrong = targets.clone(), torch.zeros(len(targets), dtype=torch.bool)
    targets[chosen] = (targets[chosen] + away) % classes
    wrong[chosen] = True
    return targets, wrong


def batches(n: int, size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """An epoch's order: a pure function of seed and epoch, so that a resumed run repeats it."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(n, generator=generator).split(size)


def picked(inputs: Tensor, targets: Tensor, augment: bool, batch: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of a batch."""
    mine = ranks.part(batch).to(inputs.device)
    x, y = inputs[mine], targets[mine]
    if augment:
        where = torch.randint(9, (len(batch), 2)), torch.randint(2, (len(batch),)).bool()
        x = shifted(x, *(ranks.part(w).to(x.device) for w in where))
    return x, y


def shifted(images: Tensor, corners: Tensor, mirrored: Tensor) -> Tensor:
    """Cuts of images padded by 4 pixels of their mean colour, from (row, column) corners 0 to 8.

    images: normalised (n, channels, height, width); those of ``mirrored`` are also turned over.
    """
    height, width = images.shape[-2:]
    rows = corners[:, :1] + torch.arange(height, device=images.device)
    columns = corners[:, 1:] + torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = nn.functional.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
