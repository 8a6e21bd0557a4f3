"""The product on a CPU: the faster of the two libraries inside torch, by a fixed rule.

Torch's float32 product is MKL's, which on AMD processors reaches half to nine tenths of what oneDNN, in the same
wheel, reaches. The rule looks at the processor, the dtype, the sizes and the layout and at nothing that changes
between runs, so a run computes the same bits every time. Its numbers come from `benchmarks/matmul_cpu.py`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

linear_pointwise = torch.ops.mkldnn._linear_pointwise.default


class Threshold(NamedTuple):
    """From which sizes on oneDNN is the faster."""

    multiply_adds: int  # m * n * k; below, its call costs more than it saves
    columns: int  # n, where `a` is not row-major: oneDNN copies `a` first, and n columns share that copy


@cache
def threshold() -> Threshold | None:
    """The rule for this processor, or None where torch's own product is taken always."""
    if not torch.backends.mkldnn.is_available():
        return None
    flags = _processor_flags()
    if "AuthenticAMD" not in flags or "avx512f" not in flags:
        return None
    if "avx_vnni" in flags:  # Zen 5: full-width AVX-512, which MKL does not use on AMD
        return Threshold(multiply_adds=2**21, columns=256)
    return Threshold(multiply_adds=2**24, columns=1024)  # Zen 4: double-pumped, both are near the peak


def use_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether a (..., m, k) @ b (k, n) is oneDNN's."""
    rule = threshold()
    if rule is None or b.dim() != 2 or a.dtype != torch.float32 or a.device.type != "cpu":
        return False
    n, k = b.shape[1], b.shape[0]
    if a.numel() * n < rule.multiply_adds or 0 in (n, k):
        return False
    return n >= rule.columns or a.stride(-1) == 1


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


@cache
def _processor_flags() -> frozenset[str]:
    """What /proc/cpuinfo says of the first processor: vendor and instruction sets; nothing elsewhere than on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    first = text.split("\n\n")[0].splitlines()
    fields = dict(line.split(":", 1) for line in first if ":" in line)
    fields = {name.strip(): value for name, value in fields.items()}
    return frozenset(fields.get("vendor_id", "").split() + fields.get("flags", "").split())
