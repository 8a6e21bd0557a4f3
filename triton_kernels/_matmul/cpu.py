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

linear_pointwise = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


class Rule(NamedTuple):
    """From which m * n * k on oneDNN is the faster; below, its call costs more than it saves."""

    long: int  # where k is 512 at least
    short: int
    copied: float  # and from which n on where `a` is not row-major: it is copied first, and n columns share the copy


def _rule() -> Rule | None:
    """The rule for this processor, or None where torch's own product is always taken."""
    flags = _processor_flags()
    if not torch.backends.mkldnn.is_available() or not {"AuthenticAMD", "avx512f"} <= flags:
        return None
    if "avx_vnni" in flags:  # Zen 5: full-width AVX-512, which MKL does not use on AMD
        return Rule(long=2**21, short=2**21, copied=256)
    # Zen 4: double-pumped, both are near the peak. A copy would cost memory too [a step's peak: +19 % instead of +7 %].
    return Rule(long=2**22, short=2**24, copied=math.inf)


def _processor_flags() -> frozenset[str]:
    """What /proc/cpuinfo says of the first processor: vendor and instruction sets; nothing elsewhere than on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line]
    fields = {name.strip(): value.split() for name, value in lines}
    return frozenset(fields.get("vendor_id", []) + fields.get("flags", []))


RULE = _rule()
SMALLEST = 2**15  # multiply-adds; no rule takes oneDNN for fewer


def use_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether a (..., m, k) @ b (k, n) is oneDNN's."""
    if RULE is None or b.dim() != 2 or a.dtype is not torch.float32 or not a.is_cpu or a.dim() < 2:
        return False
    k, n = b.shape
    if k == 0 or a.shape[-1] != k:
        return False
    multiply_adds = a.numel() * n
    if multiply_adds < SMALLEST:
        return False
    faster = onednn_is_faster(multiply_adds, n, k, a.stride(-1) == 1, b.stride(-1) == 1)
    return faster and bool(torch.backends.mkldnn.enabled)


def onednn_is_faster(multiply_adds: int, n: int, k: int, a_by_rows: bool, b_by_rows: bool) -> bool:
    """Whether oneDNN is the faster for float32; `by_rows` says that the rows of an operand are contiguous."""
    if RULE is None:
        return False
    if n % 16 and n < 64:  # MKL is slow on few, ragged columns
        return a_by_rows and multiply_adds >= n * (2**15 if b_by_rows else 2**16)
    return multiply_adds >= (RULE.long if k >= 512 else RULE.short) and (a_by_rows or n >= RULE.copied)


def onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (..., m, k) @ b (k, n) + bias (n,) by oneDNN; it has no derivative."""
    return linear_pointwise(a, b.t(), bias, "none", [], "")  # type: ignore[misc]
