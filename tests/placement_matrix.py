"""Every net under every placement beside one process: `torchrun --nproc-per-node 2 tests/placement_matrix.py`.

Prints a table and writes `benchmarks/results/placements.json`, in which runs of other numbers of processes stay. The
reference is the same step on one process, compiled too. "repeats" says whether a second run from the same start gives
the same bits; an entry that a placement cannot do holds the error that a user sees.
"""

import argparse
import functools
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist

from fnn import _ranks, distributed, losses, models, optim, random, train, tree
from fnn._placement import whole

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "placements.json"
PLACEMENTS = ("replicated", "fully sharded", "tensor parallel", "two axes", "data parallel", "fsdp")


def images(size):
    return torch.randn(16, 1, size, size, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10


def tokens():
    x = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    return x, x.roll(-1, 1)


NETS = {
    "mlp": lambda: (models.mlp((64, 32)), images(8)),
    "lenet5": lambda: (models.lenet5(), images(32)),
    "gpt": lambda: (models.gpt(vocab_size=64, context=16, layers=2, heads=4, width=32), tokens()),
}


def placed(params, mesh, placement, net):
    """The parameters as this placement has them."""
    rules = {
        "replicated": lambda: distributed.replicated,
        "fully sharded": lambda: distributed.fully_sharded,
        "tensor parallel": lambda: distributed.tensor_parallel("gpt" if net == "gpt" else "mlp"),
        "two axes": lambda: distributed.tensor_parallel("gpt" if net == "gpt" else "mlp", fully_sharded=True),
    }
    return distributed.shard(params, mesh, rules[placement]()) if placement in rules else params


def run(step, train_state, batch, count):
    record = []
    for _ in range(count):
        train_state, metrics = step(train_state, batch)
        record.append(float(whole(metrics["loss"])))
    return record, [whole(leaf) for leaf in tree.leaves(train_state.params)]


def measure(net, placement, count):
    """One row of the table."""
    layer, (x, y) = NETS[net]()
    processes = _ranks.count()
    mesh = distributed.init(model={"tensor parallel": processes, "two axes": 2}.get(placement, 1), quiet=False)
    params, state = layer.init(random.key(0), x[:1])
    explicit = placement in ("data parallel", "fsdp")
    placed_layer = distributed.fsdp(layer, mesh) if placement == "fsdp" else layer
    start = placed_layer.init(random.key(0), x[:1])[0] if placement == "fsdp" else placed(params, mesh, placement, net)
    optimizer = optim.adamw(1e-3, eps=1e-4)

    def loss_of(layer):
        def loss_fn(params, state, batch, key):
            x, y = batch
            logits, state = layer.apply(params, state, x, key=key, train=True)
            return losses.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1)), (state, {})

        return loss_fn

    def fresh(params):
        return train.TrainState.create(params, optimizer, random.key(1), state=state)

    part, parts = _ranks.data_axis("placement_matrix", mesh)
    mine = tuple(leaf.chunk(parts)[part] for leaf in (x, y))
    step = train.make_step(loss_of(placed_layer), optimizer, **({"mesh": mesh} if explicit else {}))
    started = time.perf_counter()
    first, ended = run(step, fresh(start), mine, count)
    seconds = time.perf_counter() - started
    second, again = run(step, fresh(start), mine, count)
    alone, expected = run(train.make_step(loss_of(layer), optimizer), fresh(params), (x, y), count)
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(first, alone, strict=True)),
        "params": max(float((a - b).abs().max()) for a, b in zip(ended, expected, strict=True)),
        "repeats": first == second and all(torch.equal(a, b) for a, b in zip(ended, again, strict=True)),
        "graphs": step.graphs,
        "seconds": round(seconds, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--placements", nargs="*", default=list(PLACEMENTS), choices=PLACEMENTS)
    parser.add_argument("--backend", default="inductor")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend=args.backend)
    distributed.init(quiet=False)
    for net in args.nets:
        for placement in args.placements:
            if placement == "two axes" and (_ranks.count() < 4 or net == "lenet5"):
                continue
            torch.compiler.reset()
            try:
                row = measure(net, placement, args.steps)
            except Exception as error:
                row = {"error": f"{type(error).__name__}: {error}"}
            found = {"backend": args.backend, "steps": args.steps, "torch": torch.__version__, **worst(row)}
            report(net, placement, found)
    dist.barrier()


def worst(row):
    """The row of all processes together: the largest errors, and what went wrong on any."""
    everyone = _ranks.gather("placement_matrix", row)
    for other in everyone:
        if "error" in other:
            return other
    return {
        "loss": max(other["loss"] for other in everyone),
        "params": max(other["params"] for other in everyone),
        "repeats": all(other["repeats"] for other in everyone),
        "graphs": max(other["graphs"] for other in everyone),
        "seconds": row["seconds"],
        "good": all(
            other["loss"] <= 1e-6 and other["params"] <= 1e-5 and math.isfinite(other["loss"]) for other in everyone
        ),
    }


def report(net, placement, row):
    """Print a row, and put it into the file in the place of the one that was there."""
    if not _ranks.is_main():
        return
    if "error" in row:
        cells = [row["error"].splitlines()[0]]
    else:
        cells = [f"{row['loss']:.1e}", f"{row['params']:.1e}", row["repeats"], row["graphs"], f"{row['seconds']:.0f} s"]
    print("|", " | ".join(map(str, (net, placement, *cells))), "|", flush=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known.setdefault(str(_ranks.count()), {}).setdefault(net, {})[placement] = row
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
