"""Peak memory of one compiled step of a deep MLP, with `fnn.remat` and without: `python benchmarks/remat_memory.py`.

24 blocks `h + tanh(gelu(h a) b) / 10` of width 512, batch 4096. Each variant runs in a process of its own. The
peak is counted from the profiler's record of what the step allocates and frees, compilation and parameters excluded;
in it are the gradients, 96 MiB. Writes benchmarks/results/remat_memory.json.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 2**20
BLOCKS, WIDTH, BATCH = 24, 512, 4096


def measure(remat: bool, blocks: int = BLOCKS, width: int = WIDTH, batch: int = BATCH) -> dict[str, float]:
    import torch

    import fnn

    def block(params, h):
        return h + torch.tanh(torch.nn.functional.gelu(h @ params["a"]) @ params["b"]) / 10

    body = fnn.remat(block) if remat else block

    def loss(layers, x):
        for params in layers:
            x = body(params, x)
        return (x * x).mean()

    torch.manual_seed(0)
    shapes = {"a": (width, 2 * width), "b": (2 * width, width)}
    layers = [{name: torch.randn(shape) * width**-0.5 for name, shape in shapes.items()} for _ in range(blocks)]
    x = torch.randn(batch, width)
    step = torch.compile(torch.func.grad_and_value(loss), fullgraph=True)
    step(layers, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        value = step(layers, x)[1]
    start = time.perf_counter()
    step(layers, x)
    seconds = time.perf_counter() - start
    return {"peak_mib": _peak(record) / MIB, "seconds": seconds, "loss": float(value), "torch": torch.__version__}


def _peak(record) -> int:
    """The most bytes at a time that were allocated in a profile."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    peak = held = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def main() -> None:
    from environment import machine

    results = {}
    for name, remat in (("plain", False), ("remat", True)):
        command = [sys.executable, __file__, "--one", str(int(remat))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:>6}: peak {results[name]['peak_mib']:.0f} MiB, {results[name]['seconds']:.2f} s", flush=True)
    saved = 1 - results["remat"]["peak_mib"] / results["plain"]["peak_mib"]
    print(f"remat lowers the peak by {saved:.0%}")
    path = Path(__file__).parent / "results" / "remat_memory.json"
    path.write_text(json.dumps({"machine": machine(), "results": results, "saved": saved}, indent=2) + "\n")


if __name__ == "__main__":
    if "--one" in sys.argv:
        print(json.dumps(measure(bool(int(sys.argv[-1])))))
    else:
        main()
