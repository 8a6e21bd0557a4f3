"""Derivatives on the CPU, ours against torch.func and JAX: `make peers && python benchmarks/jacobians.py`.

Eight derivatives (`jacobian_cases.py`), each as a user writes it with fnn, with torch.func, eager and compiled, and
with JAX under `jit`, of which the fastest formula counts. Every side is a process of its own and they take turns,
so that none warms the heap of another, and what slows the machine for a while slows them all. A time is the median
over the rounds of the fastest call in each; ratios are taken within rounds. "Warm" is with `fnn.tune_cpu`, for JAX
with glibc's thresholds set in the environment. The results' sums agree with JAX's to 1e-4, or the run fails. Memory
is measured in another pass, with an allocator that gives freed blocks back at once: what a call adds to the resident
set at its highest, its result included. Writes benchmarks/results/jacobians.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from environment import machine
from jacobian_cases import CASES, agree

ROOT = Path(__file__).parents[1]
SIDES = [
    *("ours", "ours compiled", "ours warm", "ours compiled warm"),
    *("torch", "torch compiled", "torch compiled warm", "jax", "jax warm"),
]
TURN = 0.05  # seconds of calls in a turn
SLOW = 0.2  # a side whose call takes longer has a turn in every fifth round
GENEROUS = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824"}
STINGY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Side:
    """A child that has one side of a case ready."""

    def __init__(self, peers: str, case: str, name: str, formula: str | None = None, **environment: str) -> None:
        rival = name.startswith("jax")
        script = Path(__file__).parent / ("jacobians_jax.py" if rival else "jacobians_torch.py")
        command = [peers if rival else sys.executable, str(script), case, *([] if rival else [name])]
        self.name = name
        self.process = subprocess.Popen(
            command + ([formula] if formula else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore", **environment},
        )

    def read(self):
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended without an answer, with code {self.process.wait()}")
        return json.loads(line)

    def ask(self, command: str) -> float:
        assert self.process.stdin
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self.read()

    def __enter__(self):
        self.ready = self.read()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def measure(case: str, peers: str, rounds: int) -> dict:
    """Times of all sides of one case, then their memory."""
    started = [Side(peers, case, name, **(GENEROUS if name == "jax warm" else {})) for name in SIDES]
    sides = [side.__enter__() for side in started]
    check(case, sides)
    repeats = {}
    for side in sides:
        seconds = side.ask("time 2")
        repeats[side.name] = max(1, min(100, int(TURN / seconds)))
        if seconds > SLOW:
            repeats[side.name] = 0
    times: dict[str, dict[int, float]] = {side.name: {} for side in sides}
    for turn in range(rounds):
        for side in sides:
            if repeats[side.name] or turn % 5 == 0:
                times[side.name][turn] = side.ask(f"time {repeats[side.name] or 1}")
    for side in sides:
        side.__exit__()
    result = {side.name: summary(list(times[side.name].values()), side.ready) for side in sides}
    unwarmed = [name for name in SIDES if "warm" not in name]
    measured = [
        Side(peers, case, name, result[name]["formula"], **STINGY) for name in unwarmed
    ]  # fmt: skip
    for side in [side.__enter__() for side in measured]:
        result[side.name]["peak_mib"] = max(side.ask("peak") for _ in range(3))
        side.__exit__()
    return {"title": CASES[case].title, "sides": result, "ratios": ratios(times)}


def check(case: str, sides: list[Side]) -> None:
    expected = next(side for side in sides if side.name == "jax").ready
    expected = expected["checksums"][expected["best"]]
    for side in sides:
        for formula, sums in side.ready["checksums"].items():
            if not agree(expected, sums):
                raise RuntimeError(f"case {case}: {side.name}, {formula}: {sums}, but JAX has {expected}")


def summary(times: list[float], ready: dict) -> dict:
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "milliseconds": median * 1e3,
        "minimum": min(times) * 1e3,
        "quartiles": [low * 1e3, high * 1e3],
        "formula": ready["best"],
        "formulas": {name: seconds * 1e3 for name, seconds in ready["seconds"].items()},
        "version": ready["version"],
    }


def ratios(times: dict[str, dict[int, float]]) -> dict[str, float]:
    """Medians within rounds: our time by JAX's, and torch.func's time by ours, both compiled."""

    def of(one: str, other: str) -> float:
        return statistics.median(times[one][turn] / times[other][turn] for turn in times[one] if turn in times[other])

    return {
        "to_jax": of("ours compiled", "jax"),
        "to_jax_warm": of("ours compiled warm", "jax warm"),
        "over_torch": of("torch compiled", "ours compiled"),
        "over_torch_warm": of("torch compiled warm", "ours compiled warm"),
    }


def row(case: str, result: dict) -> str:
    sides = "  ".join(
        f"{name} {side['milliseconds']:.2f} ({side.get('peak_mib', float('nan')):.0f} MiB)"
        for name, side in result["sides"].items()
    )
    ratio = "  ".join(f"{name} {value:.2f}" for name, value in result["ratios"].items())
    return f"({case}) {result['title']}, ms: {sides}\n    {ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=str(ROOT / ".peers" / "bin" / "python"), help="the Python that has JAX")
    parser.add_argument("--cases", default=",".join(CASES), help="some of them, separated by commas")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "jacobians.json")
    arguments = parser.parse_args()
    results = {}
    for case in arguments.cases.split(","):
        results[case] = measure(case, arguments.peers, arguments.rounds)
        print(row(case, results[case]), flush=True)
    jax_version = next(iter(results.values()))["sides"]["jax"]["version"]
    written = {"machine": {**machine(), "jax": jax_version}, "results": results}
    arguments.out.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
