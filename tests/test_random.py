"""`fnn.random` against values recorded from JAX (`golden/record_random.py`), and against itself under every transform."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fnn.random

GOLDEN = np.load(Path(__file__).parent / "golden" / "random.npz")
CASES = json.loads(GOLDEN["header"].tobytes())["cases"]
MOST_ULP = 4


def decode(name: str, value):
    if name == "dtype":
        return getattr(torch, value)
    if isinstance(value, dict):
        return torch.tensor(value["array"], dtype=getattr(torch, value["dtype"]))
    return tuple(value) if isinstance(value, list) else value


def derive(path) -> Tensor:
    seed, *steps = path
    key = fnn.random.key(seed)
    for step in steps:
        key = fnn.random.split(key, step[1])[step[2]] if step[0] == "split" else fnn.random.fold_in(key, step[1])
    return key


def as_recorded(value: Tensor, dtype: str) -> np.ndarray:
    value = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
    array = value.numpy()
    return array.view(dtype) if array.dtype.itemsize == np.dtype(dtype).itemsize else array


def ulp_distance(x: np.ndarray, y: np.ndarray) -> int:
    integer = {4: np.int32, 8: np.int64}[x.dtype.itemsize]
    ordered = [np.where(bits < 0, np.iinfo(integer).min - bits, bits) for bits in (x.view(integer), y.view(integer))]
    return int(np.abs(ordered[0].astype(object) - ordered[1].astype(object)).max(initial=0))


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{CASES[n]['function']}")
def test_equals_jax(number):
    case, recorded = CASES[number], GOLDEN[str(number)]
    arguments = {name: decode(name, value) for name, value in case["arguments"].items()}
    value = getattr(fnn.random, case["function"])(derive(case["key"]), **arguments)
    assert list(value.shape) == case["shape"]
    value = as_recorded(value, case["dtype"])
    assert value.dtype == np.dtype(case["dtype"])
    if "normal" in case["function"] and value.dtype in (np.float32, np.float64):
        value = value.reshape(-1)[:: case["every"]] if "every" in case else value
        assert ulp_distance(value, recorded) <= MOST_ULP
    elif "sha256" in case:
        assert np.array_equal(np.concatenate([value.reshape(-1)[:8], value.reshape(-1)[-8:]]), recorded)
        assert hashlib.sha256(value.tobytes()).hexdigest() == case["sha256"]
    else:
        assert np.array_equal(value, recorded)
