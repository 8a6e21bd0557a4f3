"""Flips and shifts by whole pixels, which change no value."""

from __future__ import annotations

import torch
from torch import Tensor

from fnn import random
from fnn.data.augment._compose import Augmentation, check_images, check_number
from fnn.data.augment._sample import check_padding_mode, pick


def flip(p: float = 0.5) -> Augmentation:
    """Mirror left and right, each image with probability `p`.

    p: between 0 and 1; image i is mirrored where ``random.bernoulli(key, p, (n,))[i]``
    returns a function (key, images (n, channels, height, width) floating) -> images of the same shape and dtype

    Raises `ValueError` for a probability outside 0 to 1.

    Example:
        >>> flip(p=1.0)(fnn.random.key(0), torch.tensor([[[[1.0, 2.0, 3.0]]]]))
        tensor([[[[3., 2., 1.]]]])

    Source: `torchvision.transforms.v2.RandomHorizontalFlip`, with a draw for each image.
    """
    p = check_number(p, "flip", "p", least=0, most=1)

    def apply(key: Tensor, images: Tensor) -> Tensor:
        check_images(images, "flip")
        mirrored = random.bernoulli(key, p, (images.shape[0],)).reshape(-1, 1, 1, 1)
        return torch.where(mirrored, images.flip(-1), images)

    return apply


def crop(padding: int, *, padding_mode: str = "reflection") -> Augmentation:
    """Pad all sides, then cut a window of the old size at a random place: a shift by up to `padding` pixels.

    padding: pixels on each side. Window i starts at row and column
        ``floor((2 * padding + 1) * random.uniform(key, (n, 2))[i])`` of the padded image
    padding_mode: "zeros", "border" or "reflection", what the padding is filled with
    returns a function (key, images (n, channels, height, width) floating) -> images of the same shape and dtype

    Raises `ValueError` for a padding that is no whole number from 0 on, or another mode.

    Example:
        >>> moved = crop(padding=1, padding_mode="zeros")(fnn.random.key(0), torch.ones(64, 1, 3, 3))
        >>> moved.sum((1, 2, 3)).unique()
        tensor([4., 6., 9.])

    Source: `torchvision.transforms.v2.RandomCrop`, with a draw for each image.
    """
    if not isinstance(padding, int) or isinstance(padding, bool) or padding < 0:
        raise ValueError(f"augment.crop: padding is {padding!r}, expected a whole number of pixels, such as 4")
    check_padding_mode(padding_mode, "crop")

    def apply(key: Tensor, images: Tensor) -> Tensor:
        check_images(images, "crop")
        n, _, height, width = images.shape
        down, right = ((random.uniform(key, (n, 2)) * (2 * padding + 1)).long() - padding).unbind(-1)
        rows = down.reshape(-1, 1, 1) + torch.arange(height, device=images.device).reshape(-1, 1)
        columns = right.reshape(-1, 1, 1) + torch.arange(width, device=images.device)
        return pick(images, rows, columns, padding_mode)

    return apply
