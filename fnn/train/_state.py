"""`TrainState`: everything that determines the rest of a run, as one pytree that owns its memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fnn import random, tree
from fnn._placement import local
from fnn.optim import GradientTransformation

FIELDS = ("params", "state", "opt_state", "key", "step")


class TrainState:
    """Params, layer state, optimizer state, key and step count of a run.

    Make one with `TrainState.create(params, optimizer, key, state=state)`. It is a pytree, so `vmap`, `tree.map` and
    `save_safetensors` take it. A donating step reuses its memory; afterwards it is empty, and using it raises. Change
    it with `replace`, not in place: two entries set to one tensor would share memory.

    `step` is the number of steps done (0-d int64). `key` never changes: step n draws from `fold_in(key, n)`, so a
    resumed run draws the same numbers.
    """

    __slots__ = ("_memory", "_parts")

    def __init__(self, params: Any, state: Any, opt_state: Any, key: Tensor, step: Tensor):
        self._parts = (params, state, opt_state, key, step)
        self._memory = Memory()

    @classmethod
    def create(cls, params: Any, optimizer: GradientTransformation, key: Tensor, *, state: Any = None) -> TrainState:
        """A state at step 0. Every leaf is copied, so what was passed in stays as it is.

        Raises `TypeError` naming the path of a leaf that is not a tensor, and for a key that is none; `ValueError`
        for two leaves that are one tensor, which copying would silently untie.
        """
        random.check_key(key)
        check_optimizer(optimizer)
        given = {"params": params, "state": {} if state is None else state}
        for path, leaf in tree.paths(given).items():
            if not isinstance(leaf, Tensor):
                raise TypeError(f"leaf {path!r} is {type(leaf).__name__}, expected a tensor")
        _check_untied(tree.paths(given))
        step = torch.zeros((), dtype=torch.int64, device=key.device)
        whole = cls(params, given["state"], optimizer.init(params), key, step)
        return tree.map(lambda leaf: leaf.detach().clone(), whole)

    @property
    def parts(self) -> tuple[Any, Any, Any, Tensor, Tensor]:
        """(params, state, opt_state, key, step); raises `RuntimeError` after donation."""
        if self._memory.donated:
            raise RuntimeError(
                "this TrainState was given to a donating step, which reused its memory; go on with the state that "
                "it returned, `train_state, metrics = step(train_state, batch)`, or make the step with donate=False"
            )
        return self._parts

    @property
    def params(self) -> Any:
        """What gradients are taken of."""
        return self.parts[0]

    @property
    def state(self) -> Any:
        """What the net updates without a gradient."""
        return self.parts[1]

    @property
    def opt_state(self) -> Any:
        """The optimizer's state, hyper-parameters included."""
        return self.parts[2]

    @property
    def key(self) -> Tensor:
        """The run's key; step n draws from `random.fold_in(key, n)`."""
        return self.parts[3]

    @property
    def step(self) -> Tensor:
        """The number of steps so far, a 0-d int64 tensor."""
        return self.parts[4]

    def replace(self, **changes: Any) -> TrainState:
        """A state with some fields replaced, for example `train_state.replace(opt_state=...)`.

        New leaves are copied. The others stay where they are, so a donating step on either state empties both.
        Raises `TypeError` for an unknown field and `ValueError` for two leaves that are one tensor.
        """
        if unknown := set(changes) - set(FIELDS):
            raise TypeError(f"TrainState has no field {sorted(unknown)[0]!r}; its fields are {list(FIELDS)}")
        whole = TrainState(**{**dict(zip(FIELDS, self.parts, strict=True)), **changes})
        if torch.compiler.is_compiling():
            return whole  # values of a graph, which has no memory to share
        _check_untied(tree.paths(whole))
        mine = {id(leaf) for leaf in tree.leaves(self)}
        new = tree.map(lambda leaf: leaf if id(leaf) in mine else leaf.detach().clone(), whole)
        new._memory = Memory(shared_with=self._memory)
        return new

    def copy(self) -> TrainState:
        """The same values in memory of their own: what to keep before a donating step."""
        return tree.map(torch.clone, self)

    def __repr__(self) -> str:
        return "TrainState(donated)" if self._memory.donated else f"TrainState({tree.size(self.params):,} parameters)"


def check_optimizer(optimizer: Any) -> None:
    """Raise unless `optimizer` has `init` and `update`, as those of `fnn.optim` have."""
    if not callable(getattr(optimizer, "init", None)) or not callable(getattr(optimizer, "update", None)):
        raise TypeError(
            f"optimizer is {type(optimizer).__module__}.{type(optimizer).__name__}; expected one of fnn.optim, "
            "such as optim.sgd(0.1)"
        )


class Memory:
    """What is known of the tensors of a state: given away or not, checked or not, and their shapes once asked for."""

    __slots__ = ("_alive", "owned", "shapes")

    def __init__(self, shared_with: Memory | None = None):
        # One cell for all states that share leaves: donation ends them together.
        self._alive = [True] if shared_with is None else shared_with._alive
        self.owned = shared_with is not None and shared_with.owned
        self.shapes: str | None = None

    @property
    def donated(self) -> bool:
        return not self._alive[0]

    def donate(self) -> None:
        self._alive[0] = False


def own_memory(train_state: TrainState) -> TrainState:
    """The state with every leaf in memory of its own, as in-place writing needs.

    A leaf that is a view of something larger, or an expanded one (what `vmap` returns for a constant), is copied. Two
    leaves that are one tensor raise `ValueError` naming both paths: copying would silently untie what was meant as one.
    """
    if train_state._memory.owned:
        return train_state
    _check_untied(tree.paths(train_state))
    seen: set[int] = set()

    def own(leaf: Tensor) -> Tensor:
        here = local(leaf)
        storage = here.untyped_storage()
        alone = storage.nbytes() == here.numel() * here.element_size() and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return leaf if alone or not here.numel() else leaf.clone()

    owned = tree.map(own, train_state)
    owned._memory.owned = True
    return owned


def _check_untied(leaves: dict[str, Tensor]) -> None:
    """Raise where two leaves start at the same address, naming both."""
    first: dict[object, str] = {}
    for path, leaf in leaves.items():
        leaf = local(leaf)
        # Inside a transform or a rehearsal a tensor has no address.
        wrapped = isinstance(leaf, FakeTensor) or torch.func.debug_unwrap(leaf) is not leaf
        address = id(leaf) if wrapped or leaf.is_meta else (str(leaf.device), leaf.data_ptr())
        if leaf.numel() and first.setdefault(address, path) != path:
            raise ValueError(
                f"leaves {first[address]!r} and {path!r} share memory, so a step would write into both. A weight used "
                "twice is one leaf (nn.Block: m.name.params); a copy needs .clone()"
            )


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
