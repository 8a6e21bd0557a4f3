"""Peak memory of a process that trains with others, data parallel and `fsdp`: `python benchmarks/fsdp_memory.py`.

Six residual blocks 768 -> 3072 -> 768 with Adam, compiled, on two processes of one machine (gloo), 64 examples each.
Processes give freed blocks back at once; the peak is the resident set's high-water mark over three steps, compilation
excluded, and what the process holds of parameters and optimizer state. The budget of `fsdp` is its share of parameters,
gradients and optimizer state, one whole block with its gradient, and the inputs of the blocks. Writes
benchmarks/results/fsdp_memory.json.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIB = 2**20
PROCESSES, BLOCKS, WIDTH, BATCH = 2, 6, 768, 64


def measure(parted: bool, blocks: int = BLOCKS, width: int = WIDTH) -> dict[str, Any]:
    """On each process of a run: the peak in MiB, the seconds of a step, and the loss after some."""
    import torch

    import fnn
    from fnn import distributed, losses, nn, optim, random, train, tree

    mesh = distributed.init(device="cpu")
    block = nn.Residual(nn.Sequential(nn.Linear(4 * width), nn.gelu, nn.Linear(width)))
    net = nn.Repeat(block, blocks)
    net = distributed.fsdp(net, mesh) if parted else net
    x = random.normal(random.fold_in(random.key(2), mesh.get_local_rank()), (BATCH, width))
    optimizer = optim.adam(1e-3)

    def loss_fn(params, state, batch, key):
        return losses.mse(net(params, batch[0]), batch[1]), (state, {})

    def held(values):
        local = [getattr(leaf, "_local_tensor", leaf) for leaf in tree.leaves(values)]
        return sum(leaf.numel() * leaf.element_size() for leaf in local) / MIB

    step = train.make_step(loss_fn, optimizer, mesh=mesh)
    state = train.TrainState.create(net.init(random.key(0), x)[0], optimizer, random.key(1))
    of_params, of_state = held(state.params), held(state)
    of_block = tree.size(state.params["0"]) * 4 / MIB
    for _ in range(2):
        state, metrics = step(state, (x, x.sin()))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    start = time.perf_counter()
    for _ in range(3):
        state, metrics = step(state, (x, x.sin()))
    return {
        "params_mib": of_params,
        "state_mib": of_state,
        "budget_mib": of_state + of_params + (2 * of_block + blocks * x.numel() * 4 / MIB if parted else 0),
        "peak_mib": of_state + (_status("VmHWM") - before) / 1024,
        "seconds": (time.perf_counter() - start) / 3,
        "compile_seconds": step.compile_seconds,
        "loss": float(metrics["loss"]),
        "torch": torch.__version__,
        "fnn": fnn.__version__,
    }


def _status(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    from environment import machine

    results = {}
    tight = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    for name, parted in (("data parallel", False), ("fsdp", True)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
        command += [__file__, "--one", str(int(parted))]
        done = subprocess.run(command, env={**os.environ, **tight}, check=True, capture_output=True, text=True)
        ranks = json.loads(done.stdout.splitlines()[-1])
        results[name] = row = max(ranks, key=lambda rank: rank["peak_mib"])
        print(
            f"{name:>13}: peak {row['peak_mib']:.0f} MiB for each process, budget {row['budget_mib']:.0f} MiB "
            f"(parameters and optimizer state {row['state_mib']:.0f} MiB); {row['seconds']:.2f} s a step",
            flush=True,
        )
    saved = 1 - results["fsdp"]["peak_mib"] / results["data parallel"]["peak_mib"]
    print(f"fsdp on {PROCESSES} processes lowers the peak by {saved:.0%}")
    path = Path(__file__).parent / "results" / "fsdp_memory.json"
    path.write_text(json.dumps({"machine": machine(), "results": results, "saved": saved}, indent=2) + "\n")


def _one(parted: bool) -> None:
    from fnn import _ranks

    everyone = _ranks.gather("fsdp_memory", measure(parted))
    print(json.dumps(everyone))


if __name__ == "__main__":
    if "--one" in sys.argv:
        _one(bool(int(sys.argv[-1])))
    else:
        main()
