"""What the kernels' results are held against, and where the interpreter differs from a GPU."""

import numpy as np
import pytest
import torch
from torch import Tensor


def assert_as_good_as_torch(result: Tensor, torch_result: Tensor, exact: Tensor) -> None:
    """Our error against the float64 result is less than twice torch's in the same dtype, and float32's rounding."""
    assert result.dtype == torch_result.dtype
    assert result.shape == torch_result.shape
    if not exact.numel():
        return
    rounding = 2 * torch.finfo(torch.float32).eps * max(1.0, exact.abs().max().item())
    ours, theirs = ((x.double() - exact).abs().max().item() for x in (result, torch_result))
    assert ours <= 2 * theirs + rounding, f"error {ours:.3g}, torch's {theirs:.3g}"


@pytest.fixture(autouse=True)
def _round_to_nearest(monkeypatch):
    """The interpreter cuts off what bfloat16 does not hold of a float32; a GPU rounds to nearest."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, from_dtype, to_dtype, rounding_mode):
        if (from_dtype.name, to_dtype.name) != ("fp32", "bf16"):
            return convert(values, from_dtype, to_dtype, rounding_mode)
        nearest = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
        return nearest.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def laid_out(layout: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 2.0) -> Tensor:
    """Random values of a shape, with strides of one kind."""

    def values(*sizes):
        return (scale * torch.randn(sizes)).to(dtype)

    match layout:
        case "contiguous":
            return values(*shape)
        case "transposed":
            return values(*shape[::-1]).permute(*reversed(range(len(shape))))
        case "sliced":
            return values(*(2 * size + 1 for size in shape))[tuple(slice(1, None, 2) for _ in shape)]
        case "expanded":
            return values(1, *shape[1:]).expand(shape)
        case "one value":  # the gradient of a sum
            return values().expand(shape)
    raise ValueError(layout)
