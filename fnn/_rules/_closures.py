"""Tensors that a function has from elsewhere than its arguments: a rule of one's own would lose their derivative."""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fnn._rules._call import Call
from fnn._rules._opaque import release


def check_closures(name: str, call: Call, *functions: Any) -> None:
    """Raise `ValueError` where a function has a tensor that is differentiated or batched from elsewhere than its call.

    That is: from closures, defaults, `functools.partial`, the object of a method, a module, and globals that its code
    names, and from functions and objects among the arguments; through functions, containers and objects there, though
    not to any depth of objects in objects.
    """
    seen: dict[int, int] = {}
    others = [leaf for leaf in call.leaves if not isinstance(leaf, Tensor)]
    for function in (*functions, *call.nondiff, *others):
        for where, tensor in _reached(function, "a tensor", seen):
            wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[attr-defined]
            if wrapped or (tensor.requires_grad and torch.is_grad_enabled()):
                variable = where[where.index("'") :] if where.endswith("'") else "it"
                raise ValueError(
                    f"{name}: the function reads {where} from outside its arguments, which is being differentiated or "
                    f"batched, and its derivative with respect to that would be lost; pass {variable} as an argument"
                )


_PLAIN = (int, float, complex, str, bytes, type(None), type, types.ModuleType, types.CodeType)
_LIBRARIES = {"fnn", "triton_kernels", "torch", "numpy", "scipy", "triton", *sys.stdlib_module_names}
_NO_DERIVATIVE = {"shape", "dtype", "device", "ndim", "size", "dim", "numel", "detach", "data", "requires_grad"}
_DEPTH = 3  # of objects in objects: beyond are an application's own, and walking them would cost time in each call


def _reached(value: Any, where: str, seen: dict[int, int], depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a function, container or object has, with words for where."""
    if isinstance(value, Tensor):
        yield where, value
    elif not isinstance(value, _PLAIN) and seen.get(id(value), _DEPTH + 1) > depth:
        seen[id(value)] = depth
        if isinstance(value, dict):
            parts: Any = ((where, part) for part in value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            parts = ((where, part) for part in value)
        elif isinstance(value, types.FunctionType):
            parts = _of_function(value, where)
        elif depth < _DEPTH:
            parts, depth = _of_object(value, where), depth + 1
        else:
            return
        for name, part in parts:
            yield from _reached(part, name, seen, depth)


def _of_function(function: types.FunctionType, where: str) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable without a value yet
            yield repr(name), cell.cell_contents
    defaults = function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    for name, default in (*zip(names, defaults, strict=True), *(function.__kwdefaults__ or {}).items()):
        yield f"default argument {name!r}", default
    yield where, getattr(function, "__wrapped__", None)
    if getattr(function, "is_holder", False):
        yield where, release(function)
    package = _package(function.__globals__)
    if package not in _LIBRARIES:
        for names in _globals_read(code):
            if names[0] not in function.__globals__:
                continue
            value = _global(function.__globals__[names[0]], names[1:])
            # Functions of other packages lead through those packages' own globals, to objects that are not the user's.
            if isinstance(value, types.FunctionType) and _package(value.__globals__) != package:
                continue
            yield f"global {'.'.join(names)!r}", value


def _of_object(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    kind = type(value).__name__
    if isinstance(value, functools.partial):
        yield where, value.func
        yield "an argument of functools.partial", (value.args, value.keywords)
    elif isinstance(value, torch.nn.Module):
        for name, tensor in (*value.named_parameters(), *value.named_buffers()):
            yield f"{name!r} of {kind}", tensor
        for module in value.modules():
            for name, part in vars(module).items():
                if not name.startswith("_"):
                    yield f"{name!r} of {type(module).__name__}", part
        yield where, type(value).forward
    else:
        if (owner := getattr(value, "__self__", None)) is not None:  # of a method
            yield f"the {type(owner).__name__} whose method it is", owner
            yield where, getattr(value, "__func__", None)
        slots = [slot for cls in type(value).__mro__ for slot in _slots(cls) if hasattr(value, slot)]
        for name in (*getattr(value, "__dict__", ()), *slots):
            yield f"{name!r} of {kind}", getattr(value, name, None)
        call = getattr(type(value), "__call__", None)  # noqa: B004
        yield where, call if isinstance(call, types.FunctionType) else None


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _global(value: Any, names: tuple[str, ...]) -> Any:
    """What `value.a.b` is as far as modules and objects know it themselves, None where it has no derivative."""
    for name in names:
        if isinstance(value, types.ModuleType) and _package(vars(value)) in _LIBRARIES:
            return None
        if isinstance(value, Tensor) and name in _NO_DERIVATIVE:
            return None
        held_values = getattr(value, "__dict__", {})
        if isinstance(value, Tensor) or name not in held_values:
            break
        value = held_values[name]
    return value


def _package(namespace: dict[str, Any]) -> str:
    return (namespace.get("__name__") or "").partition(".")[0]


@functools.lru_cache(maxsize=4096)
def _globals_read(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """The globals that this code and the functions in it read, each with the attributes that follow: ("a", "b")."""
    found: dict[tuple[str, ...], None] = {}
    names: tuple[str, ...] = ()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "EXTENDED_ARG":
            continue
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and names:
            names = (*names, instruction.argval)
            continue
        if names:
            found[names] = None
        names = (instruction.argval,) if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") else ()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.update(dict.fromkeys(_globals_read(constant)))
    return tuple(found)
