"""Seconds from the start of a process to its first finished step, and their parts: `python benchmarks/startup.py`.

The LeNet trainer on scikit-learn's digits, train and eval graphs, each time in a fresh process: cold (empty compiler
cache), warm (the same folder again), moved (that folder under another name) and artifacts (an empty folder, filled by
torch.compiler.load_cache_artifacts from what the warm process saved). CPU seconds include child processes, and tell
more than wall seconds on a busy machine. The weights after the step must be the same bits in all. Writes
benchmarks/results/startup.json.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "startup.json"


class Clock:
    """Wall and CPU seconds from one mark to the next."""

    def __init__(self, started: float):
        self.parts: dict[str, dict[str, float]] = {}
        self.last = (started, 0.0)

    def mark(self, name: str) -> None:
        now = time.time(), sum(os.times()[:4])
        self.parts[name] = {"wall": now[0] - self.last[0], "cpu": now[1] - self.last[1]}
        self.last = now


def measure(started: float, folder: str, artifacts: Path, mode: str) -> dict[str, object]:
    clock = Clock(started)
    clock.mark("python")
    import torch

    clock.mark("import torch")
    import fnn
    from fnn import data, losses, models, optim, random, train

    clock.mark("import fnn")
    from matplotlib.figure import Figure  # noqa: F401
    from tyro import cli  # noqa: F401

    clock.mark("import tyro, matplotlib")
    images = data.digits(size=32)
    clock.mark("data")
    net = models.lenet5()
    init_key, order_key, step_key = random.split(random.key(0), 3).unbind()
    params, state = net.init(init_key, images.train[0][:1])
    clock.mark("init")

    def loss_fn(params, state, batch, key):
        logits, state = net.apply(params, state, batch[0], key=key, train=True)
        accuracy = (logits.argmax(-1) == batch[1]).float().mean()
        return losses.cross_entropy(logits, batch[1], label_smoothing=0.1), (state, {"accuracy": accuracy})

    def metric_fn(params, state, batch):
        return {"loss": losses.cross_entropy(net(params, batch[0], state=state), batch[1], reduction="none")}

    train.compile_cache(folder)
    if mode == "artifacts":
        torch.compiler.load_cache_artifacts(artifacts.read_bytes())
        clock.mark("load artifacts")
    optimizer = optim.adam(optim.warmup_cosine(0.0, 3e-3, 44, 440))
    step, eval_step = train.make_step(loss_fn, optimizer), train.make_eval(metric_fn)
    train_state = train.TrainState.create(params, optimizer, step_key, state=state)
    batch = next(iter(data.Loader(images.train, 64, key=order_key)))
    clock.mark("make step and state")
    train_state, _ = step(train_state, batch)
    clock.mark("first step")
    to_first_step = time.time() - started
    first_step_cpu = sum(part["cpu"] for part in clock.parts.values())

    from torch._dynamo.utils import compilation_time_metrics

    spent = {stage: sum(times) for stage, times in compilation_time_metrics.items()}
    backend = spent["OutputGraph.call_user_compiler"]
    eval_step(train_state, batch)
    clock.mark("first evaluation")
    weights = b"".join(leaf.numpy().tobytes() for leaf in fnn.tree.leaves(train_state.params))
    if mode == "warm" and (saved := torch.compiler.save_cache_artifacts()) is not None:
        artifacts.write_bytes(saved[0])
    return {
        "to_first_step": {"wall": to_first_step, "cpu": first_step_cpu},
        "parts": clock.parts,
        "train_compile_seconds": step.compile_seconds,
        "trace_seconds": spent["_compile.compile_inner"] - backend,
        "backend_seconds": backend,
        "eval_compile_seconds": eval_step.compile_seconds,
        "graphs": step.graphs + eval_step.graphs,
        "weights": hashlib.sha256(weights).hexdigest(),
    }


def run(mode: str, folder: Path, artifacts: Path) -> dict:
    command = [sys.executable, __file__, "--one", str(time.time()), str(folder), str(artifacts), mode]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{mode}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def show(mode: str, row: dict) -> None:
    parts = ", ".join(f"{name} {part['wall']:.2f}" for name, part in row["parts"].items())
    total = row["to_first_step"]
    print(
        f"{mode:>9}: {total['wall']:.2f} s to the first step ({total['cpu']:.2f} of CPU); "
        f"compile {row['train_compile_seconds']:.2f} s (tracing {row['trace_seconds']:.2f}), "
        f"evaluation {row['eval_compile_seconds']:.2f} s\n{'':>11}{parts}",
        flush=True,
    )


def main() -> None:
    from environment import machine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="of each warm start; the median one is kept")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        base, artifacts = Path(name), Path(name) / "artifacts"
        for mode in ("cold", "warm", "moved", "artifacts"):
            rows = []
            for repeat in range(1 if mode == "cold" else arguments.repeats):
                folder = base / "cache"
                if mode == "moved":
                    folder = base / f"moved{repeat}"
                    shutil.copytree(base / "cache", folder)
                elif mode == "artifacts":
                    folder = base / f"empty{repeat}"
                rows.append(run(mode, folder, artifacts))
            rows.sort(key=lambda row: row["to_first_step"]["wall"])
            results[mode] = rows[len(rows) // 2]
            walls = [row["to_first_step"]["wall"] for row in rows]
            results[mode]["spread"] = statistics.pstdev(walls)
            show(mode, results[mode])
    bits = {row["weights"] for row in results.values()}
    if len(bits) != 1:
        sys.exit(f"the weights differ: { {mode: row['weights'][:8] for mode, row in results.items()} }")
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    if "--one" in sys.argv:
        started, folder, artifacts, mode = sys.argv[2:]
        print(json.dumps(measure(float(started), folder, Path(artifacts), mode)))
    else:
        main()
