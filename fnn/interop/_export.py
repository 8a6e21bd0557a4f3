"""A layer at fixed parameters as a program: `export` by torch.export, `export_onnx` for other runtimes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from fnn import nn, ops, tree
from fnn._files import replace_file

Params = dict[str, Any]
State = dict[str, Any]

ONNX_LIMIT = 2**31 - 2**20  # of one file; a protobuf message has no more


def export(
    layer: nn.Layer,
    params: Params,
    *xs: Any,
    state: State | None = None,
    path: str | os.PathLike[str] | None = None,
    dynamic_batch: bool = False,
    **inputs: Any,
) -> torch.export.ExportedProgram:
    """The layer in evaluation at these parameters as a `torch.export` program: `program.module()(*xs)` runs it.

    xs, inputs: examples; the program takes inputs of their shapes and dtypes, or of any batch size, the first axis of
    every tensor among them, with `dynamic_batch`. params, state: copied into the program, under the names
    ``params.0.weight`` and ``state.0.running_mean`` of its `state_dict`.
    path: a file to write as well, ``model.pt2``, whole or not at all; `torch.export.load` reads it, and warns where
        it has another ending.
    The program consists of torch's operators, as under ``fnn.ops.use("torch")``, and runs without fnn.

    Raises ValueError for a path that ends in ``.onnx``, and for a `dynamic_batch` with inputs by keyword, or with
    examples of fewer than two rows, whose size torch.export takes for a constant; what torch.export raises for a layer
    that branches on values; OSError that names the file.

    Example:
        >>> from fnn import interop, nn, random
        >>> net = nn.Linear(2)
        >>> params, _ = net.init(random.key(0), torch.zeros(1, 3))
        >>> program = interop.export(net, params, torch.zeros(4, 3), dynamic_batch=True)
        >>> program.module()(torch.zeros(7, 3)).shape
        torch.Size([7, 2])

    Source: `torch.export.export`.
    """
    return _exported("export", layer, params, xs, inputs, state, path, dynamic_batch)


def export_onnx(
    layer: nn.Layer,
    params: Params,
    *xs: Any,
    path: str | os.PathLike[str],
    state: State | None = None,
    dynamic_batch: bool = False,
    **inputs: Any,
) -> None:
    """Write the layer in evaluation at these parameters into an ONNX file, whole or not at all.

    Arguments and errors are those of `export`. Raises ImportError that names what to install where torch's exporter
    lacks onnx or onnxscript, and ValueError for parameters that do not fit into one file of 2 GB.

    Source: `torch.onnx.export` with dynamo=True.
    """
    size = sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves((params, state or {})))
    if size > ONNX_LIMIT:
        raise ValueError(
            f"export_onnx: the parameters take {size / 2**30:.1f} GiB, and an ONNX file holds 2; use export"
        )
    program = _exported("export_onnx", layer, params, xs, inputs, state, None, dynamic_batch)
    try:
        written = torch.onnx.export(program, (), dynamo=True, verbose=False)
    except ImportError as error:
        raise ImportError(f"export_onnx needs onnx and onnxscript: pip install onnx onnxscript ({error})") from error
    assert written is not None
    replace_file("export_onnx", path, lambda file: file.write_bytes(written.model_proto.SerializeToString()))


def _exported(
    who: str,
    layer: nn.Layer,
    params: Params,
    xs: tuple[Any, ...],
    inputs: dict[str, Any],
    state: State | None,
    path: str | os.PathLike[str] | None,
    dynamic_batch: bool,
) -> torch.export.ExportedProgram:
    if path is not None and os.fspath(path).endswith(".onnx"):
        raise ValueError(
            f"{who}: {path} would hold a program of torch.export, not ONNX; end it in .pt2, or use export_onnx"
        )
    shapes = _any_batch(who, xs, inputs) if dynamic_batch else None
    module = _Evaluation(layer, params, {} if state is None else state).eval()
    with ops.use("torch"), torch.no_grad():
        program = torch.export.export(module, xs, inputs, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "triton_kernels":
            raise ValueError(
                f"{who}: the layer calls {node.target}, an operator that other runtimes lack; call fnn.ops instead, "
                'which fnn.ops.use("torch") governs'
            )
    if path is not None:
        replace_file(who, path, lambda file: _write(program, file), (OSError, RuntimeError))
    return program


def _write(program: torch.export.ExportedProgram, path: Any) -> None:
    with path.open("wb") as file:  # given the name, torch complains about its ending
        torch.export.save(program, file)


def _any_batch(who: str, xs: tuple[Any, ...], inputs: dict[str, Any]) -> dict[str, Any]:
    """The shapes of the inputs for torch.export: one free size, the first of every tensor."""
    batch = torch.export.Dim("batch")

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0:
            return None
        if x.shape[0] < 2:
            raise ValueError(
                f"{who}: dynamic_batch needs examples of two rows or more, got shape {tuple(x.shape)}; "
                "torch.export takes a size of 1 for a constant"
            )
        return {0: batch}

    if inputs:
        raise ValueError(
            f"{who}: torch.export frees no sizes of inputs by keyword, here {list(inputs)}; pass them by position"
        )
    return {"xs": tree.map(one, xs)}


class _Leaves(torch.nn.Module):
    """A tree of dicts as a module, for the sake of names."""

    def __init__(self, given: dict[str, Any]):
        super().__init__()
        for name, value in given.items():  # into the tables: a leaf may have the name of an attribute, such as "type"
            if isinstance(value, dict):
                self._modules[name] = _Leaves(value)
            elif value.is_floating_point() or value.is_complex():
                self._parameters[name] = torch.nn.Parameter(value.detach().clone(), requires_grad=False)
            else:
                self._buffers[name] = value.detach().clone()
        self.order = tuple(given)

    def tree(self) -> dict[str, Any]:
        tables = {**self._modules, **self._parameters, **self._buffers}
        return {name: part.tree() if isinstance(part := tables[name], _Leaves) else part for name in self.order}


class _Evaluation(torch.nn.Module):
    def __init__(self, layer: nn.Layer, params: Params, state: State):
        super().__init__()
        self.layer, self.params, self.state = layer, _Leaves(params), _Leaves(state)

    def forward(self, *xs: Any, **inputs: Any) -> Any:
        return self.layer.apply(self.params.tree(), self.state.tree(), *xs, **inputs)[0]
