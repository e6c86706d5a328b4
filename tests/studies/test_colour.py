"""Colour data: both forms of CIFAR-10, emoji on white, grey pictures shown to colour networks."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from posterity_studies import data
from posterity_studies.data import colour, sources

N = 4


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def cifar(monkeypatch):
    """Six files of few images, as pictures and as binaries."""
    monkeypatch.setattr(colour, "CIFAR", N)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6 * N, 32, 32, 3)).astype(np.uint8)
    labels = generator.integers(0, 10, 6 * N)
    parts = np.split(images, 6)
    pictures = [png(part.reshape(N, 1024, 3)) for part in parts]
    told = [
        json.dumps(labels[: 5 * N].tolist()).encode(),
        json.dumps(labels[5 * N :].tolist()).encode(),
    ]
    planes = images.transpose(0, 3, 1, 2).reshape(6 * N, -1)
    rows = np.split(np.concatenate([labels[:, None].astype(np.uint8), planes], 1), 6)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    binary = {
        f"cifar-10-batches-bin/{n}.bin": r.tobytes() for n, r in zip(names, rows, strict=True)
    }
    return images, labels, [*pictures, *told], binary


def test_both_forms_of_cifar_are_the_same_arrays(cifar):
    images, labels, pictures, binary = cifar
    one, other = colour.cifar_pictures(pictures), colour.cifar_binary([tar(binary)])
    for key in data.cache.KEYS:
        np.testing.assert_array_equal(one[key], other[key])
        assert one[key].dtype == other[key].dtype
    np.testing.assert_array_equal(one["train.inputs"], images[: 5 * N])
    np.testing.assert_array_equal(one["test.targets"], labels[5 * N :])
    assert data.cache.digest(one) == data.cache.digest(other)


def test_cifar_of_another_size_is_refused(cifar):
    _, _, pictures, binary = cifar
    with pytest.raises(ValueError, match="does not hold"):
        colour.cifar_pictures([png(np.zeros((3, 1024, 3), np.uint8)), *pictures[1:]])
    with pytest.raises(ValueError, match="expected 24 images"):
        colour.cifar_pictures([*pictures[:6], b"[1, 2]", b"[3]"])
    short = {**binary, "cifar-10-batches-bin/test_batch.bin": b"\0" * 3073}
    with pytest.raises(ValueError, match="expected 24 images"):
        colour.cifar_binary([tar(short)])
    with pytest.raises(KeyError):
        colour.cifar_binary([tar({"other": b""})])


def test_emoji_are_means_on_white():
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[:2, :2] = [[[200, 100, 0, 255], [100, 0, 0, 255]], [[0, 0, 0, 255], [100, 100, 0, 255]]]
    picture[:2, 2:4] = [0, 0, 0, 51]  # a fifth of black over white
    found = colour.emoji([png(picture)])
    image = found["test.inputs"][0]
    assert image[0, 0].tolist() == [100, 50, 0]
    assert image[0, 1].tolist() == [204, 204, 204]
    assert (image[1:] == 255).all()
    assert found["train.inputs"].shape == (0, 32, 32, 3)
    with pytest.raises(ValueError, match="emoji of"):
        colour.emoji([png(np.zeros((32, 32, 4), np.uint8))])


def test_a_pattern_takes_its_files_in_the_order_of_their_names(tmp_path):
    path = tmp_path / "a.tgz"
    path.write_bytes(tar({"p/b.png": b"2", "p/a.png": b"1", "p/c.txt": b"3"}))
    assert sources.read_tar(path, ["p/c.txt", "p/*.png"]) == [b"3", b"1", b"2"]
    with pytest.raises(ValueError, match=r"lacks q/\*"):
        sources.read_tar(path, ["q/*"])


def test_grey_images_are_framed_and_tinted_for_a_colour_network():
    cifar10, mnist = data.LISTINGS["cifar10"], data.LISTINGS["mnist"]
    grey = torch.randint(256, (5, 28, 28), dtype=torch.uint8)
    seen = cifar10.as_seen(grey)
    assert seen.shape == (5, 32, 32, 3)
    assert all(torch.equal(seen[:, 2:-2, 2:-2, c], grey) for c in range(3))
    assert seen[:, :2].sum() == 0
    assert cifar10.normalise(seen).shape == (5, 3, 32, 32)
    assert cifar10.as_seen(seen) is seen
    assert mnist.as_seen(grey) is grey
    with pytest.raises(ValueError, match="mnist is grey"):
        mnist.as_seen(seen)
    with pytest.raises(ValueError, match="cifar10 has 3 channels"):
        cifar10.normalise(grey)


def test_a_users_picture_is_read_in_colour(tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[..., 0] = 250
    (tmp_path / "red.png").write_bytes(png(picture))
    read = {name: listing.read(tmp_path / "red.png") for name, listing in data.LISTINGS.items()}
    assert read["cifar10"][16, 16].tolist() == [250, 0, 0]
    shapes = {name: tuple(image.shape) for name, image in read.items()}
    assert shapes["mnist"] == (28, 28)
    assert shapes["dermamnist"] == (28, 28, 3)
    assert shapes["cifar10"] == (32, 32, 3)
    assert shapes["tinyimagenet"] == (64, 64, 3)


def test_a_users_picture_is_cut_as_imagenets_are(tmp_path):
    picture = np.full((256, 300, 3), 200, np.uint8)
    picture[:16] = picture[-16:] = picture[:, :38] = picture[:, -38:] = 0  # is cut off
    (tmp_path / "framed.png").write_bytes(png(picture))
    seen = data.LISTINGS["imagenet"].read(tmp_path / "framed.png")
    assert seen.shape == (224, 224, 3)
    assert (seen == 200).all()


def test_grey_images_of_the_same_side_are_only_tinted():
    grey = torch.randint(256, (5, 28, 28), dtype=torch.uint8)
    seen = data.LISTINGS["dermamnist"].as_seen(grey)
    assert all(torch.equal(seen[..., c], grey) for c in range(3))


@pytest.mark.parametrize("shape", [(2, 28, 28), (2, 32, 32, 3), (2, 64, 64, 3)], ids=str)
def test_unknown_images_have_the_side_of_those_a_network_knows(shape):
    tiny = data.LISTINGS["tinyimagenet"]
    images = torch.full(shape, 7, dtype=torch.uint8)
    seen = tiny.as_seen(images)
    assert seen.shape == (2, 64, 64, 3)
    assert seen.dtype == torch.uint8
    assert (seen[:, 20:40, 20:40] == 7).all()


@pytest.mark.slow
@pytest.mark.network
def test_the_real_data_in_colour(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTERITY_DATA", str(tmp_path))
    cifar10, emoji = data.load("cifar10"), data.load("emoji")
    assert torch.bincount(cifar10.train.targets).tolist() == [5000] * 10
    assert torch.bincount(cifar10.test.targets).tolist() == [1000] * 10
    assert len(cifar10.class_names) == 10
    pixels = cifar10.normalise(cifar10.train.inputs[::10])
    assert abs(pixels.mean()) < 0.02
    assert abs(pixels.std() - 1) < 0.02
    assert emoji.test.inputs.shape == (3786, 32, 32, 3)
    assert len(emoji.train) == 0
