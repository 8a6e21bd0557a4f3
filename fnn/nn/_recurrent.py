"""What the recurrent layers share: parameters, layers above each other, directions, the carry, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Any, ClassVar

import torch
from torch import Tensor

from fnn import ops, random
from fnn.nn._dropout import Dropout
from fnn.nn._layer import Layer, Params, Shapes, State, check_bias, expect, layer, parameter_dtype
from fnn.nn.initializers import uniform_bound

Carry = tuple[Tensor, ...]


@layer
class Recurrent(Layer):
    """A layer that reads a sequence step by step, as unrolled pure operations; `step` says what one step does.

    torch's own kernels (`aten::lstm`) fail in compiled derivatives, and its `scan` under `torch.func.grad`.
    """

    hidden_size: int
    _: KW_ONLY
    num_layers: int = 1
    bias: bool = True
    dropout: float = 0.0
    bidirectional: bool = False

    carries: ClassVar[bool] = True
    gates: ClassVar[int]
    """Blocks of `hidden_size` rows in the weights."""
    carried: ClassVar[int] = 1
    """Tensors in the carry; the first is the output."""
    adds_biases: ClassVar[bool] = True
    """Whether the two biases only ever meet in a sum, which is then taken once, not in each step."""

    def __post_init__(self) -> None:
        who = type(self).__name__
        check_bias(self, self.bias, "features")
        Dropout(self.dropout)  # its check of the probability
        if self.num_layers < 1 or self.hidden_size < 1:
            raise ValueError(
                f"{who}: hidden_size and num_layers must be at least 1, got {self.hidden_size} and {self.num_layers}"
            )
        if self.dropout and self.num_layers == 1:
            raise ValueError(f"{who}: dropout is between layers, and num_layers=1 has no such place; add nn.Dropout")

    @property
    def uses_key(self) -> bool:  # type: ignore[override]
        return self.dropout > 0

    def step(self, inputs: Tensor, carry: Carry, weight: Tensor, bias: Tensor | None) -> Carry:
        """The carry after one step. inputs: (..., gates * hidden_size), their product with the weights already taken.

        bias: that of the hidden product, None where it is in the inputs. The product is torch's own: it is small, and
        Inductor makes one call of it and the sum with the inputs, which it does not of `ops.linear`.
        """
        raise NotImplementedError

    def init(  # type: ignore[override]
        self, key: Tensor, x: Tensor, carry: Any = None, *, lengths: Tensor | None = None
    ) -> tuple[Params, State]:
        shapes = self._shapes(x)
        start = uniform_bound(self.hidden_size**-0.5)
        keys = random.split(key, len(shapes)).unbind()
        dtype = parameter_dtype(x)
        return {name: start(own, shape, dtype) for own, (name, shape) in zip(keys, shapes.items(), strict=True)}, {}

    def apply(  # type: ignore[override]
        self,
        params: Params,
        state: State,
        x: Tensor,
        carry: Any = None,
        *,
        key: Tensor | None = None,
        train: bool = False,
        lengths: Tensor | None = None,
    ) -> tuple[tuple[Tensor, Any], State]:
        expect(self, params, self._shapes(x))
        inside = None if lengths is None else self._inside(lengths, x)
        starts = self._starts(carry, x, params["weight_hh_l0"].dtype)
        ends: list[Carry] = []
        for depth in range(self.num_layers):
            ys = []
            for suffix in self._suffixes(depth):
                leaves = [params[f"{name}{suffix}"] for name in self._names()]
                y, end = self._read(x, leaves, starts[len(ends)], inside, reverse=suffix.endswith("reverse"))
                ys.append(y)
                ends.append(end)
            x = torch.cat(ys, -1) if len(ys) > 1 else ys[0]
            if self.dropout and train and depth + 1 < self.num_layers:
                own = None if key is None else random.fold_in(key, depth)
                x, _ = Dropout(self.dropout).apply({}, {}, x, key=own, train=True)
        if inside is not None:
            x = torch.where(inside[..., None], x, 0.0)
        carry = tuple([torch.stack(parts) for parts in zip(*ends, strict=True)])
        return (x, carry if self.carried > 1 else carry[0]), state

    def _read(
        self, x: Tensor, leaves: Sequence[Tensor], carry: Carry, inside: Tensor | None, *, reverse: bool
    ) -> tuple[Tensor, Carry]:
        """One layer in one direction: its outputs (..., T, hidden_size) and its last carry."""
        weight_ih, weight_hh, *biases = leaves
        bias_ih, bias_hh = biases if biases else (None, None)
        if biases and self.adds_biases:
            bias_ih, bias_hh = biases[0] + biases[1], None
        steps = ops.linear(x, weight_ih, bias_ih).unbind(-2)
        ys: list[Tensor] = []
        for t in reversed(range(len(steps))) if reverse else range(len(steps)):
            new = self.step(steps[t], carry, weight_hh, bias_hh)
            if inside is not None:
                here = inside[..., t, None]
                new = tuple([torch.where(here, after, before) for after, before in zip(new, carry, strict=True)])
            carry = new
            ys.append(carry[0])
        return torch.stack(ys[::-1] if reverse else ys, -2), carry

    def _starts(self, carry: Any, x: Tensor, dtype: torch.dtype) -> list[Carry]:
        """For each layer and direction the carry to begin with, zeros where none is given."""
        directions = 2 if self.bidirectional else 1
        shape = (self.num_layers * directions, *x.shape[:-2], self.hidden_size)
        if carry is None:
            zeros = torch.zeros(shape[1:], dtype=dtype, device=x.device)
            return [(zeros,) * self.carried] * shape[0]
        parts = carry if self.carried > 1 else (carry,)
        fits = isinstance(parts, (tuple, list)) and len(parts) == self.carried
        if not fits or not all([isinstance(part, Tensor) and tuple(part.shape) == shape for part in parts]):
            expected = f"{shape} (layers * directions, ..., hidden_size)"
            expected = f"a tensor of shape {expected}" if self.carried == 1 else f"a pair of tensors, each {expected}"
            shapes = [tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in parts] if fits else None
            raise ValueError(
                f"{type(self).__name__}: carry must be {expected}, got {shapes or type(carry).__name__}; "
                "None starts from zeros"
            )
        if any([part.dtype != dtype for part in parts]):
            raise TypeError(
                f"{type(self).__name__}: carry must have the dtype of the params, {dtype}, "
                f"got {[part.dtype for part in parts]}"
            )
        return list(zip(*[part.unbind(0) for part in parts], strict=True))

    def _inside(self, lengths: Tensor, x: Tensor) -> Tensor:
        """(..., T), True at the steps of each sequence that are there."""
        integer = isinstance(lengths, Tensor) and not lengths.is_floating_point() and lengths.dtype != torch.bool
        if not integer or lengths.shape != x.shape[:-2]:
            got = (
                f"{lengths.dtype} of shape {tuple(lengths.shape)}"
                if isinstance(lengths, Tensor)
                else type(lengths).__name__
            )
            raise ValueError(
                f"{type(self).__name__}: lengths must be an integer tensor of shape {tuple(x.shape[:-2])}, one for "
                f"each sequence, got {got}"
            )
        return torch.arange(x.shape[-2], device=x.device) < lengths[..., None]

    def _names(self) -> tuple[str, ...]:
        return ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]

    def _suffixes(self, depth: int) -> tuple[str, ...]:
        return (f"_l{depth}", f"_l{depth}_reverse")[: 2 if self.bidirectional else 1]

    def _shapes(self, x: Tensor) -> Shapes:
        if x.dim() < 2 or x.shape[-2] < 1:
            raise ValueError(
                f"{type(self).__name__}: expected an input of shape (..., T, features), T at least 1, "
                f"got {tuple(x.shape)}"
            )
        rows, features, shapes = self.gates * self.hidden_size, x.shape[-1], {}
        for depth in range(self.num_layers):
            for suffix in self._suffixes(depth):
                own = [(rows, features), (rows, self.hidden_size), (rows,), (rows,)]
                shapes |= {f"{name}{suffix}": shape for name, shape in zip(self._names(), own, strict=False)}
            features = self.hidden_size * (2 if self.bidirectional else 1)
        return shapes
