"""Global random generators, seeded for a stretch of code that knows no keys, and then left as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def kept(device: torch.device | None = None) -> Iterator[None]:
    """Restore at the end the generators of torch (of the CPU, and of `device` where that is CUDA), numpy and Python."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng([device] if _cuda(device) else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def seed(number: int, device: torch.device | None = None) -> None:
    """Seed the same generators with 64 bits; `torch.manual_seed` would seed those of every other device, too."""
    number &= 2**64 - 1
    torch.default_generator.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)
    if _cuda(device):
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


def _cuda(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"
