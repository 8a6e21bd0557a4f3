"""Peak memory of the training step, donated and not: `python benchmarks/step_memory.py`.

An MLP of six 2048 x 2048 layers with Adam. Each variant runs in a process of its own that gives freed blocks back
at once; the peak is the resident set's high-water mark over five steps, compilation excluded. The budget is what a
step cannot do without: parameters, optimizer state and activations. Writes benchmarks/results/step_memory.json.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

MIB = 2**20
LAYERS, WIDTH, BATCH = 6, 2048, 1024


def measure(donate: bool) -> dict[str, float]:
    import torch

    import fnn
    from fnn import losses, nn, optim, random, train, tree

    net = nn.Sequential(*[nn.Linear(WIDTH), nn.tanh] * LAYERS)
    x, y = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    optimizer = optim.adam(1e-3)

    def loss_fn(params, state, batch, key):
        return losses.mse(net(params, batch[0]), batch[1]), (state, {})

    step = train.make_step(loss_fn, optimizer, donate=donate)
    train_state = train.TrainState.create(net.init(random.key(0), x)[0], optimizer, random.key(1))
    state_bytes = sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves(train_state))
    # What backward needs: the input of each linear layer, which is also tanh's saved output, and the last output.
    activations = (LAYERS + 1) * BATCH * WIDTH * 4
    for _ in range(2):
        train_state, _ = step(train_state, (x, y))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    for _ in range(5):
        train_state, _ = step(train_state, (x, y))
    return {
        "state_mib": state_bytes / MIB,
        "activations_mib": activations / MIB,
        "peak_mib": state_bytes / MIB + (_status("VmHWM") - before) / 1024,
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
    for name, donate in (("donated", True), ("not donated", False)):
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, "--one", str(int(donate))]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        row = results[name]
        row["budget_mib"] = row["state_mib"] + row["activations_mib"]
        row["over_budget"] = row["peak_mib"] / row["budget_mib"] - 1
        print(
            f"{name:>12}: peak {row['peak_mib']:.0f} MiB, parameters + optimizer state + activations "
            f"{row['budget_mib']:.0f} MiB, {row['over_budget']:+.1%}"
        )
    path = Path(__file__).parent / "results" / "step_memory.json"
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    if "--one" in sys.argv:
        print(json.dumps(measure(bool(int(sys.argv[-1])))))
    else:
        main()
