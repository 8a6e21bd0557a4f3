"""Torch modules as fnn layers, and back: `from_module`, `to_module`."""

from __future__ import annotations

import copy
import dataclasses
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import nn, random, tree
from fnn.interop._names import nest
from fnn.interop._pure import Pure
from fnn.interop._skeleton import (
    Attributes,
    Slot,
    attributes_of,
    check_convertible,
    named_parts,
    restore,
    skeleton,
    slots_of,
    tensors_of,
)
from fnn.interop._unseen import unseen_draws
from fnn.nn._inference import _RefuseGlobalRandomness

Params = dict[str, Any]
State = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

_TURN = threading.RLock()  # values lie in the skeleton during a call, so one thread calls at a time


class Converted(NamedTuple):
    """What `from_module` returns."""

    net: ModuleLayer
    params: Params
    state: State


def from_module(module: torch.nn.Module) -> Converted:
    """A torch module as a layer, with its parameters and buffers as trees: `net, params, state = from_module(module)`.

    params: copies of the floating-point parameters under torch's names, split at the dots; a tied weight is one leaf,
    at the first of its names. `requires_grad` is not carried over: `optim.freeze` keeps leaves as they are.
    state: copies of the buffers that the module's `state_dict` has, of integer parameters too; those that training
    does not move come back as they went in. `num_batches_tracked` is among them only where it counts, which is for
    momentum None. Buffers with `persistent=False` are constants of the layer, and so are plain tensor attributes.
    net: the layer. Its `init` returns the values that the module had, on the key's device, whatever the key: torch
    modules draw theirs when they are made. `train=True` is `module.train()`, and random functions (dropout,
    stochastic depth, `torch.rand`, ...) draw from the key. Nothing writes into the inputs, parameters or state:
    the flag `inplace` of modules such as ReLU is off, and what a call sets as an attribute, such as a cache or a
    count, is taken back after it. Threads that call one at the same time take turns.

    The module itself is not touched, and later changes of it do not reach the layer. Batch, instance and layer norm
    are computed so that derivatives of every order and `vmap` over states are right; batch norm that would collect
    from several processes takes its own batch.

    Raises TypeError or ValueError that name the submodule for what cannot be a pure function of its parameters: lazy
    modules, modules on the meta device, compiled, scripted, quantized and wrapped ones, backward hooks; and, when it
    is applied, for a random function that no key can replace, for an embedding with `max_norm` in training, and for
    writing into a parameter or a tensor that is no buffer. Writes through ``.data`` are not seen. Within a function
    that you compile yourself, neither are the others, and attributes stay as they were set; `train.make_step` runs
    the module once before it compiles.

    Example:
        >>> from fnn import interop
        >>> net, params, state = interop.from_module(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout()))
        >>> {path: tuple(leaf.shape) for path, leaf in fnn.tree.paths(params).items()}
        {'0.weight': (3, 2), '0.bias': (3,)}
        >>> y, state = net.apply(params, state, torch.ones(1, 2), key=fnn.random.key(0), train=True)

    Source: `torch.func.functional_call`.
    """
    check_convertible(module)
    parameters, buffers = named_parts(module)
    frame = skeleton(module)
    evaluation, training = frame, copy.deepcopy(frame)
    evaluation.eval()
    training.train()
    values = ({n: _copy(v) for n, v in parameters.items()}, {n: _copy(v) for n, v in buffers.items()})
    net = ModuleLayer(
        type(module).__name__,
        _frame(training, module),
        _frame(evaluation, module),
        {name: value.detach().cpu().clone() for name, value in parameters.items()},
        {name: value.detach().cpu().clone() for name, value in buffers.items()},
        _shapes(parameters),
        _shapes(buffers),
        unseen_draws(module),
    )
    return Converted(net, nest(values[0]), nest(values[1]))


def to_module(module: torch.nn.Module, params: Params, state: State | None = None) -> torch.nn.Module:
    """A copy of `module` with the values of `params` and `state`: the inverse of `from_module`.

    module: that which was converted, or one of the same architecture; it keeps its own values, and the copy has its
    hooks, its mode and its `requires_grad`. The values are copied, in their dtype and on their device; tied weights
    stay tied. Without `state`, the copy has the module's own buffers.

    Raises ValueError that names the leaf where names or shapes differ.

    Example:
        >>> from fnn import interop
        >>> module = torch.nn.Linear(2, 1)
        >>> net, params, state = interop.from_module(module)
        >>> interop.to_module(module, fnn.tree.map(torch.zeros_like, params)).weight
        Parameter containing:
        tensor([[0., 0.]], requires_grad=True)
    """
    check_convertible(module)
    parameters, buffers = named_parts(module)
    who = type(module).__name__
    values = _leaves(who, "params", params, _shapes(parameters))
    if state is not None:
        values |= _leaves(who, "state", state, _shapes(buffers))
    clone = copy.deepcopy(module)
    targets = dict(clone.named_parameters()) | dict(clone.named_buffers())
    for name, value in values.items():
        targets[name].data = _copy(value)
    return clone


class _Frame(NamedTuple):
    """A module without values, and the places that they belong in."""

    module: torch.nn.Module
    slots: tuple[Slot, ...]
    attributes: Attributes
    tensors: dict[str, Tensor]


def _frame(frame: torch.nn.Module, module: torch.nn.Module) -> _Frame:
    return _Frame(frame, slots_of(frame, module), attributes_of(frame), tensors_of(frame))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ModuleLayer(nn.Layer):
    """The layer that `from_module` makes of a module."""

    name: str
    training: _Frame
    evaluation: _Frame
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    parameter_shapes: Shapes
    buffer_shapes: Shapes
    unseen: str

    def init(self, key: Tensor, *xs: Any, **inputs: Any) -> tuple[Params, State]:
        """The values that the module had, on the key's device."""
        random.check_key(key)
        copies = [
            {name: value.to(key.device, copy=True) for name, value in values.items()}
            for values in (self.parameters, self.buffers)
        ]
        return nest(copies[0]), nest(copies[1])

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, State]:
        """The module's output for inputs `xs`, and the state after it; see `from_module`."""
        if self.unseen and torch.compiler.is_compiling():
            raise TypeError(f"{self.name}: {self.unseen}")
        if len(self.buffer_shapes) > 0 and len(state) == 0:
            raise ValueError(
                f"{self.name} needs its state: net(params, x, state=state), or TrainState.create(..., state=state)"
            )
        leaves = _leaves(self.name, "params", params, self.parameter_shapes)
        before = _leaves(self.name, "state", state, self.buffer_shapes)
        if torch.compiler.is_compiling():
            return self._run(leaves, before, xs, inputs, key, train)
        with _TURN:
            drawn = _generator_states()
            result = self._run(leaves, before, xs, inputs, key, train)
            if any(not torch.equal(old, new) for old, new in zip(drawn, _generator_states(), strict=True)):
                # Another thread may have drawn, so the module is run again to see whether it does.
                with _RefuseGlobalRandomness():
                    self._run(leaves, before, xs, inputs, key, train)
        return result

    def _run(
        self,
        leaves: dict[str, Tensor],
        before: dict[str, Tensor],
        xs: tuple[Any, ...],
        inputs: dict[str, Any],
        key: Tensor | None,
        train: bool,
    ) -> tuple[Any, State]:
        """The call itself, with the parameters `leaves` and copies of the buffers `before` in the frame."""
        xs, inputs = _own((xs, inputs))
        frame = self.training if train else self.evaluation
        mode = Pure(self.name, frame.module, key, train)
        values = {**leaves, **{name: value.clone() for name, value in before.items()}}
        after = dict(before)
        constant = [("parameter", leaves), ("attribute", frame.tensors)]
        versions = [_versions(tensors) for _, tensors in constant]
        try:
            for slot in frame.slots:
                slot.put(values, mode)
            with mode:
                y = frame.module(*xs, **inputs)
            for slot in frame.slots:
                slot.take(values, after, mode)
        finally:
            for slot in frame.slots:
                slot.clear()
            if not torch.compiler.is_compiling():
                restore(frame.attributes)
        for (kind, tensors), old in zip(constant, versions, strict=True):
            for name, one, other in zip(tensors, old, _versions(tensors), strict=False):
                if one != other:
                    raise ValueError(
                        f"{self.name}: the module wrote into its {kind} {name!r}, which is an input or a constant of "
                        "the layer; let it write into a clone, or into a buffer, which is state"
                    )
        return y, nest({name: _same_kind(self.name, name, old, after[name]) for name, old in before.items()})

    def __call__(self, params: Params, *xs: Any, state: State | None = None, **inputs: Any) -> Any:
        """`apply` in evaluation mode, the new state dropped."""
        return self.apply(params, {} if state is None else state, *xs, **inputs)[0]

    def __repr__(self) -> str:
        return f"from_module({self.name})"


def _generator_states() -> list[Tensor]:
    """The states of torch's generators, where they can be compared: not in graphs, transforms and on fake tensors."""
    if (
        torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None  # type: ignore[attr-defined]
        or torch._C._len_torch_dispatch_stack() > 0  # type: ignore[attr-defined]
    ):
        return []
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def _versions(tensors: dict[str, Tensor]) -> list[int]:
    """How often each was written into, where torch tells: not in graphs, and not of tensors made for inference."""
    if torch.compiler.is_compiling():
        return []
    return [0 if value.is_inference() else value._version for value in tensors.values()]


def _copy(value: Tensor) -> Tensor:
    return value.detach().clone()


def _own(values: Any) -> Any:
    """Copies of the tensors among the inputs, for modules that write into them; one copy of one used twice."""
    given: list[Tensor] = []
    copies: list[Tensor] = []

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for index in range(len(given)):
            if given[index] is value:
                return copies[index]
        given.append(value)
        copies.append(value.clone())
        return copies[-1]

    return tree.map(one, values)


def _shapes(values: dict[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in values.items()}


def _leaves(who: str, of: str, given: Any, shapes: Shapes) -> dict[str, Tensor]:
    """The leaves of nested dicts by name, after a check that exactly those of `shapes` are there."""
    found: dict[str, Tensor] = {}
    _collect(who, of, given, "", found)
    for name in shapes:
        if name not in found:
            raise ValueError(f"{who}: {of} has no leaf {name!r}; pass those that from_module returned")
    for name, leaf in found.items():
        if name not in shapes:
            raise ValueError(f"{who}: {of} has an unexpected leaf {name!r}, which the module lacks")
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{who}: {of} leaf {name!r} must be a tensor, got {type(leaf).__name__}")
        if tuple(leaf.shape) != shapes[name]:
            raise ValueError(
                f"{who}: {of} leaf {name!r} has shape {tuple(leaf.shape)}, but the module's has {shapes[name]}"
            )
    return found


def _collect(who: str, of: str, node: Any, prefix: str, found: dict[str, Any]) -> None:
    if not isinstance(node, dict):
        raise TypeError(f"{who}: {of} must be nested dicts of tensors, got {type(node).__name__} at {prefix!r}")
    for key, value in node.items():
        if isinstance(value, dict):
            _collect(who, of, value, f"{prefix}{key}.", found)
        else:
            found[f"{prefix}{key}"] = value


def _same_kind(who: str, name: str, old: Tensor, new: Any) -> Tensor:
    if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
        got = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(
            f"{who}: the module changed its buffer {name!r} from {tuple(old.shape)} {old.dtype} to {got}; "
            "a state keeps its shapes and dtypes"
        )
    return new.detach()
