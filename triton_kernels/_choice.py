"""Which kernel a call takes, and why. The rule looks at the device, dtype, sizes and layout, never at a clock."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from triton_kernels import _launch, _tables

BACKENDS = ("auto", "triton")


@dataclass(frozen=True)
class Choice:
    """The kernel a call takes, and the reason."""

    kernel: str  # "Triton", "cuBLAS", "oneDNN", "MKL", "PyTorch"
    reason: str
    config: dict[str, Any] | None = None  # of the Triton kernel, where a table names one

    @property
    def triton(self) -> bool:
        """Whether a Triton kernel computes the call."""
        return self.kernel == "Triton"

    def __str__(self) -> str:
        return f"{self.kernel}: {self.reason}"


def on_cuda(
    operation: str, kind: str, sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype, backend: str,
    library: str = "PyTorch",
) -> Choice:  # fmt: skip
    """The choice on a CUDA device, for an operation of these sizes; `library` is the alternative's name."""
    if dtype == torch.float64:
        return Choice(library, "float64 is left to the library")
    if backend == "triton":
        require_triton()
    elif not _launch.INSTALLED:
        return Choice(library, "Triton is not installed")
    card = card_name(device)
    entry = _tables.nearest(card, operation, kind, sizes)
    if backend == "triton":
        return Choice("Triton", "asked for", None if entry is None else entry.fastest)
    if entry is None:
        known = "covers this size" if _tables.covered(card) else f"is of {card}"
        return Choice(library, f"no table {known}; `python -m triton_kernels.tune` measures one")
    measured = f"measured at {' x '.join(map(str, entry.sizes))} on {card}: "
    if entry.config is None:
        return Choice(library, measured + "the library is as fast")
    ratio = entry.library_milliseconds / entry.milliseconds if entry.milliseconds else float("nan")
    return Choice("Triton", measured + f"{ratio:.2f} times as fast as the library", entry.config)


def table_names_triton(operation: str, kind: str, sizes: tuple[int, ...], index: int) -> bool:
    """Whether "auto" takes the Triton kernel on CUDA device `index`; a compiler asks once, while it traces."""
    entry = _tables.nearest(card_name(torch.device("cuda", index)), operation, kind, sizes)
    return _launch.INSTALLED and entry is not None and entry.config is not None


# What torch.compiler.assume_constant_result does, without the second that importing the compiler takes.
table_names_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def interpreted(x: Tensor, backend: str) -> bool:
    """Whether a Triton kernel is to run on the CPU, in Triton's interpreter; float64 is the library's there too."""
    return _launch.INTERPRETED and backend == "triton" and x.dtype != torch.float64


def require_triton() -> None:
    if not _launch.INSTALLED:
        raise RuntimeError(
            "Triton was asked for and is not installed (`pip install triton`, Linux with a GPU); "
            'fnn.ops.use("auto") takes the library instead'
        )


@cache
def card_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
