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
    return "\n\n".join(["## Results", *parts]) if parts else ""


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
