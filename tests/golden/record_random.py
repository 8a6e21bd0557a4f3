"""Record what `jax.random` gives for the cases below, as `random.npz` beside this file.

Run with JAX installed (recorded with 0.10.2): `python tests/golden/record_random.py`. The cases travel with the values:
a function's name, its key (a seed, then splits and folds) and its arguments. `tests/test_random.py` needs no JAX. Long
results are recorded as a SHA-256 of their bytes with the first and last elements, or as every nth element where
floats may differ in the last bits.
"""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np

SEEDS = (0, 42, 2**32 + 7, -1)
NESTED = [42, ["split", 3, 1], ["fold_in", 7], ["split", 2, 0], ["fold_in", 2**31 + 5]]
LONG = 1000
EVERY = 101  # of long results that are compared with a tolerance
X64 = ("float64", "int64", "uint64")


def array(values, dtype="float32"):
    return {"array": values, "dtype": dtype}


def cases():
    for seed in SEEDS:
        yield "bits", [seed], dict(shape=[5], dtype="uint32")
        yield "split", [seed], dict(num=3)
        yield "fold_in", [seed], dict(data=1)
        yield "uniform", [seed], dict(shape=[3, 7])
        yield "normal", [seed], dict(shape=[4, 5])
    yield "split", NESTED, dict(num=[2, 3])
    yield "split", NESTED, dict(num=0)
    yield "fold_in", NESTED, dict(data=2**32 - 1)
    yield "fold_in", NESTED, dict(data=array(-3, "int32"))
    for dtype in ("uint8", "uint16", "uint32", "uint64"):
        yield "bits", NESTED, dict(shape=[33], dtype=dtype)
    yield "bits", [0], dict(shape=[70001], dtype="uint32")
    yield "bits", [0], dict(shape=[3, 0, 2], dtype="uint32")
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        yield "uniform", [0], dict(shape=[], dtype=dtype)
        yield "uniform", [42], dict(shape=[257], dtype=dtype)
        yield "uniform", [42], dict(shape=[2, 129], dtype=dtype, minval=-0.3, maxval=0.71)
        yield "uniform", [-1], dict(shape=[140001], dtype=dtype, minval=1e-3, maxval=5.0)
        bounds = dict(minval=array([[-1.0], [2.0]], dtype), maxval=array([3.0, 2.5, 7.3], dtype))
        yield "uniform", NESTED, dict(shape=[2, 3], dtype=dtype, **bounds)
        yield "normal", [0], dict(shape=[], dtype=dtype)
        yield "normal", [42], dict(shape=[40, 51], dtype=dtype)
        yield "normal", NESTED, dict(shape=[140001], dtype=dtype)
        yield "truncated_normal", [42], dict(lower=-2.0, upper=2.0, shape=[301], dtype=dtype)
        yield "truncated_normal", [0], dict(lower=-1.0, upper=3.0, shape=[70001], dtype=dtype)
        lower, upper = array([[-3.0], [0.5]], dtype), array([1.0, 2.0, 4.0], dtype)
        yield "truncated_normal", NESTED, dict(lower=lower, upper=upper, shape=[2, 3], dtype=dtype)
        yield "bernoulli", [42], dict(p=array(0.3, dtype), shape=[1001])
        yield "categorical", [42], dict(logits=array([[0.0, 1.0, 2.0], [-1.0, 0.5, 0.25]], dtype), shape=[101, 2])
    yield "uniform", [42], dict(shape=[500], dtype="float16", minval=-1e-3, maxval=1e-3)  # subnormal numbers
    yield "truncated_normal", [42], dict(lower=array([-0.5, 0.0]), upper=0.25)
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        yield "truncated_normal", [42], dict(lower=-float("inf"), upper=1.0, shape=[500], dtype=dtype)
        yield "truncated_normal", [42], dict(lower=2.0, upper=6.0, shape=[500], dtype=dtype)
    yield "bernoulli", [0], dict(p=0.9, shape=[70001])
    yield "bernoulli", NESTED, dict(p=array([[0.1], [0.9]]), shape=[3, 2, 50])
    yield "bernoulli", NESTED, dict(p=array([0.1, 0.5, 0.9]))
    yield "bernoulli", [0], dict()
    for dtype in ("int32", "int64", "uint8", "int8", "int16"):
        yield "randint", [42], dict(shape=[51], minval=0, maxval=100, dtype=dtype)
        yield "randint", NESTED, dict(shape=[], minval=-5 if dtype != "uint8" else 3, maxval=64, dtype=dtype)
    yield "randint", [0], dict(shape=[70001], minval=-7, maxval=60000)
    yield "randint", [0], dict(shape=[70001], minval=-(2**31), maxval=2**31 - 1)
    yield "randint", [0], dict(shape=[99], minval=0, maxval=2**16)
    yield "randint", [0], dict(shape=[99], minval=0, maxval=2**16 + 1)
    yield "randint", [0], dict(shape=[99], minval=0, maxval=256, dtype="uint8")
    yield "randint", [0], dict(shape=[99], minval=-(2**62), maxval=2**62 + 12345, dtype="int64")
    yield "randint", [0], dict(shape=[99], minval=-(2**63), maxval=2**63 - 1, dtype="int64")
    yield "randint", [0], dict(shape=[99], minval=0, maxval=10**12 + 7, dtype="int64")
    mixed = dict(minval=array([0, 5, -3], "int32"), maxval=array([[10], [6]], "int32"))
    yield "randint", NESTED, dict(shape=[2, 3], **mixed)
    yield "randint", NESTED, dict(shape=[2, 3], dtype="int64", **mixed)
    wide = dict(minval=array([-(2**40), 0], "int64"), maxval=array([2**40, 2**31], "int64"))
    yield "randint", [0], dict(shape=[20, 2], dtype="int32", **wide)
    for n in (0, 1, 2, 10, 1625, 1626, 70001):
        yield "permutation", [42], dict(x=n)
    yield "permutation", NESTED, dict(x=array([3.0, 1.0, 4.0, 1.0, 5.0]))
    matrix = array(np.arange(60.0).reshape(5, 12).tolist())
    yield "permutation", [0], dict(x=matrix, axis=1)
    yield "permutation", [0], dict(x=matrix, axis=0, independent=True)
    yield "permutation", [-1], dict(x=matrix, axis=-1, independent=True)
    logits = array(np.linspace(-2, 2, 24).reshape(2, 3, 4).tolist())
    yield "categorical", [0], dict(logits=logits)
    yield "categorical", NESTED, dict(logits=logits, axis=1)
    yield "categorical", NESTED, dict(logits=logits, axis=0, shape=[50, 3, 4])
    yield "categorical", [-1], dict(logits=array([0.0, -1.0, -float("inf"), 1.0]), shape=[3000])
    p = array([0.1, 0.2, 0.0, 0.3, 0.4])
    yield "choice", [0], dict(a=10, shape=[7])
    yield "choice", [0], dict(a=10, shape=[7], replace=False)
    yield "choice", NESTED, dict(a=5, shape=[500], p=p)
    yield "choice", NESTED, dict(a=5, shape=[2, 2], replace=False, p=p)
    yield "choice", [42], dict(a=matrix, shape=[2, 3], axis=1)
    yield "choice", [42], dict(a=matrix, shape=[4], replace=False)
    yield "choice", [42], dict(a=matrix, axis=0)


def derive(path):
    seed, *steps = path
    key = jax.random.PRNGKey(seed)
    for step in steps:
        key = jax.random.split(key, step[1])[step[2]] if step[0] == "split" else jax.random.fold_in(key, step[1])
    return key


def decode(name, value):
    if isinstance(value, dict):
        return jax.numpy.asarray(np.array(value["array"], dtype=jax.numpy.dtype(value["dtype"])))
    return tuple(value) if isinstance(value, list) else value


def record(function, path, arguments):
    key = derive(path)
    dtypes = {arguments.get("dtype"), *(v["dtype"] for v in arguments.values() if isinstance(v, dict))}
    jax.config.update("jax_enable_x64", bool(dtypes & set(X64)))
    value = np.asarray(getattr(jax.random, function)(key, **{k: decode(k, v) for k, v in arguments.items()}))
    jax.config.update("jax_enable_x64", False)
    if value.dtype == jax.numpy.bfloat16:
        value = value.view(np.uint16)
    elif function in ("permutation", "categorical", "choice") and value.dtype == np.int32:
        value = value.astype(np.int64)  # torch's index type
    return value


def main():
    described, arrays = [], {}
    for number, (function, path, arguments) in enumerate(cases()):
        value = record(function, path, arguments)
        case = dict(function=function, key=path, arguments=arguments, shape=value.shape, dtype=value.dtype.name)
        if value.size <= LONG:
            arrays[str(number)] = value
        elif "normal" in function and arguments["dtype"] in ("float32", "float64"):
            case["every"] = EVERY
            arrays[str(number)] = value.reshape(-1)[::EVERY]
        else:
            case["sha256"] = hashlib.sha256(value.tobytes()).hexdigest()
            arrays[str(number)] = np.concatenate([value.reshape(-1)[:8], value.reshape(-1)[-8:]])
        described.append(case)
    target = Path(__file__).with_name("random.npz")
    header = json.dumps(dict(jax=jax.__version__, cases=described))
    np.savez_compressed(target, header=np.frombuffer(header.encode(), np.uint8), **arrays)
    print(f"{len(described)} cases, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
