"""Shape inference: running layers on fake tensors, which have shapes and dtypes but no data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fnn import tree

_depth = 0


def inferring() -> bool:
    """Whether layers run to learn shapes: with one example of a batch, which is too few to train on."""
    return _depth > 0


class Inference:
    """Fake tensors to run layers on; they meet real tensors that a function closes over.

    As a context it refuses operators that draw from torch's global generator: no key controls them.
    """

    def __init__(self, key: Tensor, xs: Any):
        given = next((leaf for leaf in tree.leaves(xs) if isinstance(leaf, FakeTensor)), None)
        self._mode = given.fake_mode if given is not None else FakeTensorMode(allow_non_fake_inputs=True)
        self._refusal = _RefuseGlobalRandomness()
        # Fakes claim to be where the key is, so that they fit closed-over tensors on that device.
        self._device = torch.device("cpu") if key.is_meta else key.device

    def fake(self, values: Any) -> Any:
        """Tensors as fakes of their shape and dtype; everything else as it is."""

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
                return leaf
            with self._mode:
                return torch.empty(leaf.shape, dtype=leaf.dtype, device=self._device)

        return tree.map(one, values)

    def key(self) -> Tensor:
        with self._mode:
            return torch.empty(2, dtype=torch.int32, device=self._device)

    def __enter__(self) -> None:
        global _depth
        _depth += 1
        self._refusal.__enter__()

    def __exit__(self, *error: Any) -> None:
        global _depth
        self._refusal.__exit__(*error)
        _depth -= 1


class _RefuseGlobalRandomness(TorchDispatchMode):
    """Raises where an operator draws from torch's global generator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and not _draws_nothing(func, args, kwargs):
            raise TypeError(
                f"{func} draws from torch's global generator, which no key controls; "
                "use nn.Dropout, or a layer whose apply draws from `key` with fnn.random"
            )
        return func(*args, **kwargs)


def _draws_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Attention carries the random tag for the sake of its dropout; without dropout it draws nothing."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            return given == 0
    return False
