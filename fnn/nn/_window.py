"""Windows that slide over images, those of convolutions and of pooling: their sizes, checked by name."""

from __future__ import annotations

from torch import Tensor

from fnn.nn._layer import Layer

Size = int | tuple[int, ...]

AXES = {1: "L", 2: "H, W", 3: "D, H, W"}


def per_axis(value: Size, dims: int) -> tuple[int, ...]:
    """A number for all axes, or one for each."""
    return (value,) * dims if isinstance(value, int) else value


def check_sizes(layer: Layer, dims: int, **least: int) -> None:
    """Raise unless each named field of the layer is a whole number, or one an axis, of at least this value."""
    for name, lowest in least.items():
        value = getattr(layer, name)
        values = value if isinstance(value, tuple) else (value,) * dims
        whole = all([isinstance(v, int) and not isinstance(v, bool) for v in values])
        if not whole or len(values) != dims or min(values) < lowest:
            several = "" if dims == 1 else f" or a tuple of {dims}, one an axis"
            raise ValueError(
                f"{type(layer).__name__}: {name} must be a whole number of at least {lowest}{several}, got {value!r}"
            )


def check_count(layer: Layer, **values: int) -> None:
    """Raise unless each value is a whole number of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(layer).__name__}: {name} must be a whole number of at least 1, got {value!r}")


def space(layer: Layer, x: Tensor, dims: int) -> tuple[int, ...]:
    """The sizes of the image's axes, after a check that x is (N, C, *space) or (C, *space)."""
    if x.dim() not in (dims + 1, dims + 2):
        axes = AXES[dims]
        raise ValueError(
            f"{type(layer).__name__}: expected an input of shape (N, C, {axes}) or (C, {axes}), got {tuple(x.shape)}"
        )
    return tuple(x.shape[-dims:])


def check_fit(
    layer: Layer, sizes: tuple[int, ...], kernel: Size, padding: Size, dilation: Size = 1, slack: Size = 0
) -> None:
    """Raise where the window is larger than the padded image, of which it may overlap the end by `slack`."""
    dims = len(sizes)
    fields = (per_axis(value, dims) for value in (kernel, padding, dilation, slack))
    for axis, (size, taps, pad, step, over) in enumerate(zip(sizes, *fields, strict=True)):
        span = (taps - 1) * step + 1
        if size + 2 * pad + over < span:
            padded = f" and padding {pad} on both sides" if pad else ""
            raise ValueError(
                f"{type(layer).__name__}: the window spans {span} along {AXES[dims].split(', ')[axis]}, "
                f"the input only {size}{padded}; got an image of {sizes}"
            )
