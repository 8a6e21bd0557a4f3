"""Which kernel computes a product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from triton_kernels import _choice, _launch
from triton_kernels._choice import Choice
from triton_kernels._matmul import cpu


def choose(
    a: Tensor, b: Tensor, precision: str, out_dtype: torch.dtype | None, backend: str, *, activated: bool = False
) -> Choice:
    """The kernel of a (..., m, k) @ b (..., k, n), followed by an activation or not."""
    if a.device.type == "cuda":
        return on_cuda(a, b, precision, out_dtype, backend, activated=activated)
    if _choice.interpreted(a, backend):
        return Choice("Triton", "in its interpreter, because TRITON_INTERPRET=1")
    if out_dtype in (None, a.dtype) and cpu.use_onednn(a, b):
        return Choice("oneDNN", "float32 of this size and layout is faster there on this AMD processor")
    mkl = a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkl.is_available()
    library = "MKL" if mkl else "PyTorch"
    return Choice(library, "torch's own product" + (", Triton needs CUDA" if backend == "triton" else ""))


def on_cuda(
    a: Tensor, b: Tensor, precision: str, out_dtype: torch.dtype | None, backend: str, *, activated: bool = False
) -> Choice:
    rows = a.numel() // a.shape[-1] if b.dim() == 2 and a.shape[-1] else a.shape[-2]
    batch = math.prod(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])) if b.dim() > 2 else 1
    precision = resolved(precision)
    sizes = (batch, rows, b.shape[-1], a.shape[-1])
    operation = "linear" if activated else "matmul"
    choice = _choice.on_cuda(operation, kind(a, b, precision), sizes, a.device, a.dtype, backend, "cuBLAS")
    if choice.triton or a.dtype != torch.float32 or precision == library_precision():
        return choice
    if not _launch.INSTALLED:
        raise RuntimeError(
            f"matmul: precision={precision!r} needs Triton, which is not installed; without it "
            f"torch.set_float32_matmul_precision decides, and it is set to {library_precision()!r}"
        )
    return Choice("Triton", f"cuBLAS would compute in {library_precision()!r}, {precision!r} is asked for")


def kind(a: Tensor, b: Tensor, precision: str) -> str:
    """The row of the table: dtype, precision, which operands are transposed, as BLAS names them, and "tma" where the
    copy engine can fetch both, which the persistent kernels need."""
    from triton_kernels._matmul._launch import fit_tma

    dtype = str(a.dtype).removeprefix("torch.")
    dtype += f" {precision}" if a.dtype == torch.float32 else ""
    layout = f"{'n' if a.stride(-1) == 1 else 't'}{'n' if b.stride(-1) == 1 else 't'}"
    return f"{dtype} {layout}{' tma' if fit_tma(a, b, precision) else ''}"


def resolved(precision: str) -> str:
    return library_precision() if precision == "default" else precision


def library_precision() -> str:
    """What cuBLAS makes of a float32 product by torch's setting."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
