"""The operators of a training step as a graph that TensorBoard draws, grouped by the layer that called them.

Operators are recorded while the step runs on fake tensors, so nothing is computed. Which layer an operator belongs to
is read off the Python calls that led to it: a pure function has no module hierarchy, but its calls nest the same way.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fnn import tree
from fnn.nn import Container, Layer
from fnn.train._finite import keep_finite
from fnn.train._state import TrainState
from fnn.train._step import Update, rehearse

_ROOMS = {"fnn.optim": "optimizer", "fnn.losses": "loss", "fnn.random": "random"}


def step_graph(update: Update, train_state: TrainState, batch: Any) -> bytes:
    """What `update(train_state, batch)` computes, as a serialized `GraphDef` (needs tensorboard).

    Inputs and outputs are named by their pytree paths: "train_state/params/fc1/weight", "metrics/loss". Operators are
    in the scope of their layer ("Sequential/fc1"), under "backward" if they are part of a gradient, in "optimizer",
    "loss", "random" or "keep_finite" if that is what called them, else in "step". Those without effect are left out.
    """
    recorder = _Recorder()

    def recorded(train_state: TrainState, batch: Any) -> None:
        recorder.inputs({"train_state": train_state, "batch": batch})
        with recorder:
            after, metrics = update(train_state, batch)
        recorder.outputs({"new_state": after, "metrics": metrics})

    rehearse(recorded, train_state, batch)
    return recorder.used().SerializeToString()


class _Recorder(TorchDispatchMode):
    """Notes every operator that runs, with the operators whose results it takes."""

    def __init__(self) -> None:
        from tensorboard.compat.proto.graph_pb2 import GraphDef  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.versions_pb2 import VersionDef  # pyright: ignore[reportAttributeAccessIssue]

        super().__init__()
        self.graph = GraphDef(versions=VersionDef(producer=22))
        self._names: dict[int, str] = {}
        self._kept: list[Tensor] = []  # as long as a tensor lives, no other one has its id
        self._counts: dict[str, int] = {}

    def inputs(self, values: dict[str, Any]) -> None:
        for path, leaf in tree.paths(values).items():
            self._add(path.replace(".", "/"), "Input", [], [leaf])

    def outputs(self, values: dict[str, Any]) -> None:
        for path, leaf in tree.paths(values).items():
            self._add(path.replace(".", "/"), "Output", [leaf], [leaf])

    def used(self) -> Any:
        """The graph without operators that no output depends on."""
        needed: set[str] = set()
        for node in reversed(self.graph.node):
            if node.op == "Output" or node.name in needed:
                needed.update((node.name, *node.input))
        unused = [n for n, node in enumerate(self.graph.node) if node.op != "Input" and node.name not in needed]
        for n in reversed(unused):
            del self.graph.node[n]
        return self.graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, results = ([x for x in tree.leaves(xs) if isinstance(x, Tensor)] for xs in ((args, kwargs), result))
        if results:
            _, _, operator = func.name().partition("::")
            self._add(f"{_scope()}/{operator.partition('.')[0]}", str(func), given, results)
        return result

    def _add(self, name: str, operator: str, given: list[Tensor], results: list[Tensor]) -> None:
        count = self._counts[name] = self._counts.get(name, 0) + 1
        name = name if count == 1 else f"{name}_{count}"
        node = self.graph.node.add(name=name, op=operator)
        # A tensor that nothing made is a constant.
        node.input.extend(dict.fromkeys(self._names[id(x)] for x in given if id(x) in self._names))
        for result in results:
            shape = node.attr["_output_shapes"].list.shape.add()
            for size in result.shape:
                shape.dim.add(size=size)
            self._names[id(result)] = name
        self._kept += results


def _scope() -> str:
    """The layer or part of the step that runs, from the outermost call to the innermost."""
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    part, layers, inner = "", [], None
    for frame in reversed(frames):
        module = frame.f_globals.get("__name__", "")
        if module == "torch.autograd" and frame.f_code.co_name == "grad":
            part, layers, inner = "backward", [], None
        owner = frame.f_locals.get("self")
        if isinstance(owner, Layer) and frame.f_code.co_name == "apply" and owner is not inner:
            layers.append(_name(owner, inner))
            inner = owner
        elif not layers and not part:
            part = next((room for package, room in _ROOMS.items() if module.startswith(package)), "")
            part = "keep_finite" if frame.f_code is keep_finite.__code__ else part
    return "/".join([part, *layers] if part else layers) or "step"


def _name(layer: Layer, outer: Layer | None) -> str:
    """What `outer` calls this child of it; a layer on its own goes by its class."""
    children = outer.children if isinstance(outer, Container) else ()
    return next((name for name, child in children if child is layer), type(layer).__name__)
