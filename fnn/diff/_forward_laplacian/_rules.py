"""The table: which rule carries which function of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnn.diff._forward_laplacian import _composed, _elementwise, _linear, _products
from fnn.diff._forward_laplacian._carried import Carried, Unsupported, values
from triton_kernels._matmul import cpu
from triton_kernels._matmul.op import product

Rule = Callable[..., Any]


def _elementwise_rule(name: str) -> Rule:
    derivatives = _elementwise.FUNCTIONS[name]

    def rule(func: Callable, x: Any, *args: Any, **kwargs: Any) -> Carried:
        if not isinstance(x, Carried):
            raise Unsupported(f"{name} with an option that depends on the point")
        return _elementwise.elementwise(x, derivatives(x.value, *args, **kwargs))

    return rule


def _plain(rule: Callable, swapped: bool = False) -> Rule:
    """A rule that need not know by which of its names the function was called."""
    if swapped:
        return lambda func, a, b: rule(b, a)
    return lambda func, *args, **kwargs: rule(*args, **kwargs)


def _constant(func: Callable, *args: Any, **kwargs: Any) -> Any:
    """Functions that are constant almost everywhere: nothing of their result is followed."""
    return func(*[values(x) for x in args], **kwargs)


def _detach(func: Callable, x: Any) -> Tensor:
    return x.value.detach()


RULES: dict[str, Rule] = {
    **{name: _elementwise_rule(name) for name in _elementwise.FUNCTIONS},
    **dict.fromkeys(_linear.ALONG_FIRST, _linear.along_first),
    **dict.fromkeys(_linear.RESHAPED, _linear.reshaped),
    **dict.fromkeys(_linear.CONVERTED, _linear.converted),
    **dict.fromkeys(("sum", "mean"), _linear.reduced),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack", "hstack", "vstack"), _linear.of_list),
    "where": _linear.where,
    "getitem": _linear.item,
    "add": _plain(_products.add),
    "sub": _plain(_products.sub),
    "subtract": _plain(_products.sub),
    "rsub": _plain(_products.sub, swapped=True),
    "mul": _plain(_products.mul),
    "multiply": _plain(_products.mul),
    "div": _plain(_products.div),
    "divide": _plain(_products.div),
    "true_divide": _plain(_products.div),
    "truediv": _plain(_products.div),
    "rdiv": _plain(_products.div, swapped=True),
    "rtruediv": _plain(_products.div, swapped=True),
    "pow": _plain(_elementwise.power),
    "rpow": _plain(_elementwise.power, swapped=True),
    **dict.fromkeys(("matmul", "mm", "mv", "dot", "vdot", "bmm"), _products.matmul),
    "rmatmul": lambda func, a, b: _products.matmul(torch.matmul, b, a),
    "linear": _products.linear,
    "product": _products.product,
    "addmm": _products.addmm,
    "einsum": _products.einsum,
    **dict.fromkeys(_products.BILINEAR, _products.bilinear),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _products.convolution),
    "logsumexp": _plain(_composed.logsumexp),
    "softmax": _plain(_composed.softmax),
    "log_softmax": _plain(_composed.log_softmax),
    "norm": _composed.norm,
    "vector_norm": _composed.norm,
    "layer_norm": _plain(_composed.layer_norm),
    "detach": _detach,
    **dict.fromkeys(
        [
            "eq",
            "ge",
            "gt",
            "le",
            "lt",
            "ne",
            "greater",
            "greater_equal",
            "less",
            "less_equal",
            "isfinite",
            "isinf",
            "isnan",
            "sign",
            "floor",
            "ceil",
            "round",
            "trunc",
            "argmax",
            "argmin",
            "argsort",
            "zeros_like",
            "ones_like",
            "full_like",
            "empty_like",
            "new_zeros",
            "new_ones",
            "new_full",
            "new_empty",
        ],
        _constant,
    ),
}
# Of the shape or the dtype alone, which the stand-in has too.
METADATA = [
    "dim",
    "ndimension",
    "size",
    "numel",
    "nelement",
    "stride",
    "is_floating_point",
    "is_complex",
    "is_contiguous",
    "element_size",
    "get_device",
    "is_inference",
    "len",
]
PROPERTIES = (
    "shape dtype device ndim layout is_cuda is_cpu is_sparse is_meta is_mps is_xpu requires_grad itemsize nbytes "
    "_version _base"
)


def _names() -> dict[Any, str]:
    """Every function and method of torch that is one of the rules', with its name in the table.

    Functions are known by identity: another library's `softmax` may be a different function.
    """
    found: dict[Any, str] = {}
    for name in (*RULES, *METADATA):
        for space in (torch, torch.linalg, torch.special, F, Tensor):
            for spelling in (name, f"__{name}__", f"__r{name}__" if name in ("add", "mul") else name, f"linalg_{name}"):
                if (function := getattr(space, spelling, None)) is not None and callable(function):
                    found[function] = name
    for name in ("T", "mT", *PROPERTIES.split()):
        if hasattr(Tensor, name):
            found[getattr(Tensor, name).__get__] = name
    found[product] = "product"
    if cpu.linear_pointwise is not None:
        found[cpu.linear_pointwise] = "linear"
    return found


NAMES = _names()
OF_STAND_IN = frozenset((*METADATA, *PROPERTIES.split()))


# The names by which torch takes operands as keywords, in order of position, and other spellings of options.
_FIRST = ("input", "self", "tensors", "x", "a", "x1")
_SECOND = ("other", "exponent", "mat2", "vec", "vec2", "tensor", "x2")
_OPERANDS = {"where": (("condition",), _FIRST, _SECOND), "addmm": (_FIRST, ("mat1",), ("mat2",))}
_OPTIONS = {"axis": "dim", "keepdims": "keepdim", "ord": "p", "normalized_shape": "shape"}


def arranged(name: str, operands: list[Any], options: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The operands of a call by position, as the rules take them, and the options by one name each."""
    options = {_OPTIONS.get(key, key): value for key, value in options.items()}
    for names in _OPERANDS.get(name, (_FIRST, _SECOND))[len(operands) :]:
        given = [key for key in names if key in options]
        if not given:
            break
        operands = [*operands, options.pop(given[0])]
    return operands, options


def name_of(function: Any) -> str:
    """The function's name in the table, or ""."""
    return NAMES.get(function, "")


def title(function: Any) -> str:
    """How to call a function in a message."""
    return str(getattr(function, "__name__", function))


# Dynamo shall look functions up while it traces, as a constant: it makes guards of a dictionary's keys that fail.
name_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
title._dynamo_marked_constant = True  # type: ignore[attr-defined]
