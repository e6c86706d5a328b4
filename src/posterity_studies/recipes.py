"""Recipes: what to train, on what, with which settings. Variants `replace` a base.

The settings of `fashion-mnist` are those that `posterity tune` found on a validation split, with
as many trials for each optimizer; the search is committed beside the results it led to
(``results/fashion-mnist/tune.json``) and a test holds the two together. Those of other recipes are
published ones, or by few trials or none, as they say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from typing import Any, get_type_hints

from posterity_studies.settings import (
    Adahessian,
    Adamw,
    Backprop,
    Dropout,
    Ivon,
    Settings,
    Sgd,
    Swag,
    Vogn,
)  # fmt: skip


class UserError(Exception):
    """Wrong input: its message is all that the user needs to see."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """That there is nothing of this name, and which name may be meant."""
    known = list(known)
    begun = [each for each in known if each.startswith(name)]
    near = begun if len(begun) == 1 else get_close_matches(name, known, 1)
    told = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"no {what} {name!r}; {told}"


class Diverged(UserError):
    """Training with these settings ended in numbers that are not finite."""


Range = tuple[float, float]  # of a logarithmic search


def overridden(settings: Settings, optimizer: str, overrides: Iterable[str]) -> Settings:
    """Settings with ``key=value`` overrides.

    Raises:
        UserError: an unknown key, or a value that is no number.
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in {f.name for f in fields(settings)}:
            known = ", ".join(f.name for f in fields(settings))
            raise UserError(f"{optimizer} has no setting {key!r}; there are {known}")
        try:
            whole = get_type_hints(type(settings))[key] is int  # others may be float | None
            changes[key] = (int if whole else float)(value)
        except ValueError:
            raise UserError(f"{override!r}: expected {key}=NUMBER") from None
    try:
        return replace(settings, **changes)
    except ValueError as error:
        raise UserError(f"{optimizer} {error}") from None


@dataclass(frozen=True)
class Recipe:
    """One experiment: data, network, length, and settings for each optimizer."""

    name: str
    data: str
    ood: str  # empty: none
    network: str
    epochs: int
    optimizers: dict[str, Settings]
    search: dict[str, dict[str, Range]] = field(repr=False)
    batch_size: int = 128
    warmup: float = 0.05  # share of all steps; cosine decay to zero after
    samples: int = 64  # of the posterior, at test time
    validation: int = 0  # training images held out; the test set is then not touched
    train_limit: int | None = None  # use only so many training images
    label_noise: float = 0.0  # share of the training labels that are made wrong
    augment: bool = False  # shift training images by up to 4 pixels, and mirror half of them
    compiled: bool = False  # the network; on a GPU steps of AdamW, SGD and IVON become a CUDA graph

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1 or self.samples < 0:
            raise UserError("a recipe needs epochs >= 1, batch_size >= 1 and samples >= 0")

    def with_settings(self, optimizer: str, overrides: Iterable[str]) -> Recipe:
        """This recipe with ``key=value`` overrides of one optimizer's settings.

        Raises:
            UserError: an unknown optimizer or key, or a value that is no number.
        """
        settings = overridden(self.settings(optimizer), optimizer, overrides)
        return replace(self, optimizers={**self.optimizers, optimizer: settings})

    def settings(self, optimizer: str) -> Settings:
        """One optimizer's settings.

        Raises:
            UserError: an unknown optimizer.
        """
        if optimizer not in self.optimizers:
            raise UserError(unknown("optimizer", optimizer, self.optimizers))
        return self.optimizers[optimizer]


def fashion_mnist() -> Recipe:
    """Fashion-MNIST with a small convolutional network; MNIST is what it has not seen."""
    return Recipe(
        name="fashion-mnist",
        data="fashion-mnist",
        ood="mnist",
        network="conv_small",
        epochs=18,
        optimizers={
            "adamw": Adamw(lr=3.78e-3, weight_decay=0.344),
            "sgd": Sgd(lr=0.11, weight_decay=1.49e-3),
            "ivon": Ivon(
                **{"lr": 0.58, "hess_init": 0.0343, "weight_decay": 9.37e-4, "temperature": 0.0725},
                **{"memory": 2e3, "clip_radius": 0.3},  # not searched
            ),
        },
        search={
            "adamw": {"lr": (1e-3, 6e-3), "weight_decay": (3e-2, 1.0)},
            "sgd": {"lr": (2e-2, 0.2), "weight_decay": (3e-4, 3e-3)},
            "ivon": {
                "lr": (0.3, 1.2),
                "hess_init": (1e-2, 8e-2),
                "weight_decay": (3e-4, 3e-3),
                "temperature": (0.03, 0.5),
            },
        },
    )


def with_baselines(base: Recipe, **more: Settings) -> Recipe:
    """A recipe with more methods, by default with the settings that SGD or IVON share with them."""
    sgd, ivon = base.optimizers["sgd"], base.optimizers["ivon"]
    assert isinstance(sgd, Sgd)
    assert isinstance(ivon, Ivon)
    shared = {"weight_decay": ivon.weight_decay, "temperature": ivon.temperature}
    methods: dict[str, Settings] = {
        "adahessian": Adahessian(lr=0.01, weight_decay=0.344),
        "dropout": Dropout(lr=sgd.lr, weight_decay=sgd.weight_decay),
        "swag": Swag(lr=sgd.lr, weight_decay=sgd.weight_decay),
        "bbb": Backprop(lr=2e-3, **shared),
        "vogn": Vogn(lr=ivon.lr, hess_init=ivon.hess_init, **shared),
    }
    return replace(base, optimizers={**base.optimizers, **methods, **more})


def baselines() -> Recipe:
    """`fashion-mnist` with more methods, of settings that were tried for six epochs."""
    tried: dict[str, dict[str, float]] = {
        "adahessian": {"lr": 0.4, "weight_decay": 0.0032},
        "dropout": {"rate": 0.02},
        "bbb": {"lr": 4e-3},
    }
    base = replace(with_baselines(fashion_mnist()), name="baselines")
    changed = {o: replace(base.settings(o), **found) for o, found in tried.items()}
    return replace(base, optimizers={**base.optimizers, **changed})


def lenet5() -> Recipe:
    """LeNet-5 on Fashion-MNIST with the settings of the paper's sensitivity experiments."""
    return replace(
        fashion_mnist(),
        name="lenet5",
        network="lenet5",
        epochs=100,
        batch_size=256,
        optimizers={
            "adamw": Adamw(lr=1e-3, weight_decay=1e-2),
            "ivon": Ivon(lr=0.1, hess_init=0.1, weight_decay=1e-3, memory=2e3),
        },
    )


def cifar10() -> Recipe:
    """CIFAR-10 with a small convolutional network; emoji are what it has not seen.

    Its settings were not searched.
    """
    return replace(
        fashion_mnist(),
        name="cifar10",
        data="cifar10",
        ood="emoji",
        network="conv_colour",
        epochs=8,
        samples=32,
        optimizers={
            "adamw": Adamw(lr=3e-3, weight_decay=0.3),
            "sgd": Sgd(lr=0.1, weight_decay=1e-3),
            "ivon": Ivon(
                **{"lr": 0.6, "hess_init": 0.05, "weight_decay": 1e-3, "temperature": 0.1},
                **{"memory": 2e3, "clip_radius": 0.3},
            ),
        },
    )


def cifar10_resnet20() -> Recipe:
    """CIFAR-10 with ResNet-20 in bfloat16: twenty epochs, half an hour on one core with AMX.

    SGD's lr is the best of four trials of three epochs on 5,000 images held out; AdamW's best
    (1e-2) was too large for twenty epochs, and it has the smallest tried. IVON makes SGD's steps,
    its lr over 1−β1 and its weight decay, at the paper's noise: h0 and 1/(1−β2) are the paper's, so
    that in so short a run h stays where it starts.
    """
    return replace(
        cifar10(),
        name="cifar10-resnet20",
        network="resnet20-bf16",
        epochs=20,
        augment=True,
        optimizers={
            "adamw": Adamw(lr=3e-3, weight_decay=0.3),
            "sgd": Sgd(lr=0.2, weight_decay=5e-4),
            "ivon": Ivon(lr=2.0, hess_init=0.5, weight_decay=5e-4, memory=1e5),
        },
        search={
            "adamw": {"lr": (1e-3, 3e-2), "weight_decay": (3e-2, 1.0)},
            "sgd": {"lr": (3e-2, 0.5), "weight_decay": (1e-4, 2e-3)},
            "ivon": {
                "lr": (0.3, 5.0),
                "hess_init": (0.05, 1.0),
                "weight_decay": (1e-4, 2e-3),
                "temperature": (0.03, 1.0),
            },
        },
    )


def published(data: str, network: str, ood: str) -> Recipe:
    """The paper's settings for 200 epochs of small images.

    AdamW's weight decay is not told there: it is that for ImageNet. Source: Shen et al. 2024.
    """
    return replace(
        fashion_mnist(),
        name=f"{data}-{network}",
        data=data,
        ood=ood,
        network=network,
        epochs=200,
        batch_size=50,
        warmup=5 / 200,
        augment=True,
        optimizers={
            "adamw": Adamw(lr=2e-3, weight_decay=0.1),
            "sgd": Sgd(lr=0.1, weight_decay=2e-4),
            "ivon": Ivon(lr=0.2, hess_init=0.5, weight_decay=2e-4, memory=1e5),
        },
    )


def imagenet() -> Recipe:
    """The paper's settings for ResNet-50 with filter-response norm; its warm-up is not told."""
    return replace(
        published("imagenet", "resnet50-frn", ood=""),
        name="imagenet-resnet50",
        batch_size=1024,
        optimizers={
            "adamw": Adamw(lr=1e-3, weight_decay=0.1),
            "sgd": Sgd(lr=0.5, weight_decay=5e-5),
            "ivon": Ivon(lr=2.5, hess_init=0.05, weight_decay=5e-5, memory=2e5),
        },
    )


def published_baselines() -> Recipe:
    """The paper's comparison: ResNet-20 with filter-response norm on CIFAR-10.

    Dropout of .05, SWAG from epoch 160 of 200, Bayes by backprop at .002, AdaHessian at .05. SWAG's
    rate is not told there: .05 is half of SGD's.
    """
    base = published("cifar10", "resnet20-frn", "svhn")
    more: dict[str, Settings] = {
        "adahessian": Adahessian(lr=0.05, weight_decay=2e-4),
        "swag": Swag(lr=0.1, weight_decay=2e-4, swag_lr=0.05, start=0.8),
    }
    return replace(with_baselines(base, **more), name="published-baselines")


def smoke() -> Recipe:
    """`fashion-mnist` cut to seconds: two epochs on 2,000 images, for tests."""
    base = fashion_mnist()
    ivon = Ivon(lr=0.3, hess_init=0.5, weight_decay=1e-3)  # fewer examples: a wider posterior
    return replace(
        base,
        name="smoke",
        epochs=2,
        train_limit=2000,
        samples=4,
        optimizers={**base.optimizers, "ivon": ivon},
    )


PUBLISHED = {
    f"{data}-{network}": partial(published, data, network, "svhn")
    for data in ("cifar10", "cifar100", "tinyimagenet")
    for network in ("resnet20-frn", "resnet18", "preresnet110", "densenet121")
}
RECIPES: dict[str, Callable[[], Recipe]] = {
    "fashion-mnist": fashion_mnist,
    "baselines": baselines,
    "lenet5": lenet5,
    "cifar10": cifar10,
    "cifar10-resnet20": cifar10_resnet20,
    "smoke": smoke,
    "published-baselines": published_baselines,
    "imagenet-resnet50": imagenet,
    **PUBLISHED,
}


def recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        UserError: an unknown name.
    """
    if name not in RECIPES:
        raise UserError(unknown("recipe", name, RECIPES))
    return RECIPES[name]()
