"""`fnn bench`: some seconds of measurement on this machine; the project's benchmarks/ measure more, and longer."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fnn
from fnn import interop, losses, models, ops, optim, random, train
from fnn.cli._machine import model

BATCH = 64
TURNS = 15  # of each side, in turns, so that what else the machine does falls on both
TURN_SECONDS = 0.1


def run(given: argparse.Namespace) -> int:
    device = train.device(given.device)
    if given.out:
        Path(given.out).parent.mkdir(parents=True, exist_ok=True)
    if given.name == "matmul":
        rows = [product(size, dtype, device) for dtype in _dtypes(device) for size in (128, 512, 2048)]
    else:
        rows = [training_step(name, device) for name in ([given.name] if given.name else ["mlp", "lenet5"])]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({model()})"
    where = f"{name}, {torch.get_num_threads()} CPU thread(s), torch {torch.__version__}, fnn {fnn.__version__}"
    show(rows, where)
    if given.out:
        Path(given.out).write_text(json.dumps({"machine": where, "results": rows}, indent=2) + "\n")
    return 0


def training_step(name: str, device: torch.device) -> dict[str, Any]:
    """fnn's compiled step against an eager module with fused Adam: the same weights and batch, steps in turns.

    Raises RuntimeError if the two do not compute the same losses.
    """
    net = models.mlp() if name == "mlp" else models.lenet5()
    side = 28 if name == "mlp" else 32
    keys = random.split(random.key(0, device), 3)
    x = random.normal(keys[0], (BATCH, 1, side, side))
    batch = x, random.randint(keys[1], (BATCH,), 0, 10).long()
    params, _ = net.init(keys[2], x)
    module = _module(name).to(device)
    module.load_state_dict(interop.to_state_dict(params))
    fused = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)

    def loss_fn(params: Any, state: Any, batch: tuple[Tensor, Tensor], key: Tensor) -> Any:
        x, labels = batch
        return losses.cross_entropy(net(params, x), labels), (state, {})

    optimizer = optim.adam(1e-3)
    step = train.make_step(loss_fn, optimizer)
    print(f"compiling the step of {name} ...", file=sys.stderr)
    states = [train.TrainState.create(params, optimizer, keys[2])]

    def ours() -> Tensor:
        states[0], metrics = step(states[0], batch)
        return metrics["loss"]

    def theirs() -> Tensor:
        fused.zero_grad()
        loss = F.cross_entropy(module(batch[0]), batch[1])
        loss.backward()
        fused.step()
        return loss.detach()

    for number in range(1, 4):
        ours_loss, their_loss = float(ours()), float(theirs())
        if not math.isclose(ours_loss, their_loss, rel_tol=1e-3):
            raise RuntimeError(f"{name}: step {number} has the loss {ours_loss} in fnn, {their_loss} in torch.nn")
    compiled = f"compiled in {step.compile_seconds:.1f} s" if step.compiled else "not compiled: see fnn doctor"
    return {"name": f"{name}, batch {BATCH}", "note": compiled, **compare(ours, theirs, device)}


def product(size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """A square product by the kernel that fnn chooses, against torch.matmul."""
    a, b = (random.normal(key, (size, size)).to(dtype) for key in random.split(random.key(0, device)))
    times = compare(lambda: ops.matmul(a, b), lambda: torch.matmul(a, b), device)
    name = f"{size} x {size} {str(dtype).removeprefix('torch.')}"
    return {"name": name, "note": str(ops.explain(ops.matmul, a, b)), **times}


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], device: torch.device) -> dict[str, list[float]]:
    """Milliseconds a call of each, and how many times as fast the first is: lower quartile, median, upper quartile."""
    sides = ours, theirs
    counts = []
    for side in sides:
        _seconds(side, 3, device)
        counts.append(max(1, min(1000, round(TURN_SECONDS / max(_seconds(side, 3, device), 1e-7)))))
    times: tuple[list[float], list[float]] = [], []
    for turn in range(TURNS):
        for index in (0, 1) if turn % 2 else (1, 0):
            times[index].append(1e3 * _seconds(sides[index], counts[index], device))
    ratios = [their / our for our, their in zip(*times, strict=True)]
    return {"fnn_ms": _quartiles(times[0]), "torch_ms": _quartiles(times[1]), "times_as_fast": _quartiles(ratios)}


def show(rows: Sequence[dict[str, Any]], where: str) -> None:
    """The medians, their quartiles in brackets."""
    lines = [["", "fnn, ms", "torch, ms", "times as fast"]]
    for row in rows:
        cells = (row[name] for name in ("fnn_ms", "torch_ms", "times_as_fast"))
        lines.append([row["name"], *(f"{middle:.3g} [{low:.3g}-{high:.3g}]" for low, middle, high in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        columns = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        print("   ".join([f"{first:{widths[0]}}", *columns]))
    for row in rows:
        print(f"{row['name']}: {row['note']}")
    print(f"medians [quartiles] of {TURNS} turns each; {where}")


def _module(name: str) -> torch.nn.Module:
    """The same network as `fnn.models` has, as one would write it with torch.nn."""
    from torch import nn

    if name == "mlp":
        layers = [nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
        return nn.Sequential(*layers)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 6, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(400, 120),
            relu3=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            fc3=nn.Linear(84, 10),
        )
    )


def _seconds(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """Of one call, over `count` of them."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return (time.perf_counter() - started) / count


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def _dtypes(device: torch.device) -> list[torch.dtype]:
    return [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]
