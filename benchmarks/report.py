"""Write docs/performance.md and the results in the README from benchmarks/results: `python benchmarks/report.py`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
PAGE = """\
# Performance

Every table is written by `python benchmarks/report.py` from the JSON files in `benchmarks/results`, which the programs
in `benchmarks` write, one command each. Both sides of a comparison ran interleaved in one run, warm; times are medians.
Where we are slower than another library, the table says so.
"""


def readme() -> str:
    """The results in the README: what the main job reaches and takes."""
    return f"## Results\n\n{trainer()}\n\nAll measurements: [docs/performance.md](docs/performance.md)."


def page() -> str:
    """docs/performance.md."""
    sections = {
        "The main job": trainer(),
        "Training steps": train_step(),
        "Memory of a training step": f"{step_memory()}\n\n{remat_memory()}",
        "Compiling whole training steps": compile_models(),
        "Several processes": f"{distributed()}\n\n{fsdp_memory()}\n\n{placements()}",
        "Matrix products": products(),
        "Bilinear layers": bilinear(),
        "Derivatives": f"{derivatives()}\n\n{jacobian_memory()}",
    }
    return "\n".join([PAGE, *(f"## {title}\n\n{text}\n" for title, text in sections.items() if text.strip())])


def trainer() -> str:
    if (result := _load("trainer")) is None:
        return ""
    rows = [
        [name, f"{run['cold']['accuracy']:.4f}", *(f"{run[k]['training_seconds']:.0f} s" for k in ("cold", "warm"))]
        for name, run in result["results"].items()
    ]
    return _section(
        "The main job (`benchmarks/trainer.py`), training time with compilation, from an empty compiler cache and from "
        "a filled one:",
        _table(["", "test accuracy", "cold", "warm"], rows),
        _machine(result),
    )


def train_step() -> str:
    if (result := _load("train_step")) is None:
        return ""
    names = {"ours compiled": "ours", "ours eager": "eager"}
    names |= {"module": "nn.Module", "module compiled": "compiled", "jax": "Flax"}
    tables = []
    for setting, run in result.items():
        times, memory = [], []
        for model, sizes in run["results"].items():
            for size, case in sizes.items():
                sides, faster = case["sides"], case["times_as_fast"]
                label = f"{model}, {size}"
                speeds = [_digits(sides[name]["steps_per_second"]) if name in sides else "" for name in names]
                ratios = [_digits(faster[name]["wall"]) if name in faster else "" for name in list(names)[1:]]
                spread = sides["ours compiled"]
                low, high = (abs(quartile / spread["milliseconds"] - 1) for quartile in spread["quartiles"])
                times.append([label, *speeds, f"{max(low, high):.0%}", *ratios])
                seconds = [case["compile_seconds"].get(kind) for kind in ("cold", "warm")]
                peaks = [f"{sides[name]['peak_mib']:.0f}" if name in sides else "" for name in names]
                memory.append([label, *peaks, *("" if value is None else f"{value:.1f}" for value in seconds)])
        header = ["", *names.values()]
        tables += [
            f"Steps a second, {setting}, {run['machine']['threads']} threads:",
            _table([*header, "spread of ours", *(f"ours / {name}" for name in list(names.values())[1:])], times),
            "Peak memory in MiB, and seconds of our first step, with an empty compiler cache and a filled one:",
            _table([*header, "cold", "warm"], memory),
            _machine(run, jax=run["machine"]["jax"] is not None),
        ]
    return _section(
        "Forward, backward and Adam, by model and batch size (`benchmarks/train_step.py`): ours compiled and donated, "
        "and eager; an `nn.Module` with the fused optimizer, eager and compiled; Flax and Optax under `jit`, donated. "
        "Ratios above 1 say that ours compiled is the faster; the spread is that of the quartiles about the median.",
        *tables,
    )


def step_memory() -> str:
    if (result := _load("step_memory")) is None:
        return ""
    rows = [
        [name, f"{row['peak_mib']:.0f} MiB", f"{row['budget_mib']:.0f} MiB", f"{row['over_budget']:+.0%}"]
        for name, row in result["results"].items()
    ]
    return _section(
        "Peak memory of a step, six 2048 x 2048 layers with Adam (`benchmarks/step_memory.py`):",
        _table(["", "peak", "parameters + optimizer state + activations", ""], rows),
        _machine(result),
    )


def remat_memory() -> str:
    if (result := _load("remat_memory")) is None:
        return ""
    return _section(
        "Peak memory of a step with and without `fnn.remat` (`benchmarks/remat_memory.py`):",
        _table(["", "peak"], [[name, f"{row['peak_mib']:.0f} MiB"] for name, row in result["results"].items()]),
        _machine(result),
    )


def compile_models() -> str:
    if (result := _load("compile_models")) is None:
        return ""
    rows = []
    for name, runs in result["results"].items():
        cold, warm = runs["cold"], runs["warm"]
        if "error" in cold or "error" in warm:
            rows.append([name, "failed", *[""] * 6])
            continue
        millions = f"{cold['parameters'] / 1e6:.1f}" if cold["parameters"] >= 1e5 else f"{cold['parameters'] / 1e6:.2f}"
        batch = " x ".join(str(size) for size in cold["batch"])
        seconds = [f"{run['compile_seconds']:.1f}" for run in (cold, warm)]
        speed = [f"{cold['step_seconds'] * 1e3:.0f}", str(cold["graphs"]), f"{cold['difference']['params']:.0e}"]
        rows.append([name, millions, batch, *seconds, *speed])
    return _section(
        "Seconds to compile forward, backward and optimizer as one graph, with an empty compiler cache and with a "
        "filled one in a new process, each model at its real size; then milliseconds of a step, and the largest "
        "difference of any parameter from the eager step's, in float32, whose rounding BatchNorm over two examples "
        "enlarges (`benchmarks/compile_models.py`):",
        _table(["", "million parameters", "batch", "cold", "warm", "step", "graphs", "difference"], rows),
        _machine(result),
    )


def distributed() -> str:
    if (result := _load("distributed")) is None:
        return ""
    rows = []
    for count, models in result["results"].items():
        for model, cases in models.items():
            for placement, row in cases.items():
                times = [_digits(value) for value in (row["milliseconds"], *row["quartiles"])]
                sizes = [_digits(row[f"{name}_bytes"] / 2**20) for name in ("sent", "formula", "state", "peak")]
                rows.append([f"{count} x {model}, {placement}", *times, _digits(row["of_data_parallel"]), *sizes])
    how = "compiled" if result["compiled"] else "eager"
    header = ["", "ms", "quartiles", "", "of data parallel", "sent, MiB", "by formula", "state, MiB", "peak, MiB"]
    return _section(
        f"One step of Adam on 1, 2 and 4 processes, {how}, the whole batch always the same "
        "(`benchmarks/distributed.py`). All processes share this one machine, so more of them are not faster; what "
        "counts are the ratios of a row to data parallel in the same round, and what each process sends and keeps. "
        "[What scaling costs](scaling.md) explains the formulas.",
        _table(header, rows),
        _machine(result),
    )


def fsdp_memory() -> str:
    if (result := _load("fsdp_memory")) is None:
        return ""
    rows = [[name, _digits(row["state_mib"]), _digits(row["peak_mib"])] for name, row in result["results"].items()]
    return _section(
        "Peak memory of one of two processes in a compiled step of a deep MLP, with and without "
        "`fnn.distributed.fsdp` (`benchmarks/fsdp_memory.py`):",
        _table(["", "parameters and optimizer state, MiB", "peak, MiB"], rows),
        _machine(result),
    )


def placements() -> str:
    if (result := _load("placements")) is None:
        return ""
    rows = []
    for count, nets in result.items():
        for net, cases in nets.items():
            for placement, row in cases.items():
                name = f"{count} x {net}, {placement}"
                if "error" in row:
                    rows.append([name, row["backend"], row["error"].splitlines()[0], *[""] * 3])
                    continue
                same = "yes" if row["repeats"] else "no"
                errors = [f"{row[of]:.0e}" for of in ("loss", "params")]
                rows.append([name, row["backend"], *errors, same, str(row["graphs"])])
    steps = next(row["steps"] for nets in result.values() for cases in nets.values() for row in cases.values())
    return _section(
        f"{steps} steps on several processes beside those of one, compiled in one graph (`tests/placement_matrix.py`): "
        "the largest relative difference of a loss, the largest difference of a parameter, and whether a second run "
        "gives the same bits.",
        _table(["", "compiler", "loss", "parameters", "repeats", "graphs"], rows),
    )


def bilinear() -> str:
    if (result := _load("bilinear")) is None:
        return ""
    names = ("ours", "torch.bilinear", "torch.einsum")
    rows = [
        [
            case,
            *(f"{row['sides'][name]['microseconds']:.0f}" for name in names),
            f"{row['speed_of_the_best_other']:.2f}",
        ]
        for case, row in result["results"].items()
    ]
    return _section(
        "`nn.Bilinear`, microseconds a call, eager, and how fast we are beside the best other; batch x in1 x in2 -> "
        "out, the first case that of the notes (`benchmarks/bilinear.py`):",
        _table(["", "nn.Bilinear", "torch.bilinear", "torch.einsum", ""], rows),
        _machine(result),
    )


def products() -> str:
    if (result := _load("matmul_cpu")) is None:
        return ""
    names = ("ours", "torch", "ours compiled", "torch compiled", "jax")
    rows = [
        [case]
        + [f"{row['sides'][name]['microseconds']:.0f}" for name in names]
        + [f"{row['speed_of_the_best_other'][name]:.2f}" for name in ("ours", "ours compiled")]
        for case, row in result["results"].items()
    ]
    return _section(
        "Float32 products on the CPU, microseconds a call from Python, and how fast we are beside the best other, "
        "torch eager or JAX, torch compiled or JAX; m x k x n, n an operand as it lies, t a transposed one "
        "(`benchmarks/matmul_cpu.py`):",
        _table(["", "fnn.ops", "torch", "fnn.ops compiled", "torch compiled", "JAX jit", "eager", "compiled"], rows),
        _machine(result, jax=True),
    )


def derivatives() -> str:
    if (result := _load("jacobians")) is None:
        return ""
    timed = ("ours", "ours compiled", "ours compiled warm", "torch", "torch compiled", "torch compiled warm")
    timed += ("jax", "jax warm")
    ratios = ("to_jax", "to_jax_warm", "over_torch", "over_torch_warm")
    times = [
        [f"({case}) {row['title']}"]
        + [_digits(row["sides"][name]["milliseconds"]) for name in timed]
        + [_digits(row["ratios"][name]) for name in ratios]
        for case, row in result["results"].items()
    ]
    memory = [
        [f"({case}) {row['title']}"]
        + [f"{row['sides'][k]['peak_mib']:.0f}" for k in ("ours", "ours compiled", "torch", "torch compiled", "jax")]
        + [row["sides"][k]["formula"] for k in ("torch compiled", "jax")]
        for case, row in result["results"].items()
    ]
    header = ["", "ours", "compiled", "warm", "torch.func", "compiled", "warm", "JAX", "warm", "of JAX", "warm"]
    return _section(
        "Derivatives on the CPU, milliseconds a call, ours, with torch.func and with JAX jit, of the last two the "
        "fastest formula; warm is with `fnn.tune_cpu`, for JAX with glibc's thresholds in its environment. Then our "
        "time by JAX's, and how many times faster we are than torch.func, compiled, without and with warm heaps "
        "(`benchmarks/jacobians.py`):",
        _table([*header, "torch.func / ours", "warm"], times),
        "Their peak memory beside the arguments, result included, in MiB, and the formulas taken:",
        _table(["", "ours", "compiled", "torch.func", "compiled", "JAX", "torch.func compiled", "JAX"], memory),
        _machine(result, jax=True),
    )


def jacobian_memory() -> str:
    if (result := _load("jacobian_memory")) is None:
        return ""
    rows = [
        [name, *(f"{row[size]:.0f} MiB" for size in ("peak_mib", "allowed_mib", "whole_mib"))]
        for name, row in result["results"].items()
    ]
    return _section(
        "Peak memory of large derivatives (`benchmarks/jacobian_memory.py`): allowed are, for the Jacobian, the result "
        'and the budget of `chunk_size="auto"`, for the norms, a fiftieth of the gradients:',
        _table(["", "peak", "allowed", "the Jacobian, or the gradients"], rows),
        _machine(result),
    )


def _section(*paragraphs: str) -> str:
    return "\n\n".join(paragraphs)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def _digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _machine(result: dict, jax: bool = False) -> str:
    m = result["machine"]
    rival = f", JAX {m['jax']}" if jax else ""
    return f"{m['gpu'] or m['cpu']}, {m['cores']} cores, torch {m['torch']}, {m['date']}{rival}."


def main() -> None:
    path = ROOT / "README.md"
    section = f"{BEGIN}\n{readme()}\n{END}"
    path.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: section, path.read_text(), flags=re.DOTALL))
    (ROOT / "docs" / "performance.md").write_text(page())


if __name__ == "__main__":
    main()
