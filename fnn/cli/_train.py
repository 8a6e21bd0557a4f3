"""`fnn train`: the example trainers by name.

They are the very files of examples/, the ones that people read and copy: in a checkout those beside the package, in an
installed one those that the wheel lays under share/fnn/examples. One is run as `python FILE ...` runs it.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import runpy
import sys
from pathlib import Path

import fnn

SHARED = Path("share/fnn/examples")
# The modules that a trainer imports and the extra `examples` brings, where their names differ from the package's.
_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "torchvision": "torchvision", "tyro": "tyro"}


def run(given: argparse.Namespace) -> int:
    try:
        found = trainers(folder())
    except FileNotFoundError as error:
        sys.exit(f"fnn train: {error}")
    if given.list or given.name is None:
        width = max(map(len, found), default=0)
        for name, (_, purpose) in found.items():
            print(f"{name:{width}}  {purpose}")
        print(f"\nfnn train NAME --help shows the options of one. The files, to read and to copy: {folder()}")
        return 0
    if given.name not in found:
        sys.exit(f"fnn train: {given.name!r} is no trainer; there are {', '.join(found)}")
    path, _ = found[given.name]
    argv, sys.argv = sys.argv, [str(path), *given.options]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        sys.exit(f'fnn train: {path.name} needs {_PACKAGES[error.name]}; pip install "fnn[examples]" brings it')
    finally:
        sys.argv = argv
    return 0


def folder() -> Path:
    """Where the trainers lie. Raises `FileNotFoundError` where they are neither in a checkout nor installed."""
    above = Path(fnn.__file__).parents[1]
    if (above / "pyproject.toml").is_file() and (above / "examples").is_dir():
        return above / "examples"
    found = [above / SHARED]  # where pip install --target puts it; elsewhere the installer has noted the place
    try:
        files = importlib.metadata.files("fnn") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found += [Path(str(file.locate())).resolve().parent for file in files if file.parent.match(f"*/{SHARED}")]
    for place in found:
        if place.is_dir():
            return place
    raise FileNotFoundError("the example trainers are not installed with fnn; they are in examples/ of the project")


def trainers(folder: Path) -> dict[str, tuple[Path, str]]:
    """The file and the purpose of each trainer: a script with a `Config`, called `image` where it is train_image.py."""
    found = {}
    for path in folder.glob("*.py"):
        script = ast.parse(path.read_bytes())
        if any(isinstance(node, ast.ClassDef) and node.name == "Config" for node in script.body):
            purpose = (ast.get_docstring(script) or "").partition("\n")[0]
            found[path.stem.removeprefix("train_")] = path, purpose
    return dict(sorted(found.items()))
