"""What is in no registry: each loader on small data in the published form, by its checksums."""

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from posterity_studies import data
from posterity_studies.data import DataError, cache, published

RNG = np.random.default_rng(0)


def pictures(n, side=32):
    return RNG.integers(0, 256, (n, side, side, 3)).astype(np.uint8)


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=form, quality=95)
    return buffer.getvalue()


def tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def mat(**variables):
    buffer = io.BytesIO()
    savemat(buffer, variables)
    return buffer.getvalue()


def cifar100(monkeypatch):
    monkeypatch.setattr(published, "CIFAR100", {"train": 5, "test": 3})
    images, labels = pictures(8), RNG.integers(0, 100, 8)
    planes = images.transpose(0, 3, 1, 2).reshape(8, -1)
    rows = np.concatenate([np.full((8, 1), 7), labels[:, None], planes], 1).astype(np.uint8)
    files = {"train": rows[:5].tobytes(), "test": rows[5:].tobytes()}
    archive = tar({f"cifar-100-binary/{k}.bin": v for k, v in files.items()})
    return [archive], (images[:5], labels[:5]), (images[5:], labels[5:])


def svhn(monkeypatch):
    images, labels = pictures(7), np.array([1, 2, 10, 4, 10, 9, 3])
    files = [
        mat(X=images[s].transpose(1, 2, 3, 0), y=labels[s][:, None])
        for s in (slice(0, 4), slice(4, 7))
    ]
    return files, (images[:4], labels[:4] % 10), (images[4:], labels[4:] % 10)


def flowers(monkeypatch):
    """Wide pictures of one colour in the middle square, another beside it."""
    images = np.zeros((6, 64, 96, 3), np.uint8)
    images[:, :, 16:80] = pictures(6, 1)
    archive = tar({f"jpg/image_{k + 1:05}.jpg": encoded(images[k]) for k in range(6)})  # PNG: exact
    labels = np.array([[3, 1, 2, 2, 1, 3]])
    splits = {"trnid": [[6, 1]], "valid": [[4]], "tstid": [[2, 3, 5]]}
    files = [archive, mat(labels=labels), mat(**{k: np.array(v) for k, v in splits.items()})]
    small = images[:, :32, 32:64]
    train, test = np.array([6, 1, 4]) - 1, np.array([2, 3, 5]) - 1
    return files, (small[train], labels[0][train] - 1), (small[test], labels[0][test] - 1)


def tiny_imagenet(monkeypatch):
    images = np.repeat(np.repeat(pictures(6, 1), 64, 1), 64, 2)
    classes = ["n02", "n01", "n02", "n01", "n01", "n02"]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for k in range(4):
            name = f"tiny-imagenet-200/train/{classes[k]}/images/{classes[k]}_{k}.JPEG"
            zipped.writestr(name, encoded(images[k]))
        lines = [f"val_{k}.JPEG\t{classes[k]}\t0\t0\t62\t62" for k in (5, 4)]
        zipped.writestr("tiny-imagenet-200/val/val_annotations.txt", "\n".join(lines))
        for k in (4, 5):
            zipped.writestr(f"tiny-imagenet-200/val/images/val_{k}.JPEG", encoded(images[k]))
        zipped.writestr("tiny-imagenet-200/test/images/test_0.JPEG", encoded(images[0]))
    order = [1, 3, 0, 2]  # by class, then by name
    return [buffer.getvalue()], (images[order], [0, 0, 1, 1]), (images[4:], [0, 1])


def medmnist(monkeypatch):
    images, labels = pictures(9, 28), RNG.integers(0, 7, (9, 1)).astype(np.uint8)
    parts = {"train": slice(0, 5), "val": slice(5, 6), "test": slice(6, 9)}
    buffer = io.BytesIO()
    told = {f"{k}_images": images[s] for k, s in parts.items()}
    np.savez(buffer, **told, **{f"{k}_labels": labels[s] for k, s in parts.items()})
    return [buffer.getvalue()], (images[:5], labels[:5, 0]), (images[6:], labels[6:, 0])


MADE = {
    **{"cifar100": cifar100, "svhn": svhn, "flowers102": flowers},
    **{"tinyimagenet": tiny_imagenet, "dermamnist": medmnist},
}


@pytest.fixture
def served(monkeypatch, tmp_path):
    """A listing whose own source, with its own decoder, serves made files."""

    def make(name, change=lambda files: files):
        monkeypatch.setenv("POSTERITY_DATA", str(tmp_path))
        files, *splits = MADE[name](monkeypatch)
        listing = data.LISTINGS[name]
        (source,) = listing.sources
        assert len(source.md5) == len(source.files) == len(files)
        md5 = tuple(hashlib.md5(file).hexdigest() for file in files)

        def here(address, names):
            return iter(change(files))

        source = replace(source, kind=here, md5=md5)
        monkeypatch.setitem(data.LISTINGS, name, replace(listing, sources=(source,)))
        return splits

    return make


@pytest.mark.parametrize("name", MADE)
def test_published_forms_are_read(name, served, tmp_path):
    splits = served(name)
    found = data.load(name)
    for split, (images, targets) in zip((found.train, found.test), splits, strict=True):
        np.testing.assert_array_equal(split.inputs.numpy(), images)
        assert split.targets.tolist() == list(targets)
    pixels = found.train.inputs.double() / 255
    assert found.mean == pytest.approx(pixels.mean((0, 1, 2)).tolist())
    assert found.std == pytest.approx(pixels.std((0, 1, 2), correction=0).tolist())
    normal = found.normalise(found.train.inputs)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    arrays, told = cache.read(name, None)
    assert found.digest == cache.digest(arrays)
    assert "here" in told
    again = data.load(name)  # from the cache
    assert torch.equal(again.train.inputs, found.train.inputs)
    assert data.known(name).mean == found.mean


def test_other_files_than_the_published_are_refused(served):
    served("svhn", lambda files: [files[0], files[1] + b" "])
    with pytest.raises(DataError, match=r"test_32x32\.mat has md5 .* published is"):
        data.load("svhn")


def test_a_cached_file_that_changed_is_refused(served, tmp_path):
    served("dermamnist")
    data.load("dermamnist")
    path = cache.path("dermamnist")
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DataError, match="damaged"):
        data.load("dermamnist")


@pytest.mark.parametrize("name", ["cifar100", "flowers102", "tinyimagenet", "dermamnist"])
def test_archives_that_lack_something_are_refused(name, served, monkeypatch):
    files, *_ = MADE[name](monkeypatch)
    decode = data.LISTINGS[name].sources[0].decode
    with pytest.raises((ValueError, EOFError, OSError, zipfile.BadZipFile)):
        decode([files[0][: len(files[0]) // 2], *files[1:]])
