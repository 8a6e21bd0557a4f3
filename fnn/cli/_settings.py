"""Checks of how torch is set: the precision of products, reproducibility, and the tables that choose kernels."""

from __future__ import annotations

import os

import torch

from fnn import ops
from fnn.cli._finding import Finding
from triton_kernels import _tables


def precision() -> Finding:
    """How float32 products are computed."""
    setting = torch.get_float32_matmul_precision()
    text = f'float32 products: "{setting}"'
    if not torch.cuda.is_available():
        return Finding("precision", "ok", text)
    override = os.environ.get("NVIDIA_TF32_OVERRIDE")
    if override is not None:
        cure = "unset it: torch's own settings say what is computed"
        return Finding("precision", "warn", f"{text}, but NVIDIA_TF32_OVERRIDE={override} overrules it", cure)
    if setting == "highest" and torch.cuda.get_device_capability() >= (8, 0):
        cure = 'torch.set_float32_matmul_precision("high") takes the tensor cores (TF32): faster, 10 bits of mantissa'
        return Finding("precision", "ok", f"{text}, without tensor cores", cure)
    return Finding("precision", "ok", text)


def determinism() -> Finding:
    """Whether two runs give the same bits."""
    strict = torch.are_deterministic_algorithms_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if not torch.cuda.is_available():
        return Finding("reproducibility", "ok", "on the CPU, the same seed and number of threads give the same bits")
    text = f"deterministic algorithms {'on' if strict else 'off'}, CUBLAS_WORKSPACE_CONFIG={workspace}"
    if strict and workspace is not None and not torch.backends.cudnn.benchmark:
        return Finding("reproducibility", "ok", text)
    cure = "for the same bits: torch.use_deterministic_algorithms(True) and CUBLAS_WORKSPACE_CONFIG=:4096:8"
    return Finding("reproducibility", "ok", text, cure)


def kernels() -> Finding:
    """Which kernels fnn.ops takes, and whether a table was measured on this card."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.empty(1024, 1024, device=device)
    text = f"a 1024 x 1024 float32 product: {ops.explain(ops.matmul, weight, weight)}"
    if device == "cpu":
        return Finding("kernels", "ok", text)
    card = torch.cuda.get_device_name()
    if _tables.covered(card):
        return Finding("kernels", "ok", f"tables of {card}; {text}")
    cure = "python -m triton_kernels.tune measures one (minutes), triton_kernels.load_table reads it"
    return Finding("kernels", "ok", f"no table of {card}, so the library computes; {text}", cure)
