"""What a transform asks of the function it differentiates: no hidden randomness, no writes, no control flow on values.

The outermost transform checks, once a call: in eager mode by what changed (the state of torch's generators, the
versions of the arguments), which costs microseconds; while compiling by the functions that are called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._guards import detect_fake_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fnn import tree
from fnn.diff._composed import through

_CURE = "draw with fnn.random from a key that the function takes as an argument, or use fnn.nn.Dropout with a key"


def call(name: str, run: Callable[..., Any], *values: Any) -> Any:
    """`run(*values)`, where `run` calls the user's function, with the errors of functions that are not pure."""
    if torch.compiler.is_compiling():
        return _traced_call(name, run, *values)
    if get_interpreter_stack() or detect_fake_mode() is not None:  # without data, states cannot be compared
        return _explained(name, run, *values)
    tensors = [leaf for leaf in tree.leaves(values) if isinstance(leaf, Tensor) and not leaf.is_inference()]
    versions = [leaf._version for leaf in tensors]
    states = _generator_states()
    result = _explained(name, run, *values)
    if any(not torch.equal(old, new) for old, new in zip(states, _generator_states(), strict=True)):
        # Another thread may have drawn, so the function is run again to see whether it does.
        with _RefuseRandomOperators(name):
            run(*values)
    for leaf, version in zip(tensors, versions, strict=True):
        if leaf._version != version:
            raise RuntimeError(
                f"{name}: the function wrote into {_place(values, leaf)} in place, and a transform may call it more "
                "than once; write x = x + 1, not x += 1 or x.add_(1), or clone the argument first"
            )
    return result


def _place(values: tuple[Any, ...], leaf: Tensor) -> str:
    """Where among a call's values a leaf is, in words; the values are its arguments, or (selected, args, kwargs)."""
    whole = len(values) == 3 and isinstance(values[1], tuple) and isinstance(values[2], dict)
    for arguments in (values[1], values[2]) if whole else (values,):
        for path, other in tree.paths(arguments).items():
            if other is leaf:
                index, _, rest = path.partition(".")
                return f"leaf {rest!r} of argument {index}" if rest else f"argument {index}"
    return "its argument"


def _explained(name: str, run: Callable[..., Any], *values: Any) -> Any:
    try:
        return run(*values)
    except RuntimeError as error:
        if (message := explanation(str(error))) is None:
            raise
        raise RuntimeError(f"{name}: {message}") from error


_traced_depth = 0  # of the transforms that are being compiled; Dynamo does not show the stack of torch's


def _traced_call(name: str, run: Callable[..., Any], *values: Any) -> Any:
    global _traced_depth
    outermost = _traced_depth == 0
    _traced_depth += 1
    try:
        if not outermost:
            return run(*values)
        with _RefuseRandomFunctions(name):
            return run(*values)
    finally:
        _traced_depth -= 1


def is_nested() -> bool:
    """Whether a transform that differentiates is already active around this call."""
    return any(level.key() in (TransformType.Grad, TransformType.Jvp) for level in get_interpreter_stack() or ())


def is_outermost() -> bool:
    """Whether no transform is active around this call, `vmap` neither."""
    return not get_interpreter_stack()


# Dynamo enters the same levels while it traces.
is_nested._dynamo_marked_constant = True  # type: ignore[attr-defined]
is_outermost._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explanation(message: str) -> str | None:
    """A cure for an error of torch's about functions that transforms do not take, or None."""
    if "data-dependent control flow" in message or "vmap: It looks like you're calling .item()" in message:
        return (
            "the function branches on the values of its tensors or calls .item(), which cannot be done for all rows "
            "at once; choose between values with torch.where or between functions with torch.cond"
        )
    if "aten::nonzero" in message or "dynamic shape" in message:
        return (
            "the size of an intermediate value depends on the values of tensors (nonzero, boolean masks, unique); "
            "keep all entries and set those not wanted to zero with torch.where"
        )
    if "would mutate a captured Tensor" in message or "is being used in an in-place operation" in message:
        return (
            "the function writes in place into an argument or into a tensor from outside; return the new value "
            "(through has_aux=True) and write x = x + 1, not x += 1 or x.add_(1)"
        )
    if "inplace arithmetic" in message:
        return (
            "the function writes rows that differ into a tensor made without them; build it with torch.stack, "
            "torch.cat or torch.where, or make it by x.new_zeros(...) of a differentiated x"
        )
    if "called random operation while in randomness error mode" in message:
        return f"the function draws from torch's global generator, which no key controls; {_CURE}"
    return None


def _generator_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


class _RefuseRandomOperators(TorchDispatchMode):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            attention = any(argument.name == "dropout_p" for argument in func._schema.arguments)
            if not attention:
                raise TypeError(
                    f"{self.name}: {func} draws from torch's global generator, which no key controls; {_CURE}"
                )
        return func(*args, **kwargs)


class _RefuseRandomFunctions(TorchFunctionMode):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM and _draws(func, args, kwargs):
            raise TypeError(
                f"{self.name}: {func.__name__} draws from torch's global generator, which no key controls; {_CURE}"
            )
        return through(func, args, kwargs)


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of a random function draws anything; Dynamo passes the arguments on as they were written."""
    if func not in _TRAINING:
        return kwargs.get("generator") is None
    place, default = _TRAINING[func]
    training = args[place] if len(args) > place else kwargs.get("training", kwargs.get("train", default))
    rate = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    return bool(training) and (place != 2 or rate != 0)


# Where a function has the argument that turns its randomness on, and its default.
_TRAINING = {
    **{getattr(torch.nn.functional, name): (2, True) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d")},
    **{getattr(torch.nn.functional, name): (2, False) for name in ("alpha_dropout", "feature_alpha_dropout")},
    **{getattr(torch, name): (2, True) for name in ("dropout", "alpha_dropout", "feature_dropout")},
    torch.feature_alpha_dropout: (2, True),
    torch.nn.functional.rrelu: (3, False),
}
_RANDOM = frozenset(
    getattr(torch, name)
    for name in (
        "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial",
        "normal", "poisson", "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout",
    )
) | frozenset(
    getattr(torch.nn.functional, name)
    for name in (
        "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "rrelu",
        "gumbel_softmax",
    )
) | frozenset(
    getattr(Tensor, name)
    for name in (
        "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal_",
        "random_", "uniform_",
    )
)  # fmt: skip
