"""The handwritten digits that come with scikit-learn: real images without a download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fnn import random
from fnn.data._images import ImageDataset, from_pixels
from fnn.data._split import split


def digits(*, size: int = 8, test_fraction: float = 0.2, key: Tensor | None = None) -> ImageDataset:
    """scikit-learn's 1,797 real 8 x 8 handwritten digits, each digit split in the same proportion.

    size: side length of the images; over 8 they are enlarged (bilinear), 32 is what LeNet takes
    test_fraction: the share of test images, between 0 and 1
    key: of the split; None is `random.key(0)`, so that everybody tests on the same images
    returns images (n, 1, size, size) float32, standardised by the training images; labels (n,) int64

    Raises `ValueError` for a size under 8 or a fraction that leaves a part empty, and `ImportError` where
    scikit-learn is absent.

    Example:
        >>> digits(size=32)
        ImageDataset(digits: 1438 training and 359 test images, 1 x 32 x 32, 10 classes)

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998), the test set.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 8:
        raise ValueError(f"digits: size is {size!r}, expected a whole number of at least 8, such as 8 or 32")
    if not 0 < test_fraction < 1:
        raise ValueError(f"digits: test_fraction is {test_fraction!r}, expected between 0 and 1, such as 0.2")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ImportError('digits needs scikit-learn, which is not installed; pip install "fnn[examples]"') from error
    source: Any = load_digits()
    pixels, labels = torch.from_numpy(source.images), torch.from_numpy(source.target)
    train, test = split(
        (pixels, labels),
        (1 - test_fraction, test_fraction),
        key=random.key(0) if key is None else key,
        stratify=labels,
    )
    classes = [str(digit) for digit in range(10)]
    return from_pixels("digits", train, test, classes, scale=16.0, size=None if size == 8 else (size, size))
