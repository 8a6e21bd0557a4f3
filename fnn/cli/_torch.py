"""Checks of torch, and of the accelerators and the Triton that it uses."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys

import torch

import fnn
from fnn.cli._finding import Finding

OLDEST, NEWEST = (2, 11), (2, 15)  # what the tests run with
# Before a version: what of torch is wrong there, as far as a user of fnn can notice.
DEFECTS = {
    (2, 13): "torch 2.13 orders compiled graphs for their peak memory; before it that is wrong, and fnn turns it off",
    (2, 15): "torch 2.15 mends some second derivatives of torch.func; before it nest fnn's transforms, which are right",
}


def versions() -> Finding:
    """fnn, Python and torch, and whether fnn's tests know this torch."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    text = f"fnn {fnn.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}"
    tested = ".".join(map(str, OLDEST)), ".".join(map(str, NEWEST))
    if version < OLDEST:
        return Finding("versions", "fail", text, f"fnn needs torch {tested[0]} or newer: pip install -U torch")
    if version > NEWEST:
        cure = f"fnn is tested with torch {tested[0]} to {tested[1]}; look for a newer fnn"
        return Finding("versions", "warn", f"{text}, newer than those that fnn is tested with", cure)
    notes = "; ".join(note for before, note in DEFECTS.items() if version < before)
    return Finding("versions", "ok", f"{text} (tested: {tested[0]} to {tested[1]})", notes)


def accelerator() -> Finding:
    """The devices that torch computes on besides the CPU, or why it does not see the card that is there."""
    cards = _nvidia_cards()
    driver = f"; {cards}" if cards else ""
    if not torch.accelerator.is_available():
        if not cards:
            return Finding("accelerator", "ok", "none: fnn computes on the CPU")
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            hidden = f"hidden by CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}: {cards}"
            return Finding("accelerator", "warn", hidden, "unset CUDA_VISIBLE_DEVICES to use it")
        if torch.version.cuda is None:
            cure = "pip install torch from the index that pytorch.org/get-started names for your CUDA"
            return Finding("accelerator", "warn", f"not used, this torch is built for the CPU alone: {cards}", cure)
        cure = f"a driver for CUDA {torch.version.cuda}, or a torch built for the CUDA version that nvidia-smi shows"
        return Finding("accelerator", "warn", f"torch cannot use it: {cards}", cure)
    device = torch.accelerator.current_accelerator()
    if device is None or device.type != "cuda":
        return Finding("accelerator", "ok", f"{device}")
    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GB free"
        found.append(f"{card.name} (compute capability {card.major}.{card.minor}, {memory})")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return Finding("accelerator", "ok", f"{', '.join(found)}; torch is built for {built}{driver}")


def triton() -> Finding:
    """Triton, which compiled steps and the kernels of `triton_kernels` need on CUDA."""
    needed = torch.cuda.is_available()
    if importlib.util.find_spec("triton") is None:
        if needed:
            text = "not installed: compiled steps run eagerly on the GPU, and the library computes fnn.ops"
            return Finding("Triton", "warn", text, "pip install triton (Windows: triton-windows)")
        return Finding("Triton", "ok", "not installed; only a GPU needs it")
    text = _version("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Finding(
            "Triton", "warn", f"{text}, interpreted", "unset TRITON_INTERPRET, which is for tests: far slower"
        )
    if not needed:
        return Finding("Triton", "ok", f"{text}; not used without a GPU")
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")):
        return Finding("Triton", "warn", f"{text}, but it finds no C compiler", "apt install gcc, or set CC to one")
    return Finding("Triton", "ok", text)


def _nvidia_cards() -> str:
    """Names and driver as nvidia-smi tells them, or "" without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    fields = "--query-gpu=name,driver_version"
    try:
        done = subprocess.run([program, fields, "--format=csv,noheader"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    rows = [row.split(", ") for row in done.stdout.strip().splitlines() if done.returncode == 0]
    return ", ".join(f"{name} with driver {driver}" for name, driver in (row for row in rows if len(row) == 2))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
