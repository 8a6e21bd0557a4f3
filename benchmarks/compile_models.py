"""Seconds to compile the whole training step of every model: `python benchmarks/compile_models.py [--models gpt vit]`.

Each model at its real size, forward, backward and optimizer in one graph, donated: once with an empty compiler cache
and once, in a fresh process, with the cache that the first left. Compile seconds are those of the first step less those
of a later one; of them, Dynamo traces, AOT differentiates and Inductor generates and compiles code. The difference is
the largest of any parameter from the eager step's, after one step. Writes benchmarks/results/compile_models.json after
each model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "compile_models.json"
SMALL, LARGE, SEQUENCE = (64, 1, 32, 32), (2, 3, 224, 224), (1, 256)  # of a batch
MODELS = {
    "mlp": ("mlp", {}, SMALL),
    "lenet5": ("lenet5", {}, SMALL),
    "vgg11": ("vgg11", {}, LARGE),
    "vgg16": ("vgg16", {}, LARGE),
    "googlenet": ("googlenet", {}, LARGE),
    "resnet18": ("resnet18", {}, LARGE),
    "resnet50": ("resnet50", {}, LARGE),
    "vit": ("vit", {}, LARGE),
    "gpt": ("gpt", {}, SEQUENCE),
    "gpt, stacked": ("gpt", {"stacked": True}, SEQUENCE),
}


def measure(name: str) -> dict[str, object]:
    import torch
    from torch._dynamo.utils import compilation_time_metrics, counters

    import fnn
    from fnn import losses, models, optim, random, train

    function, options, shape = MODELS[name]
    net = getattr(models, function)(**options)
    torch.manual_seed(0)
    tokens = function == "gpt"
    x = torch.randint(50257, shape) if tokens else torch.randn(shape)
    labels = x.roll(-1, 1) if tokens else torch.randint(10, shape[:1])
    # Adam divides by the root of a mean square; where a gradient is zero but for rounding, as that of a key's bias, an
    # epsilon above the rounding keeps it from being the largest update there is.
    transformer = function in ("gpt", "vit")
    optimizer = optim.adamw(1e-3, eps=1e-6) if transformer else optim.sgd(0.01, momentum=0.9)
    params, state = net.init(random.key(0), x)

    def loss_fn(params, state, batch, key):
        outputs, state = net.apply(params, state, batch[0], key=key, train=True)
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        rows = batch[1].reshape(-1)
        return sum(losses.cross_entropy(logits.reshape(len(rows), -1), rows) for logits in heads), (state, {})

    def start():
        return train.TrainState.create(params, optimizer, random.key(1), state=state)

    eager, metrics = train.make_step(loss_fn, optimizer, compile=False)(start(), (x, labels))
    expected, loss = fnn.tree.leaves(eager.params), float(metrics["loss"])
    step, train_state, seconds = train.make_step(loss_fn, optimizer), start(), []
    difference = {}
    for index in range(4):
        started = time.perf_counter()
        train_state, metrics = step(train_state, (x, labels))
        seconds.append(time.perf_counter() - started)
        if index == 0:
            pairs = zip(fnn.tree.leaves(train_state.params), expected, strict=True)
            difference["params"] = max(float((a - b).abs().max()) for a, b in pairs)
            difference["loss"] = abs(float(metrics["loss"]) - loss)
            del eager, expected
    later = sorted(seconds[1:])[1]
    spent = {stage: sum(times) for stage, times in compilation_time_metrics.items()}
    whole, backend = spent["_compile.compile_inner"], spent["OutputGraph.call_user_compiler"]
    inductor = spent.get("compile_fx_inner", 0.0)  # none where the whole of it came from the cache
    return {
        "parameters": fnn.tree.size(params),
        "leaves": len(fnn.tree.leaves(params)),
        "batch": list(shape),
        "compile_seconds": seconds[0] - later,
        "dynamo_seconds": whole - backend,
        "aot_seconds": backend - inductor,
        "inductor_seconds": inductor,
        "step_seconds": later,
        "graphs": counters["stats"]["unique_graphs"],
        "difference": difference,
        "compiled": step.compiled,
    }


def run(name: str, cache: str) -> dict[str, object]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, __file__, "--one", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, temperature: str, row: dict) -> None:
    if "error" in row:
        text = f"failed: {row['error']}"
    else:
        stages = ", ".join(f"{stage} {row[f'{stage}_seconds']:.1f}" for stage in ("dynamo", "aot", "inductor"))
        text = (
            f"compile {row['compile_seconds']:6.1f} s ({stages}), step {row['step_seconds'] * 1e3:7.1f} ms, "
            f"{row['graphs']} graph, {row['difference']['params']:.1e} from eager"
        )
    print(f"{name:>12} {temperature}: {text}", flush=True)


def main() -> None:
    from environment import machine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    results: dict[str, dict] = {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as cache:
            results[name] = {}
            for temperature in ("cold", "warm"):
                results[name][temperature] = run(name, cache)
                show(name, temperature, results[name][temperature])
        arguments.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    if "--one" in sys.argv:
        print(json.dumps(measure(sys.argv[-1])))
    else:
        main()
