"""The images: scikit-learn's handwritten digits, or MNIST or CIFAR-10 from a folder."""

import gzip
import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import train

CLASSES = 10
# A run takes a few thousand steps of 60 images, and the test set is looked at again and again.
TRAIN_LIMIT, TEST_LIMIT = 20_000, 2_000


class Data(NamedTuple):
    name: str
    images: Tensor  # [N, C, H, W] in 0 ... 1
    labels: Tensor  # [N]
    test_images: Tensor
    test_labels: Tensor

    @property
    def words(self) -> str:
        size = "x".join(map(str, self.images.shape[1:]))
        counts = f"{len(self.labels)} training images, {len(self.test_labels)} test images"
        return f"{self.name}: {counts} of {size}"


def load(folder: Path | None) -> Data:
    """The digits, or what is in the folder; ValueError if that is neither MNIST nor CIFAR-10."""
    if folder is None:
        return Data("digits", *train.digits())
    for inside in (folder, *(folder / name for name in FOLDERS)):
        for name, files, read in SETS:
            paths = [[_existing(inside / file) for file in part] for part in files]
            if all(path for part in paths for path in part):
                return _data(name, *(read([p for p in part if p]) for part in paths))
    raise ValueError(
        f"{folder}: expected the files of MNIST ({SETS[0][1][0][0]} ...) or CIFAR-10 "
        f"({SETS[1][1][0][0]} ... or {SETS[2][1][0][0]} ...), got none of them whole"
    )


def _existing(path: Path) -> Path | None:
    packed = path.with_name(f"{path.name}.gz")
    return path if path.is_file() else packed if packed.is_file() else None


def _bytes(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _mnist(paths: list[Path]) -> tuple[Any, Any]:
    """Images and labels in the IDX format: a magic number, the sizes, then bytes."""
    arrays = []
    for path in paths:
        content = _bytes(path)
        dims = content[3] if len(content) > 3 else 0
        sizes = np.frombuffer(content[4 : 4 + 4 * dims], ">u4").astype(int)
        if content[:3] != b"\0\0\x08" or len(content) != 4 + 4 * dims + sizes.prod():
            raise ValueError(f"{path}: expected bytes in the IDX format, got something else")
        arrays.append(np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(sizes))
    return arrays[0][:, None], arrays[1]


def _cifar_binary(paths: list[Path]) -> tuple[Any, Any]:
    """Records of a label and 3 x 32 x 32 bytes."""
    rows = np.concatenate([_rows(path, _bytes(path)) for path in paths])
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def _rows(path: Path, content: bytes) -> Any:
    if not content or len(content) % 3073:
        raise ValueError(f"{path}: expected records of 3073 bytes, got {len(content)} bytes")
    return np.frombuffer(content, np.uint8).reshape(-1, 3073)


class _ArraysOnly(pickle.Unpickler):
    """A pickle may call anything: this one only makes arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return np.empty(0).__reduce__()[0] if name == "_reconstruct" else getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise ValueError(f"expected arrays in a batch of CIFAR-10, got {module}.{name}")


def _cifar_python(paths: list[Path]) -> tuple[Any, Any]:
    batches = [_ArraysOnly(io.BytesIO(_bytes(p)), encoding="latin1").load() for p in paths]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return images, np.concatenate([batch["labels"] for batch in batches])


FOLDERS = ("MNIST/raw", "raw", "cifar-10-batches-bin", "cifar-10-batches-py")
SETS = (
    (
        "MNIST",
        [[f"{part}-{what}-ubyte" for what in ("images-idx3", "labels-idx1")]
         for part in ("train", "t10k")],
        _mnist,
    ),
    (
        "CIFAR-10",
        [[f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]],
        _cifar_binary,
    ),
    ("CIFAR-10", [[f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]], _cifar_python),
)  # fmt: skip


def _data(name: str, *parts: tuple[Any, Any]) -> Data:
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for (images, labels), limit in zip(parts, (TRAIN_LIMIT, TEST_LIMIT), strict=True):
        some = torch.randperm(len(labels), generator=generator)[:limit]
        tensors += [torch.tensor(images)[some].float() / 255, torch.tensor(labels)[some].long()]
    return Data(name, *tensors)
