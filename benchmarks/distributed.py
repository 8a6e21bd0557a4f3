"""A training step on several processes: time, bytes sent, memory: `python benchmarks/distributed.py [--device cuda]`.

Starts torchrun for 1, 2 and 4 processes (gloo on a CPU, nccl on CUDA, there for as many as there are devices). An MLP
and a GPT with Adam, the whole batch always the same, run compiled: data parallel (`make_step(mesh=)`), with parameters
gathered layer by layer (`distributed.fsdp`), and placed by `distributed.shard`, fully sharded and tensor parallel.

What a step sends is counted from torch's own record of it: every collective, functional or not, compiled or not, is a
`c10d` operator, and the profiler lists them with the sizes of their tensors. On a CPU the counter of the loopback
device is read too, as a check that none is missed. Memory is the profiler's record of what a step allocates and frees,
above what this process keeps of state and batch; on CUDA that of the allocator.
Writes benchmarks/results/distributed.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scaling_model import FLOAT32, Collective, sent

MIB = 2**20
COUNTS = (1, 2, 4)
ROUNDS = 7
MODELS = ("mlp", "gpt")
PLACEMENTS = ("data parallel", "fsdp", "fully sharded", "tensor parallel")
BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4, "bool": 1}


def network(model: str, device: str) -> tuple[Any, Any]:
    """A network and the batch of all processes."""
    import torch

    from fnn import models, random

    if model == "mlp":
        net = models.mlp((1024, 1024, 1024))
        batch = random.normal(random.key(0), (64, 784)), torch.arange(64) % 10
    else:
        net = models.gpt(vocab_size=256, context=64, layers=2, heads=4, width=256)
        batch = tuple(random.randint(random.key(0), (2, 8, 64), 0, 256).unbind())
    return net, tuple(leaf.to(device) for leaf in batch)


def prepare(model: str, placement: str, device: str, compiled: bool) -> dict[str, Any]:
    """A step of this placement, its state, and this process's part of the batch."""
    from fnn import distributed, losses, optim, random, train, tree

    count = world()
    net, batch = network(model, device)
    optimizer = optim.adam(1e-3)
    params, state = net.init(random.key(1, device=device), batch[0][:1])
    mesh = distributed.init(device=device, quiet=False)
    if placement == "tensor parallel":
        mesh = distributed.init(model=count, device=device, quiet=False)
    else:
        rows = len(batch[0]) // count
        rank = mesh.get_local_rank(0)
        batch = tuple(leaf[rank * rows : (rank + 1) * rows] for leaf in batch)
    explicit = placement in ("data parallel", "fsdp")
    if placement == "fsdp":
        net = distributed.fsdp(net, mesh)
        params, _ = net.init(random.key(1, device=device), batch[0][:1])
    elif not explicit:
        rules = distributed.fully_sharded if placement == "fully sharded" else distributed.tensor_parallel(model)
        rules = rules if count > 1 else distributed.replicated  # one process has no axis "model"
        params = distributed.shard(params, mesh, rules)

    def loss_fn(params, state, batch, key):
        logits, state = net.apply(params, state, batch[0], train=True)
        return losses.cross_entropy(logits.flatten(0, -2), batch[1].flatten()), (state, {})

    step = train.make_step(loss_fn, optimizer, mesh=mesh if explicit else None, compile=compiled)
    train_state = train.TrainState.create(params, optimizer, random.key(2, device=device), state=state)
    kept = {"state": size(tree.map(local, train_state)), "batch": size(batch)}
    parted = {path: leaf for path, leaf in tree.paths(params).items() if local(leaf).shape != leaf.shape}
    once = [leaf for path, leaf in parted.items() if model == "gpt" and not path.startswith("h.")]  # in no unit of fsdp
    kept |= {"parted": size(parted), "gathered_once": size(once), "whole": size(params) - size(parted)}
    return {"step": step, "state": train_state, "batch": batch, "bytes": kept}


def size(values: Any) -> int:
    """The bytes of all leaves."""
    from fnn import tree

    return sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(values))


def local(leaf: Any) -> Any:
    """What this process has of a leaf."""
    return leaf.to_local() if hasattr(leaf, "to_local") else leaf


def take(case: dict[str, Any]) -> None:
    """One step, finished."""
    case["state"], metrics = case["step"](case["state"], case["batch"])
    case["loss"] = float(metrics["loss"])


def record(case: dict[str, Any], device: str) -> dict[str, Any]:
    """What one step sends and how much memory it takes."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        take(case)
        peak = torch.cuda.max_memory_allocated() - before
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True) as profile:
        take(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    if device == "cpu":
        peak = highest(events)
    peak += case["bytes"]["state"] + case["bytes"]["batch"]
    return {"collectives": collectives(events), "peak_bytes": peak}


def highest(events: list[dict[str, Any]]) -> int:
    """The most bytes at a time that were allocated in a profile."""
    peak = held = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def collectives(events: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """Every operation of all processes in a profile: kind, bytes of the whole tensor, how often."""
    found: dict[tuple[str, int], int] = {}
    outer = [e for e in events if str(e.get("name")).startswith(("_c10d_functional::", "_dtensor::"))]
    for event in (e for e in events if str(e.get("name")).startswith("c10d::")):
        dims, name = event["args"]["Input Dims"], event["name"].removeprefix("c10d::")
        if name in ("barrier", "monitored_barrier_"):
            continue
        kind, tensors = {
            "allreduce_": ("all_reduce", dims[0]),
            "allreduce_coalesced_": ("all_reduce", dims[0]),
            "allgather_into_tensor_coalesced_": ("all_gather", dims[0]),
            "_allgather_base_": ("all_gather", [dims[0]]),
            "reduce_scatter_tensor_coalesced_": ("reduce_scatter", dims[1]),
            "_reduce_scatter_base_": ("reduce_scatter", [dims[1]]),
            "alltoall_base_": ("all_to_all", [dims[0]]),
        }[name]
        around = [e for e in outer if e["ts"] <= event["ts"] <= e["ts"] + e["dur"] and e["tid"] == event["tid"]]
        width = BYTES[around[-1]["args"]["Input type"][0]]
        for shape in tensors:
            whole = width * math.prod(shape)
            found[kind, whole] = found.get((kind, whole), 0) + 1
    return [(kind, whole, times) for (kind, whole), times in sorted(found.items())]


def loopback() -> int | None:
    """Bytes that the loopback device has received, where there is such a counter."""
    path = Path("/proc/net/dev")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) for line in lines if line.strip().startswith("lo:")), None)


def time_rounds(cases: dict[str, dict[str, Any]], device: str) -> None:
    """Times of each case, interleaved, and the fewest bytes that passed through the loopback device meanwhile."""
    import torch.distributed as dist

    for case in cases.values():
        case["seconds"], case["loopback"] = [], []
    for _ in range(ROUNDS):
        for case in cases.values():
            dist.barrier()
            before, start = loopback(), time.perf_counter()
            take(case)
            case["seconds"].append(time.perf_counter() - start)
            dist.barrier()
            after = loopback()
            if device == "cpu" and before is not None and after is not None:
                case["loopback"].append(after - before)


def formula(model: str, placement: str, held: dict[str, int], count: int) -> list[Collective]:
    """What a step has to send, by `scaling_model`: besides parameters or activations the loss.

    Of a placed step, for which propagation decides, what fsdp and Megatron's layers would send instead.
    held: bytes of the parameters that are parted, of those among them that are gathered once and not again in the
    backward pass, and of those that every process has.
    """
    loss = Collective("all_reduce", FLOAT32, count)
    if placement == "data parallel":
        return [Collective("all_reduce", held["whole"] + FLOAT32, count)]
    if placement == "tensor parallel":
        activations = {"gpt": (8 * 64 * 256, 4 * 2), "mlp": (64 * 1024, 2)}[model]  # numbers, how often
        last = [Collective("all_reduce", FLOAT32 * 64 * 10, count)] if model == "mlp" else []
        return [loss, *last, Collective("all_reduce", FLOAT32 * activations[0], count, times=activations[1])]
    gathered = 2 * held["parted"] - held["gathered_once"]
    return [loss, Collective("all_gather", gathered, count), Collective("reduce_scatter", held["parted"], count)]


def result(model: str, placement: str, case: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """The row of one case."""
    times = [seconds * 1e3 for seconds in case["seconds"]]
    ratios = [mine / plain for mine, plain in zip(case["seconds"], first["seconds"], strict=True)]
    count, held = world(), case["bytes"]
    counted = sum(sent(Collective(kind, whole, count, times=n)) for kind, whole, n in case["record"]["collectives"])
    return {
        "milliseconds": statistics.median(times),
        "quartiles": statistics.quantiles(times, n=4)[::2],
        "of_data_parallel": statistics.median(ratios),
        "compile_seconds": case["step"].compile_seconds,
        "graphs": case["step"].graphs,
        "loss": case["loss"],
        "sent_bytes": counted,
        "formula_bytes": sum(map(sent, formula(model, placement, held, count))),
        "loopback_bytes": min(case["loopback"]) / count if case["loopback"] else None,
        **{f"{name}_bytes": held[name] for name in held},
        **case["record"],
    }


def world() -> int:
    return int(os.environ["WORLD_SIZE"])


def measure(device: str, compiled: bool, out: Path) -> None:
    """What one of the processes does; rank 0 writes the rows."""
    import torch

    torch.set_num_threads(1)
    rows = {}
    for model in MODELS:
        cases = {}
        for placement in PLACEMENTS:
            cases[placement] = case = prepare(model, placement, device, compiled)
            for _ in range(3):
                take(case)
            case["record"] = record(case, device)
        time_rounds(cases, device)
        first = cases[PLACEMENTS[0]]
        rows[model] = {placement: result(model, placement, case, first) for placement, case in cases.items()}
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(rows))


def launch(count: int, device: str, compiled: bool, limit: float) -> dict[str, Any]:
    """The rows of `count` processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += [__file__, "--device", device, "--compile" if compiled else "--no-compile", "--one", str(out)]
        with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
            try:
                failed = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun passes it on to its processes
                raise
        if failed:
            raise SystemExit(failed)
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for each number of processes")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="or count eager steps")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        measure(options.device, options.compile, options.one)
        return
    from environment import machine

    counts = COUNTS
    if options.device == "cuda":
        import torch

        counts = [count for count in COUNTS if count <= torch.cuda.device_count()]
    results = {}
    for count in counts:
        results[str(count)] = rows = launch(count, options.device, options.compile, options.limit)
        for model, placements in rows.items():
            for placement, row in placements.items():
                print(
                    f"{count} x {model:>4} {placement:>16}: {row['milliseconds']:7.1f} ms, sends "
                    f"{row['sent_bytes'] / MIB:6.2f} MiB, peak {row['peak_bytes'] / MIB:6.1f} MiB",
                    flush=True,
                )
    path = Path(__file__).parent / "results" / "distributed.json"
    setting = {"machine": machine(), "device": options.device, "compiled": options.compile}
    path.write_text(json.dumps({**setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
