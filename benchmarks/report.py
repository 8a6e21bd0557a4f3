"""Write the tables of the README from benchmarks/results: `python benchmarks/report.py`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def render() -> str:
    """The results section, from the JSON files that the benchmarks wrote."""
    parts = []
    trainer = _load("trainer")
    if trainer is not None:
        rows = [
            f"| {name} | {run['cold']['accuracy']:.4f} | {run['cold']['training_seconds']:.0f} s "
            f"| {run['warm']['training_seconds']:.0f} s |"
            for name, run in trainer["results"].items()
        ]
        parts += [
            "The main job (`benchmarks/trainer.py`), training time with compilation, from an empty compiler cache and "
            "from a filled one:",
            "\n".join(["| | test accuracy | cold | warm |", "|---|---|---|---|", *rows]),
            _machine(trainer),
        ]
    memory = _load("step_memory")
    if memory is not None:
        rows = [
            f"| {name} | {row['peak_mib']:.0f} MiB | {row['budget_mib']:.0f} MiB | {row['over_budget']:+.0%} |"
            for name, row in memory["results"].items()
        ]
        parts += [
            "Peak memory of a step, six 2048 x 2048 layers with Adam (`benchmarks/step_memory.py`):",
            "\n".join(["| | peak | parameters + optimizer state + activations | |", "|---|---|---|---|", *rows]),
            _machine(memory),
        ]
    products = _load("matmul_cpu")
    if products is not None:
        names = ("ours", "torch", "ours compiled", "torch compiled", "jax")
        rows = [
            f"| {case} | "
            + " | ".join(f"{row['sides'][name]['microseconds']:.0f}" for name in names)
            + " | "
            + " | ".join(f"{row['speed_of_the_best_other'][name]:.2f}" for name in ("ours", "ours compiled"))
            + " |"
            for case, row in products["results"].items()
        ]
        parts += [
            "Float32 products on the CPU, microseconds a call from Python, and how fast we are beside the best other, "
            "torch eager or JAX, torch compiled or JAX; m x k x n, n an operand as it lies, t a transposed one "
            "(`benchmarks/matmul_cpu.py`):",
            "\n".join(
                [
                    "| | fnn.ops | torch | fnn.ops compiled | torch compiled | JAX jit | eager | compiled |",
                    "|---|" + "---|" * 7,
                    *rows,
                ]
            ),
            _machine(products)[:-1] + f", JAX {products['machine']['jax']}.",
        ]
    parts += _derivatives()
    return "\n\n".join(["## Results", *parts]) if parts else ""


def _derivatives() -> list[str]:
    parts = []
    times = _load("jacobians")
    if times is not None:
        names = ("ours", "ours compiled", "ours compiled warm", "torch", "torch compiled", "torch compiled warm")
        names += ("jax", "jax warm")
        ratios = ("to_jax", "to_jax_warm", "over_torch", "over_torch_warm")
        rows = [
            f"| ({case}) {row['title']} | "
            + " | ".join(_digits(row["sides"][name]["milliseconds"]) for name in names)
            + " | "
            + " | ".join(_digits(row["ratios"][name]) for name in ratios)
            + " |"
            for case, row in times["results"].items()
        ]
        unwarmed = ("ours", "ours compiled", "torch", "torch compiled", "jax")
        memory = [
            f"| ({case}) {row['title']} | "
            + " | ".join(f"{row['sides'][name]['peak_mib']:.0f}" for name in unwarmed)
            + f" | {row['sides']['torch compiled']['formula']} | {row['sides']['jax']['formula']} |"
            for case, row in times["results"].items()
        ]
        parts += [
            "Derivatives on the CPU, milliseconds a call, ours, with torch.func and with JAX jit, of the last two the "
            "fastest formula; warm is with `fnn.tune_cpu`, for JAX with glibc's thresholds in its environment. Then "
            "our time by JAX's, and how many times faster we are than torch.func, compiled, without and with warm "
            "heaps (`benchmarks/jacobians.py`):",
            "\n".join(
                [
                    "| | ours | compiled | warm | torch.func | compiled | warm | JAX | warm "
                    "| of JAX | warm | torch.func / ours | warm |",
                    "|---|" + "---|" * 12,
                    *rows,
                ]
            ),
            "Their peak memory beside the arguments, result included, in MiB, and the formulas taken:",
            "\n".join(
                [
                    "| | ours | compiled | torch.func | compiled | JAX | torch.func compiled | JAX |",
                    "|---|" + "---|" * 7,
                    *memory,
                ]
            ),
            _machine(times)[:-1] + f", JAX {times['machine']['jax']}.",
        ]
    large = _load("jacobian_memory")
    if large is not None:
        rows = [
            f"| {name} | {row['peak_mib']:.0f} MiB | {row['allowed_mib']:.0f} MiB | {row['whole_mib']:.0f} MiB |"
            for name, row in large["results"].items()
        ]
        parts += [
            "Peak memory of large derivatives (`benchmarks/jacobian_memory.py`): allowed are, for the Jacobian, the "
            'result and the budget of `chunk_size="auto"`, for the norms, a fiftieth of the gradients:',
            "\n".join(["| | peak | allowed | the Jacobian, or the gradients |", "|---|---|---|---|", *rows]),
            _machine(large),
        ]
    remat = _load("remat_memory")
    if remat is not None:
        rows = [f"| {name} | {row['peak_mib']:.0f} MiB |" for name, row in remat["results"].items()]
        parts += [
            "Peak memory of a step with and without `fnn.remat` (`benchmarks/remat_memory.py`):",
            "\n".join(["| | peak |", "|---|---|", *rows]),
            _machine(remat),
        ]
    return parts


def _digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _machine(result: dict) -> str:
    m = result["machine"]
    return f"{m['gpu'] or m['cpu']}, {m['cores']} cores, torch {m['torch']}, {m['date']}."


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    section = f"{BEGIN}\n{render()}\n{END}"
    readme.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: section, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
