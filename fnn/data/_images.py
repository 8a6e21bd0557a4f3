"""Images for classification: the data set, and the preprocessing that turns pixels into a model's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images, split into training and test part, ready for a model.

    train, test: (images, labels); images (n, channels, height, width) float32, labels (n,) int64
    classes: the name of each label
    preprocessing: the arguments of `preprocess` that made these images, as plain values for a JSON file:
        ``preprocess(pixels, **dataset.preprocessing)`` turns other pixels into the same kind of input
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        _, channels, height, width = self.train[0].shape
        return channels, height, width

    def __repr__(self) -> str:
        shape = " x ".join(str(n) for n in self.image_shape)
        return (
            f"ImageDataset({self.name}: {len(self.train[1])} training and {len(self.test[1])} test images, "
            f"{shape}, {len(self.classes)} classes)"
        )


def preprocess(
    pixels: Tensor,
    *,
    scale: float,
    size: Sequence[int] | None,
    pad: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Pixels as a model's input: divided, resized, padded with black, standardised, in this order.

    pixels: (n, height, width) or (n, channels, height, width), any number type
    scale: the value of the brightest pixel, which becomes 1
    size: (height, width) to resize to, bilinear, corners not aligned, no antialiasing; None keeps the size
    pad: pixels of black to add on each side
    mean, std: of each channel, after the steps before; a data set takes them from its training images
    returns (n, channels, height, width) float32

    Raises `ValueError` for another number of dimensions or of channels.

    Example:
        >>> dark = torch.zeros(5, 28, 28, dtype=torch.uint8)
        >>> preprocess(dark, scale=255, size=None, pad=2, mean=[0.1], std=[0.25]).shape
        torch.Size([5, 1, 32, 32])
    """
    images = _scaled(pixels, scale, size, pad)
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"preprocess: mean and std are of {len(mean)} and {len(std)} channels, pixels of {images.shape[1]}; "
            f"expected one number for each channel"
        )
    center = torch.tensor(mean, dtype=torch.float32, device=images.device).reshape(-1, 1, 1)
    spread = torch.tensor(std, dtype=torch.float32, device=images.device).reshape(-1, 1, 1)
    return (images - center) / spread


def from_pixels(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: Sequence[str],
    *,
    scale: float,
    size: Sequence[int] | None = None,
    pad: int = 0,
) -> ImageDataset:
    """The data set of these pixels and labels, standardised by its training images as the model sees them."""
    images = _scaled(train[0], scale, size, pad)
    # One channel after the other: 50,000 colour images in float64 take 1.2 GB.
    channels = [torch.std_mean(channel.double(), correction=0) for channel in images.unbind(1)]
    std, mean = (torch.stack(statistic) for statistic in zip(*channels, strict=True))
    if not bool((std > 0).all()):
        raise ValueError(f"{name}: all pixels of the training images are equal; the files are damaged, take others")
    preprocessing: dict[str, Any] = {
        "scale": scale,
        "size": None if size is None else list(size),
        "pad": pad,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }
    parts = [(preprocess(pixels, **preprocessing), labels.long()) for pixels, labels in (train, test)]
    return ImageDataset(name, parts[0], parts[1], tuple(classes), preprocessing)


def _scaled(pixels: Tensor, scale: float, size: Sequence[int] | None, pad: int) -> Tensor:
    if pixels.ndim not in (3, 4):
        raise ValueError(
            f"preprocess: pixels have shape {tuple(pixels.shape)}, expected (n, height, width) or "
            f"(n, channels, height, width); pixels[None] makes a batch of one image"
        )
    images = (pixels if pixels.ndim == 4 else pixels.unsqueeze(1)).float() / scale
    if size is not None:
        images = F.interpolate(images, tuple(size), mode="bilinear", align_corners=False)
    return F.pad(images, (pad, pad, pad, pad))
