"""`summary`: the table of a network's layers, with output shapes, parameter counts and sizes."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, TextIO

import torch
from torch import Tensor

from fnn import tree
from fnn.nn import Container, Function, Layer
from fnn.nn._inference import Inference
from fnn.nn._wrapper import Wrapper

# What torch calls the layers that are functions here.
_TYPES = {
    "relu": "ReLU",
    "gelu": "GELU",
    "silu": "SiLU",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "leaky_relu": "LeakyReLU",
    "elu": "ELU",
    "selu": "SELU",
    "softplus": "Softplus",
    "softmax": "Softmax",
    "log_softmax": "LogSoftmax",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer without children: its path, type, expression, its output's shape and its number of parameters."""

    path: str
    type: str
    layer: str
    output_shape: tuple[int, ...]
    parameters: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summary` returns; `str()` is the table, `print()` shows it with paths and colours in a terminal.

    `state` counts the numbers in the state, running statistics for example; `flops` is None unless asked for. Sizes
    are in MB of 2^20 bytes.
    """

    rows: tuple[Row, ...]
    parameters: int
    trainable: int
    frozen: int
    state: int
    flops: int | None
    input_mb: float
    forward_backward_mb: float
    parameters_mb: float

    @property
    def total_mb(self) -> float:
        return self.input_mb + self.forward_backward_mb + self.parameters_mb

    def __str__(self) -> str:
        names = [f"{row.type}-{number}" for number, row in enumerate(self.rows, 1)]
        shapes = [str(list(row.output_shape)) for row in self.rows]
        width = max([52, *(len(name) + 1 + len(shape) for name, shape in zip(names, shapes, strict=True))])
        lines = ["-" * (width + 22), f"Layer (type){'Output Shape':>{width - 12}}{'Param #':>21}", "=" * (width + 22)]
        for name, shape, row in zip(names, shapes, self.rows, strict=True):
            lines.append(f"{name}{shape:>{width - len(name)}}{row.parameters:>21,}")
        lines.append("=" * (width + 22))
        lines += [f"{what}: {count:,}" for what, count in self._counts().items()]
        lines.append("-" * (width + 22))
        lines += [f"{what} (MB): {size:.6f}" for what, size in self._sizes().items()]
        return "\n".join([*lines, "-" * (width + 22)])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(header_style="bold", row_styles=["", "on grey7"], pad_edge=False)
        table.add_column("path", style="cyan")
        table.add_column("layer", overflow="fold")
        table.add_column("output shape", style="magenta")
        table.add_column("parameters", justify="right", style="green")
        for row in self.rows:
            table.add_row(row.path, row.layer, str(list(row.output_shape)), f"{row.parameters:,}")
        counts = ", ".join(f"{what.lower()} {count:,}" for what, count in self._counts().items())
        sizes = ", ".join(f"{what.lower()} {size:.2f}" for what, size in self._sizes().items())
        return Group(table, counts, f"MB: {sizes}")

    def print(self, file: TextIO | None = None) -> None:
        """Print to a terminal with paths, expressions and colours, to any other file as the plain table."""
        from rich.console import Console

        out: TextIO = file or sys.stdout
        console = Console(file=out)
        if console.is_terminal:
            console.print(self)
        else:
            out.write(f"{self}\n")

    def _counts(self) -> dict[str, int]:
        counts = {
            "Total params": self.parameters,
            "Trainable params": self.trainable,
            "Non-trainable params": self.frozen,
        }
        if self.state:
            counts["State values"] = self.state
        if self.flops is not None:
            counts["Forward FLOPs of one example"] = self.flops
        return counts

    def _sizes(self) -> dict[str, float]:
        return {
            "Input size": self.input_mb,
            "Forward/backward pass size": self.forward_backward_mb,
            "Params size": self.parameters_mb,
            "Estimated Total Size": self.total_mb,
        }


def summary(net: Layer, *xs: Tensor, frozen: tree.Where | None = None, flops: bool = False, **inputs: Any) -> Summary:
    """The layers that `net` runs for inputs like `xs` in training, in order; nothing is computed, shapes only.

    `xs` have a batch axis, shown as -1; `inputs` are named inputs. `frozen` chooses the leaves that are not trained, as
    in `tree.mask` (``"0.*"``). Sizes are those of one example, in numbers of the parameters' dtype; forward/backward
    counts every layer's output twice, for its value and its gradient. `flops` asks torch's counter for the operations
    of one example's forward pass in evaluation: two for each multiplication and addition of products and convolutions.

    Example:
        >>> from fnn import nn
        >>> print(summary(nn.Sequential(nn.Linear(16), nn.relu), torch.zeros(1, 8)))
        --------------------------------------------------------------------------
        Layer (type)                            Output Shape              Param #
        ==========================================================================
        Linear-1                                    [-1, 16]                  144
        ReLU-2                                      [-1, 16]                    0
        ==========================================================================
        Total params: 144
        Trainable params: 144
        Non-trainable params: 0
        --------------------------------------------------------------------------
        Input size (MB): 0.000031
        Forward/backward pass size (MB): 0.000244
        Params size (MB): 0.000549
        Estimated Total Size (MB): 0.000824
        --------------------------------------------------------------------------
    """
    if not xs:
        raise ValueError("summary needs an example of every input: fnn.summary(net, x)")
    meta_key = torch.empty(2, dtype=torch.int32, device="meta")
    inference = Inference(meta_key, (xs, inputs))
    xs, inputs = inference.fake((xs, inputs))
    params, state = net.init(meta_key, *xs, **inputs)
    rows: list[tuple[Row, list[Tensor]]] = []
    fake_params, fake_state = inference.fake((params, state))
    with inference:
        _recording(net, "", rows).apply(fake_params, fake_state, *xs, key=inference.key(), train=True, **inputs)
        operations = _flops(net, fake_params, fake_state, xs, inputs) if flops else None

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
        state=tree.size(state),
        flops=operations,
        input_mb=sum(_example_size(x) for x in tree.leaves((xs, inputs)) if isinstance(x, Tensor)) * megabyte,
        forward_backward_mb=2 * outputs * megabyte,
        parameters_mb=total * megabyte,
    )


def _flops(net: Layer, params: Any, state: Any, xs: Any, inputs: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    import triton_kernels.flops  # noqa: F401  counts our own operators too

    with FlopCounterMode(display=False) as counter:
        net.apply(params, state, *xs, **inputs)
    examples = next((len(x) for x in tree.leaves(xs) if isinstance(x, Tensor) and x.dim()), 1)
    return counter.get_total_flops() // max(1, examples)


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

    @property
    def carries(self) -> bool:  # type: ignore[override]
        return self.inner.carries

    def apply(
        self, params: Any, state: Any, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, Any]:
        y, state = self.inner.apply(params, state, *xs, key=key, train=train, **inputs)
        ys = tree.leaves(y)
        seen = any(row.path == self.path for row, _ in self.rows)
        shape = (-1, *ys[0].shape[1:]) if ys else ()
        count = 0 if seen else tree.size(params)
        expression = " ".join(repr(self.inner).split())
        self.rows.append((Row(self.path, _type(self.inner), expression, shape, count), ys))
        return y, state

    def __repr__(self) -> str:
        return repr(self.inner)


def _recording(layer: Layer, path: str, rows: list[tuple[Row, list[Tensor]]]) -> Layer:
    """The same network with every layer that has no children noting its output."""
    if isinstance(layer, Wrapper):
        return layer.around(_recording(layer.inner, path, rows))
    if not isinstance(layer, Container):
        return _Recording(layer, path, rows)
    prefix = f"{path}." if path else ""
    return layer.with_children(
        tuple((name, _recording(child, f"{prefix}{name}", rows)) for name, child in layer.children)
    )


def _type(layer: Layer) -> str:
    """The name of a layer's class, as torch has it; of a function, its name."""
    if not isinstance(layer, Function):
        return type(layer).__name__
    name = repr(layer).partition("(")[0]
    return _TYPES.get(name, name)
