"""What the functions of `fnn.random` accept: shapes, dtypes and bounds, checked with errors that name the argument."""

import operator
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def describe(value: object) -> str:
    """What came, for an error: tensors by dtype and shape, the rest by type and value."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"


def as_integer(value: object) -> int | None:
    """`value` as an integer, None if it is none. A compiler's symbolic integer stays symbolic."""
    if isinstance(value, (int, torch.SymInt)):
        return value  # pyright: ignore[reportReturnType]
    if isinstance(value, Tensor):
        return None  # its __index__ would wait for the device
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def check_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """`shape` as a tuple of sizes."""
    sizes = []
    for size in shape if isinstance(shape, (tuple, list)) else [None]:
        size = as_integer(size)
        if size is None:
            raise TypeError(f"`{name}` is a tuple of sizes such as (3,) or (), not {describe(shape)}.")
        if size < 0:
            raise ValueError(f"`{name}` has no negative sizes, but is {describe(shape)}.")
        sizes.append(size)
    return tuple(sizes)


def check_dtype(name: str, dtype: torch.dtype, allowed: Sequence[torch.dtype]) -> None:
    """Raise unless `dtype`, of what `name` says, is an allowed one."""
    if dtype not in allowed:
        raise TypeError(f"{name} is one of {', '.join(map(str, allowed))}, not {dtype!r}.")


def check_broadcast(shape: tuple[int, ...], **parameters: Tensor) -> None:
    """Raise unless the parameters broadcast to `shape` without changing it."""
    for name, value in parameters.items():
        fits = value.ndim <= len(shape) and all(
            size in (1, given) for size, given in zip(reversed(value.shape), reversed(shape), strict=False)
        )
        if not fits:
            raise ValueError(f"`{name}` of shape {tuple(value.shape)} does not broadcast to `shape` {tuple(shape)}.")


def real_tensor(name: str, value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A real number or tensor as a tensor of `dtype`; a tensor keeps its gradient."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"`{name}` is a real number or a tensor of real numbers, not {describe(value)}.")
        return value.to(dtype)
    if not isinstance(value, (int, float)) and not isinstance(value, Real):
        raise TypeError(f"`{name}` is a real number or a tensor of real numbers, not {describe(value)}.")
    return torch.full((), value, dtype=dtype, device=device)
