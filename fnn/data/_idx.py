"""Images and labels in four IDX files, the format of MNIST and of data sets made to take its place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fnn import _ranks
from fnn.data._images import ImageDataset, from_pixels
from fnn.data._torchvision import torchvision

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CURE = "delete it and fetch it again with download=True"


def from_idx(
    name: str, root: str | os.PathLike[str], source: str, classes: Sequence[str], *, download: bool, pad: int
) -> ImageDataset:
    """The data set that `torchvision.datasets` calls `source`, read from ``root/source/raw``."""
    if not isinstance(pad, int) or isinstance(pad, bool) or pad < 0:
        raise ValueError(f"{name}: pad is {pad!r}, expected a whole number of pixels, such as 2")
    root = Path(root).expanduser()
    folder = root / source / "raw"
    if download:  # by one process for all
        _ranks.on_main(name, lambda: _fetch(name, root, source) if _missing(folder) else None)
    if missing := _missing(folder):
        raise FileNotFoundError(
            f"{name}: {folder.absolute()} has no {', '.join(missing)}; "
            f"give the folder that holds {source}/raw as root, or fetch the files with download=True"
        )
    train, test = (_half(name, folder, files, len(classes)) for files in (FILES[:2], FILES[2:]))
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"{name}: training images are {tuple(train[0].shape[1:])}, test images {tuple(test[0].shape[1:])}; the "
            f"files in {folder.absolute()} do not belong together, delete them and fetch them with download=True"
        )
    return from_pixels(name, train, test, classes, scale=255.0, pad=pad)


def _missing(folder: Path) -> list[str]:
    return [file for file in FILES if not (folder / file).is_file()]


def _fetch(name: str, root: Path, source: str) -> None:
    torchvision()
    from torchvision import datasets

    folder = root / source / "raw"
    try:
        getattr(datasets, source)(str(root), download=True)
    except Exception as error:  # it reads the files too: damage to those that are there is found and told by _read
        if _missing(folder):
            raise OSError(
                f"{name}: could not download into {folder.absolute()}: {error}; check the network and that the folder "
                f"is writable, or put these files there: {', '.join(FILES)}"
            ) from error


def _half(name: str, folder: Path, files: Sequence[str], classes: int) -> tuple[Tensor, Tensor]:
    """Pixels (n, height, width) uint8 and labels (n,) uint8 of the training or of the test part."""
    pixels, labels = _read(name, folder / files[0], 3), _read(name, folder / files[1], 1)
    if len(pixels) != len(labels) or not len(labels):
        raise ValueError(
            f"{name}: {files[0]} has {len(pixels)} images and {files[1]} {len(labels)} labels in {folder.absolute()}, "
            f"expected the same number, at least 1; delete both and fetch them again with download=True"
        )
    if labels.max() >= classes:
        raise ValueError(
            f"{name}: {folder.absolute() / files[1]} has the label {labels.max()} for image {labels.argmax()}, "
            f"expected 0 to {classes - 1}; it is damaged or of another data set, {CURE}"
        )
    return pixels, labels


def _read(name: str, path: Path, ndim: int) -> Tensor:
    """The bytes of one file: two of zero, 8 for the type uint8, the number of axes, their lengths, the values."""
    content = np.fromfile(path, dtype=np.uint8)
    start = 4 + 4 * ndim
    if content[:4].tolist() != [0, 0, 8, ndim] or len(content) < start:
        raise ValueError(
            f"{name}: {path.absolute()} does not start as an IDX file of bytes along {ndim} axes does; it is damaged "
            f"or cut short, {CURE}"
        )
    shape = [int(length) for length in content[4:start].view(">u4")]
    size = int(np.prod(shape, dtype=object))
    if len(content) != start + size:
        raise ValueError(
            f"{name}: {path.absolute()} has {len(content):,} bytes, but its header says {' x '.join(map(str, shape))} "
            f"values, which is {start + size:,} bytes; it is damaged or cut short, {CURE}"
        )
    return torch.from_numpy(content[start:].reshape(shape))
