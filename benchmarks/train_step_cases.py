"""The cases of `train_step.py`: sizes, batches and the protocol of a child, for every side; NumPy only."""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

LEARNING_RATE, EPSILON = 1e-4, 1e-6  # of Adam, so small that rounding is not enlarged
STEPS = 5  # whose losses all sides must share
CLASSES = 10


class Case(NamedTuple):
    """A model with its input; `cpu` and `cuda` are the batch sizes there."""

    shape: tuple[int, ...]
    cpu: tuple[int, int]
    cuda: tuple[int, int]


class GPT(NamedTuple):
    vocab_size: int = 65
    context: int = 256
    layers: int = 6
    heads: int = 6
    width: int = 384


CASES = {
    "mlp": Case((784,), (64, 512), (512, 4096)),
    "lenet": Case((1, 32, 32), (64, 512), (512, 4096)),
    "resnet18": Case((3, 32, 32), (16, 64), (128, 512)),
    "gpt": Case((GPT().context,), (1, 4), (8, 32)),
}


def batch(model: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels, the same in every process."""
    draw = np.random.default_rng(0)
    shape = (size, *CASES[model].shape)
    if model == "gpt":
        text = draw.integers(0, GPT().vocab_size, (size, GPT().context + 1))
        return text[:, :-1].copy(), text[:, 1:].copy()
    return draw.standard_normal(shape, np.float32), draw.integers(0, CLASSES, size)


class Side(NamedTuple):
    """What a child measures. `step` takes one step, and `finish` waits for the device and gives the last loss."""

    step: Callable[[], object]
    finish: Callable[[], float]
    state_bytes: int  # parameters, statistics and the optimizer's state
    device_peak: Callable[[], float] | None = None  # MiB; without it the resident set is measured
    reset_peak: Callable[[], None] = lambda: None


def serve(side: Side, version: str) -> None:
    """Takes the first steps, tells their losses and seconds, and answers commands until the input ends.

    `time n`: wall and CPU seconds of n steps. `peak`: MiB of the state and of what steps add to it at their highest.
    """
    losses, seconds = [], []
    for _ in range(STEPS):
        started = time.perf_counter()
        side.step()
        losses.append(side.finish())
        seconds.append(time.perf_counter() - started)
    compiled = seconds[0] - min(seconds[1:])
    print(json.dumps({"losses": losses, "first_step_seconds": compiled, "version": version}), flush=True)
    for line in sys.stdin:
        command, *numbers = line.split()
        answer = burst(side, int(numbers[0])) if command == "time" else peak(side)
        print(json.dumps(answer), flush=True)


def burst(side: Side, steps: int) -> tuple[float, float]:
    side.finish()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        side.step()
    side.finish()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak(side: Side) -> float:
    """On a device its own count, which holds the state; on the CPU the state and what the resident set grows by."""
    if side.device_peak is not None:
        side.reset_peak()
        burst(side, 3)
        return side.device_peak()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, so that a step has to take it again
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    burst(side, 3)
    return side.state_bytes / 2**20 + (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
