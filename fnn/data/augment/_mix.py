"""Mixtures of two examples, and of their labels with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fnn import random
from fnn.data.augment._compose import check_images, check_number

Mixing = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def mixup(alpha: float, classes: int) -> Mixing:
    """Mix each example with the one before it in the batch: ``w x[i] + (1 - w) x[i - 1]``, labels likewise.

    alpha: over 0; the weights w follow the distribution Beta(alpha, alpha), each example's a draw of its own. 1 makes
        all mixtures equally likely, less leaves most examples nearly as they are
    classes: how many there are
    returns a function (key, x (n, ...) floating, labels (n,) integers) -> (x, labels (n, classes)), which are
        probabilities, float32 or that of x where it is wider, as `losses.cross_entropy` takes them

    A label out of range has probabilities of NaN, and so has its partner in the mixture: the loss will not be finite.
    Raises `ValueError` for arguments and shapes that do not fit.

    Example:
        >>> x, labels = mixup(0.2, classes=3)(fnn.random.key(0), torch.eye(4), torch.tensor([0, 1, 2, 0]))
        >>> x.shape, labels.shape, labels.sum(1)
        (torch.Size([4, 4]), torch.Size([4, 3]), tensor([1., 1., 1., 1.]))

    Source: Zhang et al., mixup: Beyond Empirical Risk Minimization (2018), and `torchvision.transforms.v2.MixUp`, which
    gives the batch one weight.
    """
    alpha, classes = _check_arguments("mixup", alpha, classes)

    def apply(key: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        _check_batch("mixup", x, labels)
        weight = _beta(key, alpha, len(x), torch.promote_types(x.dtype, torch.float32))
        share = weight.reshape(-1, *[1] * (x.ndim - 1))
        mixed = share * x + (1 - share) * x.roll(1, 0)
        return mixed.to(x.dtype), _mixed_labels(labels, classes, weight)

    return apply


def cutmix(alpha: float, classes: int) -> Mixing:
    """Replace a box of each image by what the image before it in the batch has there, and mix the labels by area.

    alpha: over 0; the share w of an image that is left follows Beta(alpha, alpha), before its box is cut at the
        border. Each image has a box of its own, ``sqrt(1 - w)`` times as high and wide as the image, with the centre
        ``floor((height, width) * random.uniform(random.split(key)[1], (n, 2))[i])``
    classes: how many there are
    returns a function (key, images (n, channels, height, width) floating, labels (n,) integers) -> (images,
        labels (n, classes)), as `mixup` does

    Raises `ValueError` for arguments and shapes that do not fit.

    Example:
        >>> images, labels = cutmix(1.0, classes=2)(
        ...     fnn.random.key(0), torch.eye(2).reshape(2, 2, 1, 1).expand(2, 2, 8, 8), torch.tensor([0, 1])
        ... )
        >>> torch.equal(images.mean((2, 3)), labels)
        True

    Source: Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features (2019),
    and `torchvision.transforms.v2.CutMix`, which gives the batch one box.
    """
    alpha, classes = _check_arguments("cutmix", alpha, classes)

    def apply(key: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        check_images(images, "cutmix")
        _check_batch("cutmix", images, labels)
        n, _, height, width = images.shape
        share_key, place_key = random.split(key).unbind()
        dtype = torch.promote_types(images.dtype, torch.float32)
        radius = 0.5 * (1 - _beta(share_key, alpha, n, dtype)).sqrt()

        def covered(drawn: Tensor, side: int) -> Tensor:
            """(n, side) bool: the stretch of half length `radius * side` around its centre, cut at the border."""
            centre, half = (drawn * side).long(), (radius * side).long()
            place = torch.arange(side, device=images.device)
            return (place >= (centre - half).unsqueeze(1)) & (place < (centre + half).unsqueeze(1))

        row, column = random.uniform(place_key, (n, 2)).unbind(1)
        rows, columns = covered(row, height), covered(column, width)
        box = rows.reshape(n, 1, height, 1) & columns.reshape(n, 1, 1, width)
        left = 1 - rows.sum(1).to(dtype) * columns.sum(1) / (height * width)
        return torch.where(box, images.roll(1, 0), images), _mixed_labels(labels, classes, left)

    return apply


def _mixed_labels(labels: Tensor, classes: int, weight: Tensor) -> Tensor:
    """(n, classes): `weight` at an example's own label, the rest at that of the example before it."""
    own = (labels.unsqueeze(1) == torch.arange(classes, device=labels.device)).to(weight.dtype)
    own = own.masked_fill(((labels < 0) | (labels >= classes)).unsqueeze(1), math.nan)
    weight = weight.unsqueeze(1)
    return weight * own + (1 - weight) * own.roll(1, 0)


def _beta(key: Tensor, alpha: float, n: int, dtype: torch.dtype) -> Tensor:
    """(n,) draws of Beta(alpha, alpha), without a loop: a compiled step takes it.

    For alpha + 1, which is over 1/2, (1 + cos(2 pi v) sqrt(1 - u ** (2 / (2 alpha + 1)))) / 2 is exact (polar method).
    A Gamma variable of alpha is one of alpha + 1 times u ** (1 / alpha), which leads back to alpha; in logarithms,
    since such powers underflow. Source: L. Devroye, Non-Uniform Random Variate Generation (1986), IX.3 and IX.4.
    """
    turn, u, first, second = random.uniform(key, (4, n), dtype).unbind()
    cosine = torch.cos(2 * math.pi * turn) * torch.sqrt(1 - (1 - u) ** (2 / (2 * alpha + 1)))
    odds = torch.log1p(cosine) - torch.log1p(-cosine)
    return torch.sigmoid(odds + (torch.log1p(-first) - torch.log1p(-second)) / alpha)


def _check_arguments(name: str, alpha: float, classes: int) -> tuple[float, int]:
    alpha = check_number(alpha, name, "alpha", least=0)
    if alpha == 0:
        raise ValueError(f"augment.{name}: alpha is 0, expected a number over 0; to mix nothing leave {name} out")
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        raise ValueError(f"augment.{name}: classes is {classes!r}, expected how many classes there are, such as 10")
    return alpha, classes


def _check_batch(name: str, x: Tensor, labels: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.ndim or not x.is_floating_point():
        what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"augment.{name}: x is {what}, expected a floating batch (n, ...)")
    if not isinstance(labels, Tensor) or labels.shape != x.shape[:1] or labels.is_floating_point():
        what = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"augment.{name}: labels are {what}, expected one integer for each example, ({len(x)},)")
