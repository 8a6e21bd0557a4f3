"""The mode that a converted module runs in: random functions draw from a key, and norms write nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fnn import random

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}
"""What a function is replaced by: `rule(mode, func, *args, **kwargs)`."""


class Pure(TorchFunctionMode):
    """Computes the functions in `RULES` by their rules, which are pure.

    counts: the numbers of batches seen, by running mean. written: the new values of buffers, by their old ones.
    """

    def __init__(self, who: str, module: torch.nn.Module, key: Tensor | None, train: bool):
        super().__init__()
        self.who, self.module, self.given, self.train = who, module, key, train
        self.draws = 0
        self.counts: dict[Tensor, Tensor] = {}
        self.written: dict[Tensor, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RULES:
            return RULES[func](self, func, *args, **kwargs)
        if func is Tensor.unflatten:  # Dynamo cannot trace this method under a mode
            func = torch.unflatten
        return func(*args, **kwargs)

    def now(self, buffer: Any) -> Any:
        """The value that a buffer would have, had it been written into."""
        return self.written.get(buffer, buffer)

    def key(self, what: str) -> Tensor:
        """The key of the next draw."""
        if self.given is None:
            mode = "in training" if self.train else "in evaluation too"
            call = "net.apply(params, state, x, key=key" + (", train=True)" if self.train else ")")
            raise ValueError(f"{self.who}: {self.where()}{what} needs a key {mode}: {call}")
        self.draws += 1
        return random.fold_in(self.given, self.draws - 1)

    def refuse(self, what: str, cure: str) -> None:
        raise TypeError(f"{self.who}: {self.where()}{what} draws from torch's global generator; {cure}")

    def where(self) -> str:
        """The submodule that is running, for errors."""
        if torch.compiler.is_compiling():
            return ""
        names = {id(part): name for name, part in self.module.named_modules()}
        frame = sys._getframe()
        while frame is not None:
            name = names.get(id(frame.f_locals.get("self")))
            if name is not None:
                part = self.module.get_submodule(name)
                return f"submodule {name!r} ({type(part).__name__}): " if name else ""
            frame = frame.f_back
        return ""


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """A decorator: the rule of these functions."""

    def register(definition: Rule) -> Rule:
        for function in functions:
            RULES[function] = definition
        return definition

    return register
