"""`TrainState`: everything that determines the rest of a run, as one pytree that owns its memory."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fnn import random, tree
from fnn.optim import GradientTransformation

FIELDS = ("params", "state", "opt_state", "key", "step")


class TrainState:
    """Params, layer state, optimizer state, key and step count of a run.

    Make one with `TrainState.create(params, optimizer, key, state=state)`. It is a pytree, so `vmap`, `tree.map` and
    `save_safetensors` take it. A donating step reuses its memory; afterwards it is empty, and using it raises.

    `step` is the number of steps done (0-d int64). `key` never changes: step n draws from `fold_in(key, n)`, so a
    resumed run draws the same numbers.
    """

    __slots__ = ("__weakref__", "_parts")

    def __init__(self, params: Any, state: Any, opt_state: Any, key: Tensor, step: Tensor):
        self._parts: tuple[Any, Any, Any, Tensor, Tensor] | None = (params, state, opt_state, key, step)

    @classmethod
    def create(cls, params: Any, optimizer: GradientTransformation, key: Tensor, *, state: Any = None) -> TrainState:
        """A state at step 0. Every leaf is copied, so what was passed in stays as it is.

        Raises `TypeError` naming the path of a leaf that is not a tensor, and for a key that is none.
        """
        random.check_key(key)
        for name, part in (("params", params), ("state", state)):
            for path, leaf in tree.paths(part if part is not None else {}).items():
                if not isinstance(leaf, Tensor):
                    raise TypeError(f"{name}: leaf {path!r} is {type(leaf).__name__}, expected a tensor")
        step = torch.zeros((), dtype=torch.int64, device=key.device)
        given = cls(params, {} if state is None else state, optimizer.init(params), key, step)
        return tree.map(lambda leaf: leaf.detach().clone(), given)

    @property
    def parts(self) -> tuple[Any, Any, Any, Tensor, Tensor]:
        """(params, state, opt_state, key, step); raises `RuntimeError` after donation."""
        if self._parts is None:
            raise RuntimeError(
                "this TrainState was given to a donating step, which reused its memory; go on with the state that "
                "it returned, `train_state, metrics = step(train_state, batch)`, or make the step with donate=False"
            )
        return self._parts

    @property
    def params(self) -> Any:
        return self.parts[0]

    @property
    def state(self) -> Any:
        return self.parts[1]

    @property
    def opt_state(self) -> Any:
        return self.parts[2]

    @property
    def key(self) -> Tensor:
        return self.parts[3]

    @property
    def step(self) -> Tensor:
        return self.parts[4]

    def replace(self, **changes: Any) -> TrainState:
        """A state with some fields replaced, for example `train_state.replace(opt_state=...)`."""
        if unknown := set(changes) - set(FIELDS):
            raise TypeError(f"TrainState has no field {sorted(unknown)[0]!r}; its fields are {list(FIELDS)}")
        return TrainState(**{**dict(zip(FIELDS, self.parts, strict=True)), **changes})

    def copy(self) -> TrainState:
        """The same values in memory of their own: what to keep before a donating step."""
        return tree.map(torch.clone, self)

    def __repr__(self) -> str:
        if self._parts is None:
            return "TrainState(donated)"
        if not isinstance(self.step, Tensor) or self.step.dim():
            return "TrainState(...)"
        return f"TrainState({tree.size(self.params):,} parameters)"


def donated(train_state: TrainState) -> None:
    """Empty a state whose memory a step has reused."""
    train_state._parts = None


def own_memory(train_state: TrainState) -> TrainState:
    """The state with every leaf in memory of its own, as in-place writing needs.

    An expanded leaf (what `vmap` returns for a constant) is copied. Two leaves that share memory raise `ValueError`
    naming both paths: copying would silently untie what was meant as one.
    """
    train_state = tree.map(lambda leaf: leaf.clone() if _overlaps_itself(leaf) else leaf, train_state)
    spans = sorted((*_span(leaf), path) for path, leaf in tree.paths(train_state).items() if leaf.numel())
    for (device, _, end, first), (other, start, _, second) in itertools.pairwise(spans):
        if device == other and start < end:
            raise ValueError(
                f"TrainState: leaves {first!r} and {second!r} share memory, and a donating step writes into both. "
                "A weight used twice is one leaf (nn.Block: m.name.params); a copy needs .clone()"
            )
    return train_state


def _overlaps_itself(leaf: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(leaf.shape, leaf.stride(), strict=True))


def _span(leaf: Tensor) -> tuple[str, int, int]:
    """Device, first byte, and one past the last byte that a tensor touches."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
    return str(leaf.device), leaf.data_ptr(), leaf.data_ptr() + elements * leaf.element_size()


def _flatten(train_state: TrainState) -> tuple[list[Any], None]:
    return list(train_state.parts), None


def _flatten_with_keys(train_state: TrainState) -> tuple[list[tuple[Any, Any]], None]:
    return [(tree.GetAttrKey(name), part) for name, part in zip(FIELDS, train_state.parts, strict=True)], None


def _unflatten(parts: Any, _: None) -> TrainState:
    return TrainState(*parts)


tree.register_node(
    TrainState,
    _flatten,
    _unflatten,
    serialized_type_name="fnn.train.TrainState",
    flatten_with_keys_fn=_flatten_with_keys,
)
