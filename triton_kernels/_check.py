"""What every operator asks of its operands."""

import torch
from torch import Tensor

FLOATING = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))


def floating(name: str, **operands: Tensor | None) -> None:
    """Raises unless all operands are floating tensors of one dtype on one device."""
    first: tuple[str, Tensor] | None = None
    for argument, tensor in operands.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            cure = "" if tensor.is_complex() or tensor.is_floating_point() else f"; use {argument}.float()"
            dtypes = "floating (float32, float64, float16, bfloat16)"
            raise TypeError(f"{name}: {argument} must be {dtypes}, got {described(tensor)}{cure}")
        if first is None:
            first = argument, tensor
        elif tensor.dtype != first[1].dtype:
            raise TypeError(
                f"{name}: {first[0]} and {argument} must have one dtype, "
                f"got {described(first[1])} and {described(tensor)}"
            )
        elif tensor.device != first[1].device:
            raise ValueError(
                f"{name}: {first[0]} and {argument} must be on one device, "
                f"got {described(first[1])} on {first[1].device} and {described(tensor)} on {tensor.device}"
            )


def described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def one_of(name: str, argument: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {argument} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
