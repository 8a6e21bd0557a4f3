"""torchvision's transforms as augmentations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fnn import random
from fnn.data import _generators
from fnn.data.augment._compose import Augmentation


def torchvision(transform: Callable[[Tensor], Any]) -> Augmentation:
    """A transform of `torchvision.transforms.v2`, or any other that draws from global generators, governed by a key.

    transform: a function images -> images, on the images' device. torchvision's draw once for all images of a batch,
        a draw for each image needs the transform inside the `Dataset` that a `Loader` reads
    returns a function (key, images) -> images. The global generators of torch, numpy and Python are seeded with
        ``random.bits(key, (), torch.int64)`` for the call, and put back after it

    It does not run inside a compiled step, nor under `torch.func` transforms: change the batches of the loader,
    before the step. Raises `TypeError` for a transform that is no function, `RuntimeError` where it cannot run.

    Example:
        >>> change = torchvision(lambda images: images + torch.rand(()))  # or v2.ColorJitter(brightness=0.3)
        >>> key, images = fnn.random.key(0), torch.zeros(8, 3, 32, 32)
        >>> torch.equal(change(key, images), change(key, images))
        True
    """
    if not callable(transform):
        raise TypeError(
            f"augment.torchvision: transform is {type(transform).__name__}, expected a function images -> images, such "
            f"as torchvision.transforms.v2.RandomHorizontalFlip()"
        )

    def apply(key: Tensor, images: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:  # type: ignore[attr-defined]
            raise RuntimeError(
                "augment.torchvision: a transform that draws from global generators runs neither inside a compiled "
                "step nor under torch.func; change the batches before the step, or take one of fnn.data.augment's own"
            )
        with _generators.kept(images.device):
            _generators.seed(int(random.bits(key, (), torch.int64)), images.device)
            return transform(images)

    return apply
