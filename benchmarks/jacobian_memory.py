"""Peak memory of derivatives that would not fit otherwise: `python benchmarks/jacobian_memory.py`.

A Jacobian of 1,024 outputs by 100,000 parameters with `chunk_size="auto"` may take its result and the budget it was
given; the gradient norms of 1,024 examples may take a fiftieth of their gradients. Each is measured in a process of
its own that gives freed blocks back at once: what the call adds to the resident set at its highest, its result
included, everything compiled and warm. Writes benchmarks/results/jacobian_memory.json.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from jacobian_child import peak

MIB = 2**20
BUDGET = 64 * MIB
STINGY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def network(sizes: tuple[int, ...]):
    """Parameters of a network with tanh between its layers, and the function of them and one input."""
    import torch

    import fnn

    hidden = [layer for size in sizes[1:-1] for layer in (fnn.nn.Linear(size), fnn.nn.tanh)]
    net = fnn.nn.Sequential(*hidden, fnn.nn.Linear(sizes[-1]))
    params, _ = net.init(fnn.random.key(0), torch.zeros(sizes[0]))
    return net, params


def large_jacobian() -> dict[str, float]:
    """(1,024, 100,000) of float32 is 391 MiB; all rows at once would need several times that."""
    import torch

    import fnn

    net, params = network((64, 91, 1024))
    x = torch.randn(64)
    jacobian = fnn.jacobian(lambda params: net(params, x), chunk_size="auto", flat=True, budget=BUDGET)
    result = jacobian(params)
    result_mib = result.numel() * result.element_size() / MIB
    del result
    return {
        "peak_mib": peak(lambda: jacobian(params)),
        "allowed_mib": result_mib + BUDGET / MIB,
        "whole_mib": result_mib,
        "parameters": fnn.tree.size(params),
    }


def gradient_norms(compiled: bool) -> dict[str, float]:
    """The gradients of 1,024 examples of 784-512-512-10 are 2.6 GiB."""
    import torch

    import fnn

    net, params = network((784, 512, 512, 10))
    x, y = torch.randn(1024, 784), torch.randint(0, 10, (1024,))

    def norms(params, x, y):
        return fnn.per_sample_grad_norm(lambda params, x, y: fnn.losses.cross_entropy(net(params, x), y))(params, x, y)

    call = torch.compile(norms, fullgraph=True, dynamic=False) if compiled else norms
    call(params, x, y)
    whole_mib = 1024 * fnn.tree.size(params) * 4 / MIB
    return {
        "peak_mib": peak(lambda: call(params, x, y)),
        "allowed_mib": whole_mib / 50,
        "whole_mib": whole_mib,
        "parameters": fnn.tree.size(params),
    }


MEASURED = {
    "Jacobian, 1,024 x 100,000": large_jacobian,
    "gradient norms of 1,024 examples": lambda: gradient_norms(compiled=False),
    "gradient norms of 1,024 examples, compiled": lambda: gradient_norms(compiled=True),
}


def main() -> None:
    from environment import machine

    results = {}
    for index, name in enumerate(MEASURED):
        command = [sys.executable, __file__, "--one", str(index)]
        done = subprocess.run(command, env={**os.environ, **STINGY}, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = row = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name}: peak {row['peak_mib']:.0f} MiB, allowed {row['allowed_mib']:.0f} MiB; the whole object is "
            f"{row['whole_mib']:.0f} MiB",
            flush=True,
        )
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "jacobian_memory.json"
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    if "--one" in sys.argv:
        print(json.dumps(list(MEASURED.values())[int(sys.argv[-1])]()))
    else:
        main()
