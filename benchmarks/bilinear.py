"""`fnn.nn.Bilinear` against `torch.bilinear` and `torch.einsum`: `python benchmarks/bilinear.py`.

A batch x in1 x in2 -> out; the first case is that of the source notes. Values and, in the second half of the rows,
the gradients by both inputs, weight and bias too; eager, as a user calls them. Rounds of all sides alternate; a time
is the median over the rounds of the fastest call in each. Writes benchmarks/results/bilinear.json.
"""

import json
import statistics
import time
from pathlib import Path

import torch
from environment import machine

from fnn import nn

CASES = [(80, 100, 100, 50), (8, 10, 10, 5), (256, 64, 64, 64), (32, 300, 20, 3), (64, 32, 32, 256)]
ROUNDS = 15


def sides(batch: int, in1: int, in2: int, out: int, gradients: bool) -> dict:
    """Calls without arguments that compute the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, in1), (batch, in2), (out, in1, in2), (out,)]
    x1, x2, weight, bias = operands = [torch.randn(shape, generator=generator) for shape in shapes]
    cotangent = torch.randn(batch, out, generator=generator)
    layer, params = nn.Bilinear(out), {"weight": weight, "bias": bias}
    forward = {
        "ours": lambda: layer(params, x1, x2),
        "torch.bilinear": lambda: torch.bilinear(x1, x2, weight, bias),
        "torch.einsum": lambda: torch.einsum("bq,oqk,bk->bo", x1, weight, x2) + bias,
    }
    if not gradients:
        return forward
    for operand in operands:
        operand.requires_grad_()
    return {name: lambda f=f: torch.autograd.grad(f(), operands, cotangent) for name, f in forward.items()}


def fastest(call, repeats: int) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(case: tuple[int, int, int, int], gradients: bool) -> dict:
    calls = sides(*case, gradients)
    values = [call() for call in calls.values()]
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=1e-3, atol=1e-3 * case[1])
    repeats = max(3, int(0.005 / fastest(calls["ours"], 5)))
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            rounds[name].append(fastest(call, repeats))
    described = {}
    for name, times in rounds.items():
        low, median, high = statistics.quantiles(times, n=4)
        described[name] = {"microseconds": median * 1e6, "quartiles": [low * 1e6, high * 1e6]}
    # ratios within a round, so that what slows the machine for a while slows all sides
    others = zip(rounds["torch.bilinear"], rounds["torch.einsum"], strict=True)
    ratio = statistics.median(min(pair) / ours for pair, ours in zip(others, rounds["ours"], strict=True))
    return {"sides": described, "speed_of_the_best_other": ratio}


def main() -> None:
    results = {}
    for gradients in (False, True):
        for case in CASES:
            name = " x ".join(map(str, case[:3])) + f" -> {case[3]}" + (", gradients" if gradients else "")
            results[name] = measure(case, gradients)
            times = "  ".join(f"{n} {side['microseconds']:.0f} us" for n, side in results[name]["sides"].items())
            print(f"{name}: {times}  {results[name]['speed_of_the_best_other']:.2f} of the best other", flush=True)
    path = Path(__file__).parent / "results" / "bilinear.json"
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
