"""CIFAR-10 from the files of its binary version, downloaded by torchvision."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fnn import _ranks
from fnn.data._images import ImageDataset, from_pixels
from fnn.data._torchvision import torchvision

FOLDER = "cifar-10-batches-bin"
TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = "test_batch.bin"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue plane, row by row


def cifar10(root: str | os.PathLike[str], *, download: bool = False) -> ImageDataset:
    """CIFAR-10's small colour photographs from the ``.bin`` files under ``root/cifar-10-batches-bin``.

    root: the folder that holds, or shall hold, ``cifar-10-batches-bin``: the data set's binary version, which unlike
        its Python version is read without unpickling
    download: fetch the 162 MB archive, checked against the MD5 sum on its page, where a file is missing
    returns images (n, 3, 32, 32) float32, each channel standardised by the training images; labels (n,) int64

    Raises `FileNotFoundError` that names the folder and the missing files, `ValueError` for files that are damaged,
    `OSError` for a download that fails, and `ImportError` for a download where torchvision is absent.

    Example:
        >>> cifar10("data", download=True)  # doctest: +SKIP
        ImageDataset(cifar10: 50000 training and 10000 test images, 3 x 32 x 32, 10 classes)

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009).
    """
    root = Path(root).expanduser()
    folder = root / FOLDER
    if download:  # by one process for all
        _ranks.on_main("cifar10", lambda: _fetch(root) if _missing(folder) else None)
    if missing := _missing(folder):
        raise FileNotFoundError(
            f"cifar10: {folder.absolute()} has no {', '.join(missing)}; give the folder that holds {FOLDER} (the "
            f"binary version of the data set) as root, or fetch the files with download=True"
        )
    batches = {name: _read(folder / name) for name in (*TRAIN, TEST)}
    sizes = {name: len(labels) for name, (_, labels) in batches.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"cifar10: the files in {folder.absolute()} hold different numbers of images ({listed}), expected the "
            f"same, 10000 in the original; {_cure(folder)}"
        )
    pixels, labels = (torch.cat(parts) for parts in zip(*(batches[name] for name in TRAIN), strict=True))
    return from_pixels("cifar10", (pixels, labels), batches[TEST], CLASSES, scale=255.0)


def _missing(folder: Path) -> list[str]:
    return [name for name in (*TRAIN, TEST) if not (folder / name).is_file()]


def _fetch(root: Path) -> None:
    torchvision()
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        download_and_extract_archive(URL, str(root), md5=MD5)
    except Exception as error:  # what urllib, the checksum or tarfile raise: OSError, RuntimeError, ReadError, EOFError
        raise OSError(
            f"cifar10: could not download {URL} into {root.absolute()}: {error}; check the network and that the folder "
            f"is writable, or unpack the archive there yourself"
        ) from error


def _read(path: Path) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3, 32, 32) uint8 and labels (n,) int64 of one file."""
    content = np.fromfile(path, dtype=np.uint8)
    if not len(content) or len(content) % RECORD:
        raise ValueError(
            f"cifar10: {path.absolute()} has {len(content):,} bytes, expected a multiple of {RECORD:,} (a label and "
            f"3 x 32 x 32 pixels for each image); it is damaged or cut short, {_cure(path.parent)}"
        )
    records = torch.from_numpy(content).reshape(-1, RECORD)
    labels = records[:, 0].long()
    if labels.max() >= len(CLASSES):
        raise ValueError(
            f"cifar10: {path.absolute()} has the label {labels.max()} in image {labels.argmax()}, expected 0 to 9; it "
            f"is damaged or of another data set, {_cure(path.parent)}"
        )
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def _cure(folder: Path) -> str:
    return f"delete the folder {folder.name} and fetch it again with download=True"
