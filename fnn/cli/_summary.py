"""`fnn summary`: the table of a network that is named on the command line."""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import os
import sys
from typing import Any

import torch
from torch import Tensor

import fnn
from fnn import interop, models, nn


def run(given: argparse.Namespace) -> int:
    net = layer(build(given.model, dict(map(_keyword, given.set))))
    inputs = list(map(example, given.input))
    try:
        table = fnn.summary(net, *inputs, flops=given.flops)
    except RuntimeError as error:  # torch's word for inputs that do not fit
        raise ValueError(str(error)) from error
    table.print()
    return 0


def build(name: str, keywords: dict[str, Any]) -> Any:
    """The model that a function of `fnn.models`, or the one at `package.module:function`, gives for these keywords.

    Raises ValueError naming the choices for an unknown name, and for keywords that the function does not take.
    """
    make = _located(name) if ":" in name else _named(name)
    if isinstance(make, (nn.Layer, torch.nn.Module)):
        return make
    try:
        return make(**keywords)
    except TypeError as error:
        raise ValueError(f"{name}: {error}; --set gives keyword arguments") from error


def layer(model: Any) -> nn.Layer:
    """A layer as it is, a torch module as the layer that computes the same."""
    if isinstance(model, torch.nn.Module):
        return interop.from_module(model).net
    if not isinstance(model, nn.Layer):
        raise TypeError(f"expected an fnn layer or a torch.nn.Module, got {type(model).__name__}")
    return model


def example(text: str) -> Tensor:
    """A tensor without memory: "1,3,32,32" of float32, "1,64:int64" of integers."""
    sizes, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 0 or math.prod(shape) >= 2**59 or not isinstance(dtype, torch.dtype):
        raise ValueError(f"--input {text}: expected sizes and a dtype of torch, such as 1,1,32,32 or 1,64:int64")
    return torch.empty(shape, dtype=dtype, device="meta")


def _keyword(text: str) -> tuple[str, Any]:
    """The name and the value of NAME=VALUE: a Python literal, or else a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--set {text}: expected NAME=VALUE, such as classes=100")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _named(name: str) -> Any:
    names = sorted(n for n, value in vars(models).items() if callable(value) and n.islower() and n[0] != "_")
    if name not in names:
        choices = ", ".join(names)
        raise ValueError(f"{name!r} is not in fnn.models ({choices}); a model of your own is package.module:function")
    return getattr(models, name)


def _located(name: str) -> Any:
    """What `package.module:attribute` names, found from the working folder too."""
    path, _, attribute = name.partition(":")
    if path.partition(".")[0] == "torchvision":
        from fnn.data._torchvision import torchvision

        torchvision()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"{name}: there is no module {error.name!r} here or among what is installed") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{name}: {path} has no {attribute!r}")
        found = getattr(found, part)
    return found
