"""Which device a run uses."""

from __future__ import annotations

import torch


def device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is the accelerator torch finds (CUDA, MPS, ...), or the CPU.

    Raises `ValueError` for a device that is not there.
    """
    available = torch.accelerator.is_available()
    found = torch.accelerator.current_accelerator() if available else None
    if name == "auto":
        return found or torch.device("cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is no device; expected 'auto', 'cpu', 'cuda', 'mps', ...") from error
    if chosen.type != "cpu" and (found is None or found.type != chosen.type):
        raise ValueError(
            f"device: {name!r} is not available here; expected 'auto', 'cpu'{f' or {found}' if found else ''}"
        )
    return chosen
