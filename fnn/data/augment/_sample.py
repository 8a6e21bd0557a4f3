"""Reading images at other places than their pixels, in operations that every transform and the compiler take.

`torch.nn.functional.grid_sample` gives the same numbers, but has no forward-mode derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

PADDING_MODES = ("zeros", "border", "reflection")


def check_padding_mode(padding_mode: str, name: str) -> None:
    """Raise unless `padding_mode` is one of `PADDING_MODES`."""
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"augment.{name}: padding_mode is {padding_mode!r}, expected one of {PADDING_MODES}")


def pick(images: Tensor, rows: Tensor, columns: Tensor, padding_mode: str) -> Tensor:
    """The pixels at whole coordinates, which may lie outside.

    images: (n, channels, height, width). rows, columns: integers that broadcast to (n, height, width).
    Returns (n, channels, height, width).
    """
    height, width = images.shape[-2:]
    example = torch.arange(images.shape[0], device=images.device).reshape(-1, 1, 1, 1)
    channel = torch.arange(images.shape[1], device=images.device).reshape(-1, 1, 1)
    y = _inside(rows, height, padding_mode).unsqueeze(1)
    x = _inside(columns, width, padding_mode).unsqueeze(1)
    picked = images[example, channel, y, x]
    if padding_mode != "zeros":
        return picked
    there = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return torch.where(there.unsqueeze(1), picked, 0.0)


def bilinear(images: Tensor, y: Tensor, x: Tensor, padding_mode: str) -> Tensor:
    """The images at places between pixels, whose centres are at whole coordinates.

    images: (n, channels, height, width). y, x: (n, height, width), at least float32, as the sums are.
    Returns (n, channels, height, width), in the dtype of images.
    """
    top, left = y.floor(), x.floor()
    down, right = (y - top).unsqueeze(1), (x - left).unsqueeze(1)
    rows, columns = top.long(), left.long()

    def tap(step_down: int, step_right: int) -> Tensor:
        return pick(images, rows + step_down, columns + step_right, padding_mode).to(y.dtype)

    above = tap(0, 0) * (1 - right) + tap(0, 1) * right
    below = tap(1, 0) * (1 - right) + tap(1, 1) * right
    return (above * (1 - down) + below * down).to(images.dtype)


def _inside(places: Tensor, size: int, padding_mode: str) -> Tensor:
    """The pixel that stands for each place: itself inside, and outside the one that `padding_mode` says."""
    if padding_mode == "reflection":
        places = torch.remainder(places, 2 * size)
        places = torch.where(places < size, places, 2 * size - 1 - places)
    return places.clamp(0, size - 1)
