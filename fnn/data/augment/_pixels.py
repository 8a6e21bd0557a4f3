"""Changes of values: standardisation, noise, and squares cut out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fnn import random
from fnn.data.augment._compose import Augmentation, check_images, check_number


def normalize(mean: Sequence[float], std: Sequence[float]) -> Augmentation:
    """Standardise each channel, ``(images - mean) / std``: a step without chance, for use in `compose`.

    mean, std: one number for each channel; std over 0
    returns a function (key, images (n, channels, height, width) floating) -> images of the same shape and dtype

    Raises `ValueError` for numbers that are not finite, a deviation of 0, and another number of channels.

    Example:
        >>> normalize([0.5], [0.25])(fnn.random.key(0), torch.ones(1, 1, 1, 2))
        tensor([[[[2., 2.]]]])

    Source: `torchvision.transforms.v2.Normalize`.
    """
    try:
        center, spread = [float(value) for value in mean], [float(value) for value in std]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"augment.normalize: mean is {mean!r} and std {std!r}, expected a list with one number for each channel"
        ) from error
    finite = all(math.isfinite(value) for value in center + spread)
    if not center or len(center) != len(spread) or not finite or min(spread) <= 0:
        raise ValueError(
            f"augment.normalize: mean is {center} and std {spread}, expected one finite number for each channel, "
            f"std over 0"
        )

    def apply(key: Tensor, images: Tensor) -> Tensor:
        check_images(images, "normalize")
        if images.shape[1] != len(center):
            raise ValueError(
                f"augment.normalize: images have {images.shape[1]} channels, mean and std are of {len(center)}"
            )
        shift = torch.tensor(center, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)
        scale = torch.tensor(spread, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)
        return (images - shift) / scale

    return apply


def noise(std: float) -> Augmentation:
    """Add normal noise: ``images + std * random.normal(key, images.shape, images.dtype)``.

    std: the standard deviation, in units of the images
    returns a function (key, images (n, channels, height, width) floating) -> images of the same shape and dtype

    Raises `ValueError` for a negative deviation.

    Example:
        >>> noisy = noise(0.1)(fnn.random.key(0), torch.zeros(8, 3, 32, 32))
        >>> round(float(noisy.std()), 2)
        0.1
    """
    std = check_number(std, "noise", "std", least=0)

    def apply(key: Tensor, images: Tensor) -> Tensor:
        check_images(images, "noise")
        return images + std * random.normal(key, images.shape, images.dtype)

    return apply


def cutout(size: int) -> Augmentation:
    """Set a square to zero, the mean of standardised images, in each image at a random place.

    size: the side in pixels. Square i covers rows ``centre - size // 2`` up to, without it, that ``+ size``, columns
        likewise, where its centre is ``floor((height, width) * random.uniform(key, (n, 2))[i])``; near the border less
        of it lies inside
    returns a function (key, images (n, channels, height, width) floating) -> images of the same shape and dtype

    Raises `ValueError` for a size that is no whole number from 1 on.

    Example:
        >>> cut = cutout(2)(fnn.random.key(0), torch.ones(64, 1, 4, 4))
        >>> (16 - cut.sum((1, 2, 3))).unique()
        tensor([1., 2., 4.])

    Source: DeVries, Taylor, Improved Regularization of Convolutional Neural Networks with Cutout (2017).
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"augment.cutout: size is {size!r}, expected a whole number of pixels, such as 8")

    def apply(key: Tensor, images: Tensor) -> Tensor:
        check_images(images, "cutout")
        n, _, height, width = images.shape

        def covered(drawn: Tensor, side: int) -> Tensor:
            start = (drawn * side).long().reshape(n, 1) - size // 2
            place = torch.arange(side, device=images.device)
            return (place >= start) & (place < start + size)

        row, column = random.uniform(key, (n, 2)).unbind(1)
        rows, columns = covered(row, height), covered(column, width)
        return torch.where(rows.reshape(n, 1, height, 1) & columns.reshape(n, 1, 1, width), 0.0, images)

    return apply
