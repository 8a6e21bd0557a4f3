"""Float32 products on the CPU, ours against torch and JAX: `make peers && python benchmarks/matmul_cpu.py`.

Each call is made from Python, as a user makes it: `fnn.ops.matmul` and `torch.matmul` eager, the same two inside
`torch.compile`, and JAX under `jit`, which runs in its own environment as a child that takes turns with us. Rounds of
all sides alternate; a time is the median over the rounds of the fastest call in each. The layout names the operands
as BLAS does: n as it lies, t transposed. Writes benchmarks/results/matmul_cpu.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIZES = [(256, 784, 512), (256, 512, 512), (1024, 1024, 1024), (64, 784, 10)]  # m, k, n
LAYOUTS = ["nn", "nt", "tn"]
CASES = [(*size, layout) for size in SIZES for layout in LAYOUTS]
ROUNDS = 25


def operands(m: int, k: int, n: int, layout: str):
    """Two arrays as they lie in memory."""
    import numpy

    draw = numpy.random.default_rng(0).standard_normal
    a = draw((k, m) if layout[0] == "t" else (m, k), dtype=numpy.float32)
    b = draw((n, k) if layout[1] == "t" else (k, n), dtype=numpy.float32)
    return a, b


def transposed(a, b, layout: str):
    return (a.T if layout[0] == "t" else a), (b.T if layout[1] == "t" else b)


def fastest(call, repeats: int) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def jax_side() -> None:
    """Answers each line "case repeats" with the seconds of the fastest call."""
    import jax

    calls = []
    for *size, layout in CASES:
        a, b = (jax.numpy.asarray(x) for x in operands(*size, layout))
        product = jax.jit(lambda a, b, layout=layout: jax.numpy.matmul(*transposed(a, b, layout)))
        calls.append(lambda product=product, a=a, b=b: product(a, b).block_until_ready())
        fastest(calls[-1], 3)
    print(jax.__version__, flush=True)
    for line in sys.stdin:
        case, repeats = map(int, line.split())
        print(fastest(calls[case], repeats), flush=True)


def torch_sides(m: int, k: int, n: int, layout: str) -> dict:
    import torch

    from fnn import ops

    torch._dynamo.reset()  # one code object is compiled for every case; torch allows eight
    a, b = (torch.from_numpy(x) for x in operands(m, k, n, layout))
    sides = {}
    for name, product in (("ours", ops.matmul), ("torch", torch.matmul)):

        def eager(product=product):
            return product(*transposed(a, b, layout))

        compiled = torch.compile(
            lambda a, b, product=product: product(*transposed(a, b, layout)), fullgraph=True, dynamic=False
        )
        sides[name] = eager
        sides[f"{name} compiled"] = lambda compiled=compiled: compiled(a, b)
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=str(ROOT / ".peers" / "bin" / "python"), help="the Python that has JAX")
    parser.add_argument("--jax-side", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.jax_side:
        jax_side()
        return

    import torch
    from environment import machine

    torch.set_grad_enabled(False)
    command = [arguments.peers, __file__, "--jax-side"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin
        assert child.stdout
        jax_version = child.stdout.readline().strip()
        results = {}
        for index, (m, k, n, layout) in enumerate(CASES):
            sides = torch_sides(m, k, n, layout)
            repeats = max(3, int(2e7 // (m * n * k)) * 3)
            for call in sides.values():
                fastest(call, 5)
            rounds: dict[str, list[float]] = {name: [] for name in [*sides, "jax"]}
            for _ in range(ROUNDS):
                for name, call in sides.items():
                    rounds[name].append(fastest(call, repeats))
                child.stdin.write(f"{index} {repeats}\n")
                child.stdin.flush()
                rounds["jax"].append(float(child.stdout.readline()))
            results[f"{m} x {k} x {n} {layout}"] = summary(rounds, 2 * m * k * n)
            print(f"{m} x {k} x {n} {layout}:", row(results[f"{m} x {k} x {n} {layout}"]), flush=True)
        child.stdin.close()
    path = ROOT / "benchmarks" / "results" / "matmul_cpu.json"
    described = {**machine(), "jax": jax_version}
    path.write_text(json.dumps({"machine": described, "results": results}, indent=2) + "\n")


def summary(rounds: dict[str, list[float]], operations: int) -> dict:
    """Of each side the median time with its quartiles, in microseconds, and how we compare with the best of others."""
    sides = {}
    for name, times in rounds.items():
        low, median, high = statistics.quantiles(times, n=4)
        sides[name] = {
            "microseconds": median * 1e6,
            "quartiles": [low * 1e6, high * 1e6],
            "gigaflops": operations / median / 1e9,
        }
    # ratios within a round, so that what slows the machine for a while slows both sides
    best = {
        name: [min(x) for x in zip(rounds[name], rounds["jax"], strict=True)] for name in ("torch", "torch compiled")
    }
    ratio = {
        name: statistics.median(b / t for b, t in zip(best[rival], rounds[name], strict=True))
        for name, rival in (("ours", "torch"), ("ours compiled", "torch compiled"))
    }
    return {"sides": sides, "speed_of_the_best_other": ratio}


def row(result: dict) -> str:
    sides = "  ".join(f"{name} {side['microseconds']:.0f} us" for name, side in result["sides"].items())
    ratio = result["speed_of_the_best_other"]
    return f"{sides}  eager {ratio['ours']:.2f}, compiled {ratio['ours compiled']:.2f} of the best other"


if __name__ == "__main__":
    main()
