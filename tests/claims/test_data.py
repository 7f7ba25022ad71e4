"""The images that a user points the claims at."""

import gzip
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from benchmarks.claims import data

RNG = np.random.default_rng(0)


def images(n: int, *size: int) -> np.ndarray:
    return RNG.integers(0, 256, (n, *size), dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """The folder, and what is in it."""
    parts = {"train": (images(30, 28, 28), images(30) % 10)}
    parts["t10k"] = images(20, 28, 28), images(20) % 10
    for name, (x, y) in parts.items():
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(x))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(y)))
    return tmp_path, parts


def same_set(x, labels, expected, expected_labels):
    """As sets: a sample may be drawn in any order."""
    found = sorted((int(y), (255 * image).round().byte().numpy().tobytes())
                   for image, y in zip(x, labels, strict=True))  # fmt: skip
    wanted = sorted(
        (int(y), image.tobytes()) for image, y in zip(expected, expected_labels, strict=True)
    )
    return found == wanted


def test_digits_by_default():
    found = data.load(None)
    assert found.words == "digits: 1437 training images, 360 test images of 1x8x8"
    assert found.images.dtype is torch.float32 and 0 <= found.images.min() < found.images.max() <= 1


@pytest.mark.parametrize("folder", ["", "MNIST/raw"])
def test_mnist(mnist, folder, tmp_path_factory):
    path, parts = mnist
    if folder:
        root = tmp_path_factory.mktemp("root")
        (root / "MNIST").mkdir()
        path.rename(root / folder)
        path = root
    found = data.load(path)
    assert found.name == "MNIST" and found.images.shape == (30, 1, 28, 28)
    assert same_set(found.images, found.labels, *parts["train"])
    assert same_set(found.test_images, found.test_labels, *parts["t10k"])


def write_cifar(folder, binary, payload=None):
    batches = [(images(4, 3072), images(4) % 10) for _ in range(6)]
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, (x, y) in zip(names, batches, strict=True):
        if binary:
            rows = np.concatenate([y[:, None], x], 1)
            (folder / f"{name}.bin").write_bytes(rows.astype(np.uint8).tobytes())
        else:
            content = {"data": x, "labels": y.tolist(), "batch_label": "a", "filenames": ["b"]}
            protocol = 2  # that of the original files
            (folder / name).write_bytes(payload or pickle.dumps(content, protocol))
    return batches


@pytest.mark.parametrize("binary", [True, False])
def test_cifar10(tmp_path, binary):
    batches = write_cifar(tmp_path, binary)
    found = data.load(tmp_path)
    assert found.name == "CIFAR-10" and found.images.shape == (20, 3, 32, 32)
    x, y = (np.concatenate([batch[i] for batch in batches[:5]]) for i in range(2))
    assert same_set(found.images, found.labels, x, y)
    assert same_set(found.test_images, found.test_labels, *batches[5])


def test_a_sample_is_drawn_from_what_is_large(mnist, monkeypatch):
    monkeypatch.setattr(data, "TRAIN_LIMIT", 7)
    monkeypatch.setattr(data, "TEST_LIMIT", 5)
    found = data.load(mnist[0])
    assert len(found.images) == len(found.labels) == 7 and len(found.test_images) == 5


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_a_pickle_that_calls_something_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path, binary=False, payload=pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"expected arrays in a batch of CIFAR-10, got .*system"):
        data.load(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_what_is_not_whole_is_refused(mnist, tmp_path_factory):
    path, _ = mnist
    file = path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: expected bytes in the IDX"):
        data.load(path)
    file.unlink()
    with pytest.raises(ValueError, match="expected the files of MNIST"):
        data.load(path)
    cifar = tmp_path_factory.mktemp("cifar")
    write_cifar(cifar, binary=True)
    (cifar / "test_batch.bin").write_bytes(b"x" * 3072)
    with pytest.raises(ValueError, match="expected records of 3073 bytes, got 3072 bytes"):
        data.load(cifar)
