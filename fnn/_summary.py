"""`summary`: the table of a network's layers, with output shapes, parameter counts and sizes."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import torch
from torch import Tensor

from fnn import tree
from fnn.nn import Container, Layer
from fnn.nn._inference import Inference


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer without children: its path, its expression, its output's shape and its number of parameters."""

    path: str
    layer: str
    output_shape: tuple[int, ...]
    parameters: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summary` returns; `str()` is the table. Sizes are in MB of 2^20 bytes."""

    rows: tuple[Row, ...]
    parameters: int
    trainable: int
    frozen: int
    input_mb: float
    forward_backward_mb: float
    parameters_mb: float

    @property
    def total_mb(self) -> float:
        return self.input_mb + self.forward_backward_mb + self.parameters_mb

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="")
        table.add_column("path")
        table.add_column("layer", overflow="fold")
        table.add_column("output shape")
        table.add_column("parameters", justify="right")
        for row in self.rows:
            table.add_row(row.path, row.layer, str(list(row.output_shape)), f"{row.parameters:,}")
        buffer = io.StringIO()
        console = Console(file=buffer, width=100, color_system=None, highlight=False, markup=False)
        console.print(table)
        console.print(f"\nparameters: {self.parameters:,} (trainable {self.trainable:,}, frozen {self.frozen:,})")
        console.print(
            f"MB: input {self.input_mb:.6f}, forward/backward {self.forward_backward_mb:.6f}, "
            f"parameters {self.parameters_mb:.6f}, total {self.total_mb:.6f}"
        )
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def summary(net: Layer, *xs: Tensor, frozen: tree.Where | None = None) -> Summary:
    """The layers that `net` runs for inputs like `xs` in training, in order; nothing is computed, shapes only.

    `xs` have a batch axis, shown as -1. `frozen` chooses the leaves that are not trained, as in `tree.mask`
    (``"0.*"``). Sizes are those of one example, in numbers of the parameters' dtype; forward/backward counts every
    layer's output twice, for its value and its gradient.

    Example:
        >>> from fnn import nn
        >>> print(summary(nn.Sequential(nn.Linear(16), nn.relu), torch.zeros(1, 8)))
        path  layer       output shape  parameters
        0     Linear(16)  [-1, 16]             144
        1     relu        [-1, 16]               0
        <BLANKLINE>
        parameters: 144 (trainable 144, frozen 0)
        MB: input 0.000031, forward/backward 0.000244, parameters 0.000549, total 0.000824
    """
    if not xs:
        raise ValueError("summary needs an example of every input: fnn.summary(net, x)")
    meta_key = torch.empty(2, dtype=torch.int32, device="meta")
    inference = Inference(meta_key, xs)
    xs = inference.fake(xs)
    params, state = net.init(meta_key, *xs)
    rows: list[tuple[Row, list[Tensor]]] = []
    with inference:
        recording = _recording(net, "", rows)
        recording.apply(*inference.fake((params, state)), *xs, key=inference.key(), train=True)

    leaves = tree.leaves(params)
    chosen = tree.leaves(tree.mask(params, frozen)) if frozen is not None else [False] * len(leaves)
    frozen_count = sum(leaf.numel() for leaf, c in zip(leaves, chosen, strict=True) if c)
    total = tree.size(params)
    megabyte = (leaves[0].element_size() if leaves else 4) / 2**20
    outputs = sum(_example_size(y) for _, ys in rows for y in ys)
    return Summary(
        rows=tuple(row for row, _ in rows),
        parameters=total,
        trainable=total - frozen_count,
        frozen=frozen_count,
        input_mb=sum(_example_size(x) for x in tree.leaves(xs)) * megabyte,
        forward_backward_mb=2 * outputs * megabyte,
        parameters_mb=total * megabyte,
    )


def _example_size(x: Tensor) -> int:
    return x[0].numel() if x.dim() and x.shape[0] else x.numel()


@dataclasses.dataclass(frozen=True, eq=False)
class _Recording(Layer):
    """A layer that notes what it gives."""

    inner: Layer
    path: str
    rows: list[tuple[Row, list[Tensor]]]

    @property
    def uses_key(self) -> bool:  # type: ignore[override]
        return self.inner.uses_key

    def apply(
        self, params: Any, state: Any, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, Any]:
        y, state = self.inner.apply(params, state, *xs, key=key, train=train, **inputs)
        ys = tree.leaves(y)
        seen = any(row.path == self.path for row, _ in self.rows)
        shape = (-1, *ys[0].shape[1:]) if ys else ()
        count = 0 if seen else tree.size(params)
        layer = " ".join(repr(self.inner).split())
        self.rows.append((Row(self.path, layer, shape, count), ys))
        return y, state

    def __repr__(self) -> str:
        return repr(self.inner)


def _recording(layer: Layer, path: str, rows: list[tuple[Row, list[Tensor]]]) -> Layer:
    """The same network with every layer that has no children noting its output."""
    if not isinstance(layer, Container):
        return _Recording(layer, path, rows)
    prefix = f"{path}." if path else ""
    return layer.with_children(
        tuple((name, _recording(child, f"{prefix}{name}", rows)) for name, child in layer.children)
    )
