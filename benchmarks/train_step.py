"""Whole training steps, ours against PyTorch's and JAX's: `make peers && python benchmarks/train_step.py`.

MLP, LeNet, ResNet-18 and GPT at two batch sizes each, with Adam: our step compiled and donated, and eager; an
`nn.Module` with the fused optimizer, eager and compiled; Flax and Optax under `jit`, donated. Every side is a process
of its own. They take turns, a burst of steps each, so that what slows the machine for a while slows them all. All start
from the same weights and the losses of their first five steps agree, or the run fails. Seconds a step are medians over
the turns; ratios are taken within turns. Peak memory is the state and what steps add to it at their highest.

Compiled code is kept in build/train_step, one folder a case; `--cold` empties it first. "Cold" seconds are those of our
first step with that folder empty, "warm" those with it filled, in another process. Writes
benchmarks/results/train_step.json after each model; a model that is left out keeps its earlier result.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from environment import machine
from train_step_cases import CASES

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "train_step.json"
CACHE = ROOT / "build" / "train_step"
OURS, RIVALS = ("ours compiled", "ours eager"), ("module", "module compiled", "jax")
BURST = 0.3  # seconds of steps in a turn
FEWEST, MOST = 3, 25  # turns
TOLERANCE = {"float32": 2e-3, "bf16": 5e-2}  # of the losses, relative


class Child:
    """A process that has one side of a case ready."""

    def __init__(self, name: str, case: tuple[str, int], run: argparse.Namespace, cache: Path, weights: Path) -> None:
        self.name, model, size = name, *case
        dtype = "bf16" if run.bf16 else "float32"
        here = Path(__file__).parent
        if name == "jax":
            command = [run.peers, here / "train_step_jax.py", model, size, dtype, weights]
        else:
            command = [sys.executable, here / "train_step_torch.py", name, model, size, run.device, dtype, weights]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(run.threads),
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "JAX_PLATFORMS": run.device,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONWARNINGS": "ignore",
        }
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=pipe, stdout=pipe, text=True, env=environment
        )
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))[: run.threads]
            os.sched_setaffinity(self.process.pid, cores)  # XLA takes every core it sees
        self.ready = self.read()

    def read(self):
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended without an answer, with code {self.process.wait()}")
        return json.loads(line)

    def ask(self, command: str):
        assert self.process.stdin
        print(command, file=self.process.stdin, flush=True)
        return self.read()

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(model: str, size: int, run: argparse.Namespace, seconds: float, earlier: dict) -> dict:
    """One case, in about `seconds`, of which starting the sides takes what it takes."""
    deadline = time.monotonic() + seconds
    cache = CACHE / f"{model}-{size}-{run.device}{'-bf16' if run.bf16 else ''}"
    if run.cold:
        shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    weights = cache / "weights.npz"
    script = Path(__file__).parent / "train_step_torch.py"
    subprocess.run([sys.executable, script, "weights", model, "1", "cpu", "float32", weights], check=True)
    start = {}
    if not (cache / "filled").exists():
        child = Child(OURS[0], (model, size), run, cache, weights)
        start["cold"] = child.ready["first_step_seconds"]
        child.end()
        (cache / "filled").touch()
    children: list[Child] = []
    try:
        for name in (*OURS, *RIVALS):
            if name == "jax" and not Path(run.peers).exists():
                print(f"{model}: JAX is left out, there is no {run.peers}; `make peers` makes it", flush=True)
                continue
            children.append(Child(name, (model, size), run, cache, weights))
        start["warm"] = children[0].ready["first_step_seconds"]
        same_losses(model, children, TOLERANCE["bf16" if run.bf16 else "float32"])
        turns = take_turns(children, deadline)
        memory = {child.name: child.ask("peak") for child in children}
    finally:
        for child in children:
            child.end()
    sides = {
        child.name: {
            **summary([wall for wall, _ in turns[child.name]]),
            "cpu_seconds": statistics.median(cpu for _, cpu in turns[child.name]),
            "peak_mib": memory[child.name],
            "version": child.ready["version"],
        }
        for child in children
    }
    ours = turns[OURS[0]]
    ratios = {
        name: {
            kind: statistics.median(theirs[i] / mine[i] for mine, theirs in zip(ours, turns[name], strict=True))
            for i, kind in enumerate(("wall", "cpu"))
        }
        for name in turns
        if name != OURS[0]
    }
    return {
        "sides": sides,
        "times_as_fast": ratios,
        "compile_seconds": {"cold": None, **earlier.get("compile_seconds", {}), **start},
        "losses": children[0].ready["losses"],
    }


def same_losses(model: str, children: list[Child], tolerance: float) -> None:
    expected = children[0].ready["losses"]
    for child in children[1:]:
        found = child.ready["losses"]
        if not all(math.isclose(a, b, rel_tol=tolerance) for a, b in zip(expected, found, strict=True)):
            raise RuntimeError(f"{model}: the losses of {child.name} are {found}, ours {expected}")


def take_turns(children: list[Child], deadline: float) -> dict[str, list[tuple[float, float]]]:
    """Of each side, wall and CPU seconds a step in every turn."""
    steps = {child.name: max(1, round(BURST * 2 / child.ask("time 2")[0])) for child in children}
    turns: dict[str, list[tuple[float, float]]] = {child.name: [] for child in children}
    for turn in range(MOST):
        if turn >= FEWEST and time.monotonic() > deadline:
            break
        for child in children:
            wall, cpu = child.ask(f"time {steps[child.name]}")
            turns[child.name].append((wall / steps[child.name], cpu / steps[child.name]))
    return turns


def summary(times: list[float]) -> dict[str, object]:
    low, median, high = statistics.quantiles(times, n=4)
    return {
        "steps_per_second": 1 / median,
        "milliseconds": median * 1e3,
        "quartiles": [low * 1e3, high * 1e3],
        "turns": len(times),
    }


def row(model: str, size: int, result: dict) -> str:
    sides = "\n".join(
        f"    {name:>16} {side['milliseconds']:8.2f} ms [{side['quartiles'][0]:.2f}, {side['quartiles'][1]:.2f}], "
        f"cpu {side['cpu_seconds'] * 1e3:8.2f} ms, {side['peak_mib']:6.0f} MiB"
        + (f", ours is {result['times_as_fast'][name]['wall']:.2f} times as fast" if name != OURS[0] else "")
        for name, side in result["sides"].items()
    )
    compiled = ", ".join(
        f"{kind} {seconds:.1f} s" for kind, seconds in result["compile_seconds"].items() if seconds is not None
    )
    return f"{model}, batch {size} (our first step: {compiled})\n{sides}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true", help="networks under autocast to bfloat16")
    parser.add_argument("--budget", type=float, default=600, help="seconds of all; starting the sides may take longer")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every side, on as many cores")
    parser.add_argument("--cold", action="store_true", help="empty the cache of compiled code first")
    parser.add_argument("--peers", default=str(ROOT / ".peers" / "bin" / "python"), help="the Python that has JAX")
    parser.add_argument("--out", type=Path, default=RESULT)
    run = parser.parse_args()
    end = time.monotonic() + run.budget
    setting = run.device + (" bf16" if run.bf16 else "")
    written = json.loads(run.out.read_text()) if run.out.exists() else {}
    for position, model in enumerate(run.models):
        sizes = getattr(CASES[model], run.device)
        kept = written.get(setting, {}).get("results", {})
        result = {}
        for index, size in enumerate(sizes):
            left = (len(run.models) - position) * len(sizes) - index
            result[str(size)] = measure(
                model, size, run, (end - time.monotonic()) / left, kept.get(model, {}).get(str(size), {})
            )
            print(row(model, size, result[str(size)]), flush=True)
        jax = result[str(sizes[0])]["sides"].get("jax", {}).get("version")
        this = {**machine(), "threads": run.threads, "jax": jax}
        written[setting] = {"machine": this, "results": {**kept, model: result}}
        run.out.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
