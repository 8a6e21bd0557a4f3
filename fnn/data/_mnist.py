"""MNIST, and Fashion-MNIST in the same format."""

from __future__ import annotations

import os

from fnn.data._idx import from_idx
from fnn.data._images import ImageDataset

DIGITS = tuple(str(digit) for digit in range(10))
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def mnist(root: str | os.PathLike[str], *, download: bool = False, pad: int = 2) -> ImageDataset:
    """MNIST's handwritten digits from the IDX files under ``root/MNIST/raw``.

    root: the folder that holds, or shall hold, ``MNIST/raw``
    download: let torchvision fetch the files, checked against their MD5 sums, where one is missing
    pad: pixels of black on each side; 2 makes the 28 x 28 images the 32 x 32 that LeNet takes
    returns images (n, 1, 28 + 2 pad, 28 + 2 pad) float32, standardised by the training images; labels (n,) int64

    Raises `FileNotFoundError` that names the folder and the missing files, `ValueError` for files that are damaged
    or do not belong together, `OSError` for a download that fails, and `ImportError` for a download where torchvision
    is absent.

    Example:
        >>> mnist("data", download=True)  # doctest: +SKIP
        ImageDataset(mnist: 60000 training and 10000 test images, 1 x 32 x 32, 10 classes)

    Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied to document recognition (1998).
    """
    return from_idx("mnist", root, "MNIST", DIGITS, download=download, pad=pad)


def fashion_mnist(root: str | os.PathLike[str], *, download: bool = False, pad: int = 2) -> ImageDataset:
    """Fashion-MNIST's photographs of clothes from the IDX files under ``root/FashionMNIST/raw``.

    root: the folder that holds, or shall hold, ``FashionMNIST/raw``
    download, pad, the result and what is raised: as in `mnist`

    Example:
        >>> fashion_mnist("data", download=True)  # doctest: +SKIP
        ImageDataset(fashion_mnist: 60000 training and 10000 test images, 1 x 32 x 32, 10 classes)

    Source: H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking machine learning
    algorithms (2017).
    """
    return from_idx("fashion_mnist", root, "FashionMNIST", CLOTHES, download=download, pad=pad)
