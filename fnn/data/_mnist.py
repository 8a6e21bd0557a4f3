"""MNIST from its own files, read and downloaded by torchvision."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from fnn.data._images import ImageDataset, from_pixels
from fnn.data._torchvision import torchvision

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def mnist(root: str | os.PathLike[str], *, download: bool = False, pad: int = 2) -> ImageDataset:
    """MNIST's handwritten digits from the IDX files under ``root/MNIST/raw``.

    root: the folder that holds, or shall hold, ``MNIST/raw``
    download: fetch the files where they are missing
    pad: pixels of black on each side; 2 makes the 28 x 28 images the 32 x 32 that LeNet takes
    returns images (n, 1, 28 + 2 pad, 28 + 2 pad) float32, standardised by the training images; labels (n,) int64

    Raises `FileNotFoundError` that names the folder and the missing files, `ValueError` for files that are damaged
    or do not belong together, `OSError` for a download that fails, `ImportError` where torchvision is absent.

    Example:
        >>> mnist("data", download=True)  # doctest: +SKIP
        ImageDataset(mnist: 60000 training and 10000 test images, 1 x 32 x 32, 10 classes)

    Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document recognition (1998).
    """
    if not isinstance(pad, int) or isinstance(pad, bool) or pad < 0:
        raise ValueError(f"mnist: pad is {pad!r}, expected a whole number of pixels, such as 2")
    root = Path(root).expanduser()
    folder = root / "MNIST" / "raw"
    torchvision()
    from torchvision.datasets import MNIST

    if download:
        _fetch(MNIST, root, folder)
    if missing := _missing(folder):
        raise FileNotFoundError(
            f"mnist: {folder.absolute()} has no {', '.join(missing)}; "
            f"give the folder that holds MNIST/raw as root, or fetch the files with download=True"
        )
    parts = [_read(MNIST, root, folder, train) for train in (True, False)]
    (train_pixels, _), (test_pixels, _) = parts
    if train_pixels.shape[1:] != test_pixels.shape[1:]:
        raise ValueError(
            f"mnist: training images are {tuple(train_pixels.shape[1:])}, test images {tuple(test_pixels.shape[1:])}; "
            f"the files in {folder.absolute()} do not belong together, delete them and fetch them with download=True"
        )
    return from_pixels("mnist", parts[0], parts[1], [str(digit) for digit in range(10)], scale=255.0, pad=pad)


def _missing(folder: Path) -> list[str]:
    return [name for name in FILES if not (folder / name).is_file()]


def _fetch(reader: type, root: Path, folder: Path) -> None:
    try:
        reader(str(root), download=True)
    except Exception as error:  # it reads the files too: damage to those that are there is found and told by _read
        if _missing(folder):
            raise OSError(
                f"mnist: could not download into {folder.absolute()}: {error}; check the network and that the folder "
                f"is writable, or put these files there: {', '.join(FILES)}"
            ) from error


def _read(reader: type, root: Path, folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Pixels (n, height, width) uint8 and labels (n,) int64 of one half."""
    images_file, labels_file = FILES[:2] if train else FILES[2:]
    cure = "delete them and fetch them again with download=True"
    try:
        half = reader(str(root), train=train)
    except Exception as error:  # torchvision raises whatever its parsing trips over, asserts among them
        raise ValueError(
            f"mnist: {images_file} or {labels_file} in {folder.absolute()} is damaged or cut short "
            f"({type(error).__name__}: {error}); {cure}"
        ) from error
    pixels, labels = half.data, half.targets
    if len(pixels) != len(labels) or not len(labels):
        raise ValueError(
            f"mnist: {images_file} has {len(pixels)} images and {labels_file} {len(labels)} labels in "
            f"{folder.absolute()}, expected the same number, at least 1; {cure}"
        )
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(
            f"mnist: {labels_file} in {folder.absolute()} has labels from {labels.min()} to {labels.max()}, "
            f"expected 0 to 9; {cure}"
        )
    return pixels, labels
