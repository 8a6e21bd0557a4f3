"""Rotation, scale and translation about the centre, read between the pixels (bilinear)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fnn import random
from fnn.data.augment._compose import Augmentation, check_images, check_number
from fnn.data.augment._sample import bilinear, check_padding_mode


def rotate(degrees: float, *, padding_mode: str = "reflection") -> Augmentation:
    """Rotate about the centre by a random angle: ``affine(degrees=degrees)``.

    degrees: the largest angle, in either direction
    padding_mode: "zeros", "border" or "reflection", what comes in from outside
    returns a function (key, images (n, channels, height, width) floating) -> images of the same shape and dtype

    Raises `ValueError` for a negative angle or another mode.

    Example:
        >>> rotate(10.0)(fnn.random.key(0), torch.zeros(8, 3, 32, 32)).shape
        torch.Size([8, 3, 32, 32])
    """
    degrees = check_number(degrees, "rotate", "degrees", least=0)
    return _affine("rotate", degrees, 0.0, (1.0, 1.0), padding_mode)


def scale(low: float, high: float, *, padding_mode: str = "reflection") -> Augmentation:
    """Shrink or enlarge about the centre by a random factor: ``affine(scale=(low, high))``.

    low, high: the factors; under 1 shrinks what is seen, over 1 enlarges it
    padding_mode: "zeros", "border" or "reflection", what comes in from outside
    returns a function (key, images (n, channels, height, width) floating) -> images of the same shape and dtype

    Raises `ValueError` unless 0 < low <= high, and for another mode.

    Example:
        >>> scale(0.8, 1.25)(fnn.random.key(0), torch.zeros(8, 3, 32, 32)).shape
        torch.Size([8, 3, 32, 32])
    """
    return _affine("scale", 0.0, 0.0, _factors((low, high), "scale"), padding_mode)


def affine(
    *,
    degrees: float = 0.0,
    translate: float = 0.0,
    scale: Sequence[float] = (1.0, 1.0),
    padding_mode: str = "reflection",
) -> Augmentation:
    """Scale and rotate about the centre, then translate, in one reading of the image.

    degrees: the largest angle; image i turns counter-clockwise by ``degrees * (2 * u[i, 0] - 1)``, where u is
        ``random.uniform(key, (n, 4), dtype)``, in float64 for float64 images and in float32 for others
    translate: the largest shift as a part of the side; image i moves by ``translate * (2 * u[i, 1:3] - 1)`` times
        (height, width), down and to the right
    scale: (low, high); image i is enlarged ``low + (high - low) * u[i, 3]`` times
    padding_mode: "zeros", "border" or "reflection", what comes in from outside
    returns a function (key, images (n, channels, height, width) floating) -> images of the same shape and dtype

    Raises `ValueError` for negative angles or shifts, factors that are not 0 < low <= high, and another mode.

    Example:
        >>> change = affine(degrees=10, translate=0.1, scale=(0.9, 1.1))
        >>> change(fnn.random.key(0), torch.zeros(8, 3, 32, 32)).shape
        torch.Size([8, 3, 32, 32])

    Source: `torchvision.transforms.v2.RandomAffine` with bilinear interpolation, with a draw for each image.
    """
    degrees = check_number(degrees, "affine", "degrees", least=0)
    translate = check_number(translate, "affine", "translate", least=0)
    return _affine("affine", degrees, translate, _factors(scale, "affine"), padding_mode)


def _factors(scale: Sequence[float], name: str) -> tuple[float, float]:
    try:
        low, high = map(float, scale)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 < low <= high < math.inf:
        raise ValueError(f"augment.{name}: the factors are {scale!r}, expected 0 < low <= high, such as (0.8, 1.25)")
    return low, high


def _affine(name: str, degrees: float, translate: float, scale: tuple[float, float], padding_mode: str) -> Augmentation:
    check_padding_mode(padding_mode, name)

    def apply(key: Tensor, images: Tensor) -> Tensor:
        check_images(images, name)
        n, _, height, width = images.shape
        # A bfloat16 cannot tell the places of neighbouring pixels apart.
        dtype = torch.promote_types(images.dtype, torch.float32)

        # One draw for all: each costs a compiled step 150 nodes.
        turn, down, right, size = random.uniform(key, (n, 4), dtype).reshape(n, 4, 1, 1).unbind(1)
        angle = math.radians(degrees) * (2 * turn - 1)
        down, right = translate * height * (2 * down - 1), translate * width * (2 * right - 1)
        factor = scale[0] + (scale[1] - scale[0]) * size
        cos, sin = angle.cos() / factor, angle.sin() / factor
        middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
        # Where each pixel of the result comes from, so the inverse of what the image does; rows count downwards.
        y = torch.arange(height, dtype=dtype, device=images.device).reshape(-1, 1) - middle_y - down
        x = torch.arange(width, dtype=dtype, device=images.device) - middle_x - right
        return bilinear(images, x * sin + y * cos + middle_y, x * cos - y * sin + middle_x, padding_mode)

    return apply
