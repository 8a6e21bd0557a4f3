"""Checks of the packages that parts of fnn use where they are installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import partial

import torch

from fnn.cli._finding import Finding

# Module -> (package, what for, the extra that brings it).
PACKAGES = {
    "tyro": ("tyro", "the example trainers' options", "examples"),
    "matplotlib": ("matplotlib", "curves and pictures", "examples"),
    "sklearn": ("scikit-learn", "data.digits", "examples"),
    "tensorboard": ("tensorboard", "train.TensorBoard", "log"),
    "onnx": ("onnx", "interop.export to ONNX", "onnx"),
    "onnxscript": ("onnxscript", "interop.export to ONNX", "onnx"),
    "wandb": ("wandb", "logging to Weights & Biases", ""),
}


def torchvision() -> Finding:
    """torchvision, whose compiled part fits one version and build of torch."""
    if importlib.util.find_spec("torchvision") is None:
        text = "not installed; data sets other than digits and pretrained networks need it"
        return Finding("torchvision", "ok", text, 'pip install "fnn[examples]"')
    from fnn.data._torchvision import torchvision as load

    minor = int(torch.__version__.split(".")[1])
    pair = f"pip install torchvision==0.{minor + 15}.*"  # their versions go in step since torch 2.0
    try:
        version = load().__version__
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        return Finding("torchvision", "warn", f"does not import: {type(error).__name__}: {first}", pair)
    if version.split(".")[1] != str(minor + 15):
        return Finding("torchvision", "warn", f"{version}, which is made for another torch", pair)
    return Finding("torchvision", "ok", version)


def package(module: str) -> Finding:
    """Whether an optional package is there; what for and how to get it where it is not."""
    name, purpose, extra = PACKAGES[module]
    if importlib.util.find_spec(module) is not None:
        return Finding(name, "ok", importlib.metadata.version(name))
    install = f'pip install "fnn[{extra}]"' if extra else f"pip install {name}"
    return Finding(name, "ok", f"not installed; {purpose} needs it", install)


def checks() -> dict[str, Callable[[], Finding]]:
    """A check for each package, by the package's name."""
    return {"torchvision": torchvision} | {PACKAGES[module][0]: partial(package, module) for module in PACKAGES}
