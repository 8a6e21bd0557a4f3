"""A module without its values, and the slots that values are put into for the time of one call."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import Buffer, UninitializedBuffer, UninitializedParameter

COUNT = "num_batches_tracked"


def check_convertible(module: Any) -> None:
    """Raise, naming the submodule, for a module that is no pure function of its parameters and buffers."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"from_module: expected a torch.nn.Module, got {type(module).__name__}")
    for path, part in module.named_modules():
        where = f"from_module: {'the module' if not path else f'submodule {path!r}'} ({type(part).__name__})"
        if hasattr(part, "_orig_mod"):
            raise TypeError(f"{where} is compiled; convert module._orig_mod, and compile the function that uses it")
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(f"{where} is TorchScript, whose parameters cannot be replaced; convert the Python module")
        if isinstance(part, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            raise TypeError(f"{where} spreads its module over devices; convert module.module")
        if type(part).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise TypeError(
                f"{where} is quantized and has no floating-point parameters; convert it before quantization"
            )
        if part._backward_hooks or part._backward_pre_hooks:
            raise TypeError(
                f"{where} has backward hooks, which function transforms do not call; remove them, "
                "and observe gradients with fnn.tap_grads"
            )
        tensors = {**part._parameters, **part._buffers}
        for name, value in tensors.items():
            if value is not None:
                _check_value(f"{where}: {name!r}", value)


def _check_value(where: str, value: Tensor) -> None:
    if isinstance(value, UninitializedParameter | UninitializedBuffer):
        raise ValueError(f"{where} has no shape yet; call the module once on an example of its input")
    if value.is_meta:
        raise ValueError(f"{where} is on the meta device and has no values; module.to_empty(device=...) and load them")
    if value.is_quantized or type(value) not in (Tensor, torch.nn.Parameter, Buffer):
        kind = "quantized" if value.is_quantized else type(value).__name__
        raise TypeError(f"{where} is {kind}, expected a plain tensor; dequantize or gather it first")
    if value._backward_hooks:
        raise TypeError(f"{where} has a hook on its gradient, which function transforms do not call; remove it")


def named_parts(module: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What becomes params and what becomes state, by first name."""
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    trained = {name: value for name, value in parameters.items() if value.is_floating_point() or value.is_complex()}
    constant = {id(value) for value in _constants(module)}
    rest = {name: value for name, value in parameters.items() if name not in trained}
    kept: dict[str, Tensor] = {name: value for name, value in module.named_buffers() if id(value) not in constant}
    return trained, rest | kept


def _constants(module: torch.nn.Module) -> list[Tensor]:
    """The buffers that are no state: not persistent, or a count of batches that nothing reads."""
    found = []
    for part in module.modules():
        for name, value in part._buffers.items():
            if value is not None and (name in part._non_persistent_buffers_set or _is_idle_count(part, name)):
                found.append(value)
    return found


def _is_idle_count(part: torch.nn.Module, name: str) -> bool:
    return name == COUNT and (isinstance(part, _InstanceNorm) or (_is_batch_norm(part) and part.momentum is not None))


def _is_batch_norm(part: torch.nn.Module) -> bool:
    """Whether this is torch's own batch norm, whose counting is ours to do."""
    return isinstance(part, _BatchNorm) and type(part).forward in (_BatchNorm.forward, SyncBatchNorm.forward)


def skeleton(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of `module` without parameters and buffers, and with `inplace` off."""
    tables = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    memo = {
        id(value): torch.empty(0, device="meta") for table in tables for value in table.values() if value is not None
    }
    try:
        frame = copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as error:
        raise TypeError(
            f"from_module: {type(module).__name__} cannot be copied: {error}. A module that keeps computed tensors "
            "as attributes cannot be; torch.nn.utils.parametrizations computes weights anew in each call"
        ) from error
    for part in frame.modules():
        for table in (part._parameters, part._buffers):
            for name in table:
                table[name] = None
        if getattr(part, "inplace", None) is True:
            vars(part)["inplace"] = False
        if _is_batch_norm(part) and part.momentum is None:
            vars(part)["momentum"] = 0.0  # not read: `Pure` counts
        if _is_batch_norm(part) and isinstance(part, SyncBatchNorm):
            part.__class__ = _LocalBatchNorm
    return frame


class _LocalBatchNorm(SyncBatchNorm):
    """Over the batch that it is given: what other processes have is no input of a pure function."""

    forward = _BatchNorm.forward  # type: ignore[assignment]


Attributes = tuple[tuple[torch.nn.Module, dict[str, Any]], ...]


def attributes_of(frame: torch.nn.Module) -> Attributes:
    """What the parts of a skeleton have now, for `restore`."""
    return tuple((part, dict(vars(part))) for part in frame.modules())


def restore(attributes: Attributes) -> None:
    """Take back what a call has set, such as a cache: the next one would read what another's parameters made."""
    for part, kept in attributes:
        own = vars(part)
        if len(own) != len(kept) or any(own.get(name) is not value for name, value in kept.items()):
            own.clear()
            own.update(kept)


def tensors_of(frame: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors that are plain attributes of the parts of a skeleton, by path."""
    return {
        f"{path}.{name}" if path else name: value
        for path, part in frame.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, Tensor)
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """A place for one value in a skeleton: `owner`'s parameter or buffer `name`, whose value has the name `path`.

    A constant brings its value along. A count of batches goes to the mode, which batch norm is computed by.
    """

    owner: torch.nn.Module
    name: str
    path: str
    buffer: bool
    constant: Tensor | None
    counts: bool

    def put(self, values: dict[str, Tensor], mode: Any) -> None:
        if self.constant is not None:
            values[self.path] = self.constant.clone()
        value = values[self.path]
        if self.counts:
            mode.counts[self.owner._buffers["running_mean"]] = value
        elif self.buffer:
            self.owner._buffers[self.name] = value
        else:
            self.owner._parameters[self.name] = value  # type: ignore[assignment]
            if isinstance(self.owner, torch.nn.RNNBase):
                self.owner._flat_weights[self.owner._flat_weights_names.index(self.name)] = value  # type: ignore[call-overload]

    def take(self, values: dict[str, Any], after: dict[str, Any], mode: Any) -> None:
        """Note in `after` what the call has made of a buffer's value."""
        if not self.buffer:
            return
        before = values[self.path]
        now = before if self.counts else self.owner._buffers[self.name]
        new = mode.written.get(now, now)
        if self.path in after:
            after[self.path] = new
        # A clone starts at version 0. The compiler does not show versions, and sees writes into a copy only.
        written = not torch.compiler.is_compiling() and not before.is_inference() and before._version > 0
        if self.constant is not None and (new is not before or written):
            raise ValueError(
                f"{mode.who}: the module changed its buffer {self.path!r}, which is constant because it is not "
                "persistent; register it with persistent=True, which makes it state"
            )

    def clear(self) -> None:
        if not self.counts:
            (self.owner._buffers if self.buffer else self.owner._parameters)[self.name] = None


def slots_of(frame: torch.nn.Module, module: torch.nn.Module) -> tuple[Slot, ...]:
    """The places of `frame`, a skeleton of `module`, that values belong in."""
    first = {id(value): name for name, value in [*module.named_parameters(), *module.named_buffers()]}
    constants = _constants(module)
    found = []
    for part, owner in zip(module.modules(), frame.modules(), strict=True):
        for table in (part._parameters, part._buffers):
            for name, value in table.items():
                if value is None or _is_idle_count(part, name):
                    continue
                constant = next((value.detach().clone() for other in constants if other is value), None)
                counts = name == COUNT and _is_batch_norm(part)
                found.append(Slot(owner, name, first[id(value)], table is part._buffers, constant, counts))
    return tuple(found)
