"""The derivatives that `jacobians.py` measures: sizes, and the numbers that every side starts from.

NumPy only, for the environment of the rivals has no torch. A network is a list of (weight, bias) with tanh between.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    title: str
    sizes: tuple[int, ...]  # of the network's layers
    batch: int
    seed: int  # of the parameters; the inputs' are the following ones


CASES = {
    "a": Case("input Jacobians", (64, 256, 256, 64), 64, 0),
    "b": Case("parameter Jacobians", (784, 128, 10), 32, 2),
    "c": Case("Hessian of 1,106 parameters", (16, 32, 16, 2), 64, 4),
    "d": Case("Hessian-vector product", (512, 768, 768, 64), 128, 7),
    "e": Case("per-sample gradient norms", (784, 512, 512, 10), 256, 11),
    "f": Case("NTK", (784, 256, 10), 64, 14),
    "g": Case("Laplacians", (32, 128, 128, 1), 256, 17),
    "sparse": Case("sparse Jacobian, 2,048 unknowns", (32,), 1, 20),  # a Brusselator on a 32 x 32 grid
}
LOSSES = "cde"  # the cases whose function is a cross-entropy

# du/dt = 1 + u^2 v - (B + 1) u + D lap(u), dv/dt = B u - u^2 v + D lap(v), on a periodic grid
REACTION, DIFFUSION = 3.4, 10.0


def network(sizes: tuple[int, ...], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(seed).standard_normal
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        weight = (draw((fan_out, fan_in)) / np.sqrt(fan_in)).astype(np.float32)
        layers.append((weight, (0.1 * draw(fan_out)).astype(np.float32)))
    return layers


def examples(case: Case, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((case.batch, case.sizes[0])).astype(np.float32)


def labels(case: Case, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, case.sizes[-1], case.batch)


def inputs(name: str) -> tuple:
    """The arguments of a case: (parameters, then what its function takes besides)."""
    case = CASES[name]
    if name == "sparse":
        return (np.random.default_rng(case.seed).random(2 * case.sizes[0] ** 2),)
    params, x = network(case.sizes, case.seed), examples(case, case.seed + 1)
    if name == "d":
        return params, x, labels(case, case.seed + 2), network(case.sizes, case.seed + 3)
    if name == "f":
        return params, x, examples(case, case.seed + 2)
    return (params, x, labels(case, case.seed + 2)) if name in LOSSES else (params, x)


def checksum(leaves: list[np.ndarray]) -> dict[str, float]:
    """Three sums over all numbers of a result, in float64: of the numbers, their sizes and their squares."""
    wide = [np.asarray(leaf, dtype=np.float64) for leaf in leaves]
    return {
        "sum": float(sum(x.sum() for x in wide)),
        "absolute": float(sum(np.abs(x).sum() for x in wide)),
        "squares": float(sum((x * x).sum() for x in wide)),
    }


def agree(one: dict[str, float], other: dict[str, float], tolerance: float = 1e-4) -> bool:
    scale = {"sum": one["absolute"], "absolute": one["absolute"], "squares": one["squares"]}
    return all(abs(one[key] - other[key]) <= tolerance * scale[key] for key in scale)
