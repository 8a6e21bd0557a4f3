"""`synchronised`: whose batch it is of which a layer takes statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from fnn.ops._collectives import all_gather


class _Setting:
    group: str = ""
    count: int = 1


setting = _Setting()


class synchronised:
    """Inside of a `with` block, the batch of a `BatchNorm` in training is that of all processes of a group.

    A compiled function reads this while it is traced, and is traced again if it has changed.
    """

    def __init__(self, group: str, count: int) -> None:
        self.group, self.count = group, count

    def __enter__(self) -> None:
        self.before = setting.group, setting.count
        setting.group, setting.count = self.group, self.count

    def __exit__(self, *_: object) -> None:
        setting.group, setting.count = self.before


def processes() -> int:
    """How many processes have a part of the batch."""
    return setting.count


def var_mean(values: Tensor, axes: list[int], number: int) -> tuple[Tensor, Tensor, Tensor | float]:
    """Variance and mean over `axes` and over the parts of the processes, and what makes the variance unbiased.

    values: (..., channels, ...), all axes but one in `axes` -> (channels,). number: of values a channel in this part.
    The variance is the mean square of the deviations; multiplied by the third it is an unbiased estimate.
    Parts may differ in size. They are combined by their means and variances, which loses no digits.

    Source: Chan, Golub and LeVeque, 1979.
    """
    variance, mean = torch.var_mean(values, axes, correction=0)
    if setting.count == 1:
        return variance, mean, number / max(1, number - 1)
    mine = torch.stack([mean, variance, torch.full_like(mean, number)])
    means, variances, numbers = all_gather(mine[None], setting.group, setting.count).unbind(1)
    total = numbers.sum(0)
    mean = (numbers * means).sum(0) / total
    variance = (numbers * (variances + (means - mean).square())).sum(0) / total
    return variance, mean, total / (total - 1)
