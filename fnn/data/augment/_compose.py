"""What an augmentation is, and several of them as one."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fnn import random

Augmentation = Callable[[Tensor, Tensor], Tensor]


def compose(*augmentations: Augmentation) -> Augmentation:
    """One augmentation after another; number i draws from ``random.fold_in(key, i)``.

    augmentations: functions (key, images) -> images, those of this module or your own
    returns a function of the same form

    Raises `TypeError` for an argument that is no function.

    Example:
        >>> from fnn import random
        >>> brighter = lambda key, images: images + random.uniform(key, (len(images), 1, 1, 1))
        >>> change = compose(brighter, lambda key, images: images.clamp(0, 1))
        >>> change(random.key(0), torch.ones(2, 1, 1, 1)).flatten()
        tensor([1., 1.])
    """
    for number, augmentation in enumerate(augmentations):
        if not callable(augmentation):
            raise TypeError(
                f"augment.compose: argument {number} is {type(augmentation).__name__}, expected a function "
                f"(key, images) -> images, such as augment.flip()"
            )

    def apply(key: Tensor, images: Tensor) -> Tensor:
        for number, augmentation in enumerate(augmentations):
            images = augmentation(random.fold_in(key, number), images)
        return images

    return apply


def check_images(images: Tensor, name: str) -> None:
    """Raise unless `images` is a floating batch (n, channels, height, width)."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        what = f"of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"augment.{name}: images are {what}, expected a tensor (n, channels, height, width); "
            f"images[None] makes a batch of one image"
        )
    if not images.is_floating_point():
        raise TypeError(
            f"augment.{name}: images are {images.dtype}, expected a floating dtype; data.preprocess makes one of pixels"
        )


def check_number(value: float, name: str, argument: str, *, least: float, most: float | None = None) -> float:
    """`value` as a float; raises unless it lies between `least` and `most`."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= least
    if not good or (most is not None and value > most):
        bounds = f"at least {least:g}" if most is None else f"from {least:g} to {most:g}"
        raise ValueError(f"augment.{name}: {argument} is {value!r}, expected a number {bounds}")
    return float(value)
