"""Random functions that `torch.compile` hides from the mode that would draw them from a key."""

from __future__ import annotations

import contextlib
import dis
import itertools
import types
from typing import Any

import torch
from torch._ops import OpOverloadPacket

# Measured on torch 2.11 and 2.13: while compiling, calls of these reach no TorchFunctionMode.
_HIDDEN = ["rand_like", "randn_like", "randint_like", "normal"]
if torch.__version__ < (2, 13):  # type: ignore[operator]
    _HIDDEN += ["rand", "randn", "randint", "randperm"]
_FUNCTIONS = {getattr(torch, name): name for name in _HIDDEN}


def unseen_draws(module: torch.nn.Module) -> str:
    """Why the module cannot be compiled, or "": its code calls a random function that the compiler hides."""
    seen: set[Any] = set()
    for path, part in module.named_modules():
        for cls in type(part).__mro__:
            if cls.__module__.startswith("torch.nn.") or cls in (torch.nn.Module, object):
                continue
            for function in (*vars(cls).values(), *vars(part).values()):
                if isinstance(function, types.FunctionType) and (name := _calls(function, seen)):
                    return (
                        f"{f'submodule {path!r}' if path else 'the module'} ({type(part).__name__}) calls "
                        f"torch.{name}, which the compiler takes from torch's global generator, whatever the key; "
                        "write torch.empty_like(x).normal_() or .uniform_(), or do not compile it"
                    )
    return ""


def _is_attribute(step: dis.Instruction) -> bool:
    return step.opname in ("LOAD_ATTR", "LOAD_METHOD")


def _draws(operator: OpOverloadPacket) -> bool:
    overloads = (getattr(operator, name) for name in operator.overloads())
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


def _calls(function: types.FunctionType, seen: set[Any]) -> str | None:
    """The name of a hidden function that this one, or a Python function that it names, calls."""
    if function in seen or function.__name__ in ("__init__", "reset_parameters"):
        return None
    seen.add(function)
    names = dict(function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell may still be empty
            names[name] = cell.cell_contents
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        steps = list(dis.get_instructions(code))
        for number, step in enumerate(steps):
            if not step.opname.startswith(("LOAD_GLOBAL", "LOAD_DEREF")):
                continue
            value = names.get(step.argval)
            for following in itertools.takewhile(_is_attribute, steps[number + 1 :]):
                if not isinstance(value, types.ModuleType):
                    break
                value = getattr(value, following.argval, None)
            if isinstance(value, types.BuiltinFunctionType | types.BuiltinMethodType) and value in _FUNCTIONS:
                return _FUNCTIONS[value]
            if isinstance(value, OpOverloadPacket) and _draws(value):
                return f"ops.{value}"
            own = isinstance(value, types.FunctionType) and not value.__module__.startswith("torch.")
            if own and (name := _calls(value, seen)):  # type: ignore[arg-type]
                return name
    return None
