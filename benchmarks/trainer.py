"""The main job as a user runs it, cold and warm: `python benchmarks/trainer.py [--mnist ROOT]`.

Runs examples/train_image.py with an empty compiler cache, then again with the cache it left. Records test accuracy,
seconds of training (compilation included) and seconds of the whole process. Writes benchmarks/results/trainer.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import machine

ROOT = Path(__file__).parents[1]


def run(arguments: list[str], cache: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(ROOT / "examples" / "train_image.py"), *arguments, "--out", out]
        started = time.perf_counter()
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        whole = time.perf_counter() - started
        config = json.loads((Path(out) / "config.json").read_text())
    compiled = re.search(r"compiled in ([\d.]+) s", done.stdout)
    training = re.search(r"after ([\d.]+) s", done.stdout)
    assert compiled is not None
    assert training is not None
    return {
        "accuracy": config["test"]["accuracy"],
        "steps": config["steps"],
        "compile_seconds": float(compiled[1]),
        "training_seconds": float(training[1]),
        "process_seconds": whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", help="the folder that holds MNIST/raw; left out without it")
    root = parser.parse_args().mnist
    jobs = {"LeNet-5, digits": [], "MLP, digits": ["--model", "mlp"]}
    if root is not None:
        jobs["LeNet-5, MNIST, augmented"] = ["--data", "mnist", "--root", root, "--augment"]
    results = {}
    for name, arguments in jobs.items():
        with tempfile.TemporaryDirectory() as cache:
            results[name] = {"cold": run(arguments, cache), "warm": run(arguments, cache)}
        for temperature, row in results[name].items():
            print(
                f"{name:>26} {temperature}: accuracy {row['accuracy']:.4f}, training {row['training_seconds']:.1f} s "
                f"of which the first step {row['compile_seconds']:.1f} s, whole process {row['process_seconds']:.1f} s"
            )
    path = Path(__file__).parent / "results" / "trainer.json"
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
