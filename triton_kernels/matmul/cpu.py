"""The product on a CPU: the faster of the two libraries inside torch, by a fixed rule.

Torch's float32 product is MKL's, which on AMD processors reaches half to nine tenths of what oneDNN, in the same
wheel, reaches. The rule looks at the processor, the dtype, the sizes and the layout and at nothing that changes
between runs, so a run computes the same bits every time. Its numbers come from `benchmarks/matmul_cpu.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

linear_pointwise = torch.ops.mkldnn._linear_pointwise.default


class Threshold(NamedTuple):
    """From which sizes on oneDNN is the faster."""

    multiply_adds: int  # m * n * k; below, its call costs more than it saves
    columns: int  # n, where `a` is not row-major: oneDNN copies `a` first, and n columns share that copy


def _threshold() -> Threshold | None:
    """The rule for this processor, or None where torch's own product is taken always."""
    flags = _processor_flags()
    if not torch.backends.mkldnn.is_available() or not {"AuthenticAMD", "avx512f"} <= flags:
        return None
    if "avx_vnni" in flags:  # Zen 5: full-width AVX-512, which MKL does not use on AMD
        return Threshold(multiply_adds=2**21, columns=256)
    return Threshold(multiply_adds=2**24, columns=1024)  # Zen 4: double-pumped, both are near the peak


def _processor_flags() -> frozenset[str]:
    """What /proc/cpuinfo says of the first processor: vendor and instruction sets; nothing elsewhere than on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line]
    fields = {name.strip(): value.split() for name, value in lines}
    return frozenset(fields.get("vendor_id", []) + fields.get("flags", []))


THRESHOLD = _threshold()


def use_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether a (..., m, k) @ b (k, n) is oneDNN's."""
    if b.dim() != 2 or a.device.type != "cpu":
        return False
    rows = math.prod(a.shape[:-1])
    return onednn_is_faster(rows, b.shape[1], b.shape[0], a.dtype, a.stride(-1) == 1)


def onednn_is_faster(m: int, n: int, k: int, dtype: torch.dtype, row_major: bool) -> bool:
    """The rule; `row_major` says whether a's rows lie one after the other."""
    if THRESHOLD is None or dtype != torch.float32 or m * n * k < THRESHOLD.multiply_adds:
        return False
    return row_major or n >= THRESHOLD.columns


def product(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    """a (..., m, k) @ b (..., k, n) + bias (n,), contiguous."""
    if out_dtype not in (None, a.dtype):
        wide = torch.promote_types(a.dtype, out_dtype)
        out = product(a.to(wide), b.to(wide), None if bias is None else bias.to(wide), None)
        return out.to(out_dtype)
    if b.dim() == 2:
        rows = a.reshape(-1, a.shape[-1])
        if use_onednn(a, b):
            out = linear_pointwise(rows, b.t(), bias, "none", [], "")
        else:
            out = torch.mm(rows, b) if bias is None else torch.addmm(bias, rows, b)
        return out.reshape(*a.shape[:-1], b.shape[1])
    out = torch.matmul(a, b).contiguous()
    return out if bias is None else out.add_(bias)
