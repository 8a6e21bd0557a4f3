"""One training step: gradients, optimizer and new state in one compiled graph.

`pure_step` is the step as a function. `make_step` compiles it whole (`fullgraph=True`) and, with `donate=True`, writes
the new state into the old one's memory inside the graph, so that a step needs one copy of the state and not two.

What the compiler sees is fixed before the first step: one code object for each `make_step` (Dynamo allows eight
recompiles for each code object, which a sweep over networks would use up), gradients off, no Python numbers.
Before a state or a batch of new shapes is compiled, the step is rehearsed on fake tensors, so that a mistake is
reported by the line that made it and not by the compiler.
"""

from __future__ import annotations

import contextlib
import os
import time
import types
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fnn import _ranks, ops, random, tree
from fnn._placement import mesh_of
from fnn.optim import GradientTransformation, apply_updates
from fnn.train._alike import Alike
from fnn.train._compile_cache import leave_damaged_cache, look_up_early
from fnn.train._explicit import Processes
from fnn.train._finite import check_same, keep_finite
from fnn.train._layout import around, layout_of, settle
from fnn.train._state import TrainState, check_optimizer, own_memory
from fnn.train._strict import RecompileError, changed, described, graphs_compiled, guard_reason, one_graph, refusal
from triton_kernels._inductor import keep_writes_after_reads

Metrics = dict[str, Tensor]
LossFunction = Callable[[Any, Any, Any, Tensor], tuple[Tensor, tuple[Any, Metrics]]]
Update = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def pure_step(
    loss_fn: LossFunction, optimizer: GradientTransformation, *, mesh: Any = None, sync_batch_norm: bool = False
) -> Update:
    """The step as a pure function `(train_state, batch) -> (train_state, metrics)`, not compiled, nothing donated.

    `loss_fn(params, state, batch, key) -> (loss, (state, metrics))`, with a 0-d loss. Metrics are 0-d tensors; the
    loss is added as "loss".

    Numbers that are not finite never reach the state. A step whose loss is not finite changes nothing but the step
    count; where the loss is finite, an element that would become infinite or NaN keeps its value (each element is
    judged alone, so that no two gradients have to be in memory together). Both report the loss as NaN.
    `update.unguarded(train_state, batch) -> (grads, train_state, loss, metrics)` is the step without this guard.

    `vmap` it over seeds or learning rates, then give it to `make_step(update=...)`. `mesh` and `sync_batch_norm` are
    those of `make_step`.
    """
    if mesh is None and sync_batch_norm:
        raise ValueError("sync_batch_norm needs mesh=; over parted parameters statistics are those of the whole batch")
    processes = None if mesh is None else Processes("make_step", mesh, sync_batch_norm=sync_batch_norm)

    def unguarded(train_state: TrainState, batch: Any) -> tuple[Any, TrainState, Tensor, Metrics]:
        if torch.compiler.is_compiling():
            return inside(train_state, batch)
        with update.around(train_state.params):
            return inside(train_state, batch)

    def inside(train_state: TrainState, batch: Any) -> tuple[Any, TrainState, Tensor, Metrics]:
        params, state, opt_state, key, step = train_state.parts
        layout = processes or layout_of(params)
        differentiated, batch, step_key = layout.inside(params, batch, random.fold_in(key, step))

        def loss(differentiated: Any) -> tuple[Tensor, tuple[Any, Metrics]]:
            return _loss_and_aux(loss_fn(layout.for_loss(differentiated, params), state, batch, step_key))

        def value_fn(at: Any) -> Tensor:
            with layout.losses():
                return layout.mean(loss(layout.once_more(at, params))[0])

        with layout.losses():  # around the gradient too, which computes again what was rematerialized
            grads, (value, (new_state, metrics)) = torch.func.grad_and_value(loss, has_aux=True)(differentiated)
        grads, new_state, value, metrics = layout.whole(grads, params, state, new_state, value, metrics)
        parted = mesh_of(params) is not None
        with ops.use("torch") if parted else contextlib.nullcontext():
            extra = {"value": value, "grad": grads, "value_fn": value_fn}
            updates, opt_state = optimizer.update(grads, opt_state, params, **extra)
            after = TrainState(apply_updates(params, updates), new_state, opt_state, key, step + 1)
        return grads, settle(after, train_state) if parted else after, value, metrics

    def update(train_state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        _, after, loss, metrics = unguarded(train_state, batch)
        return keep_finite(train_state, after, loss, metrics)

    update.unguarded, update.mesh = unguarded, mesh
    update.around = lambda params: around(params, processes or layout_of(params))
    return update


def make_step(
    loss_fn: LossFunction | None = None,
    optimizer: GradientTransformation | None = None,
    *,
    update: Update | None = None,
    compile: bool = True,
    donate: bool = True,
    strict: bool = False,
    mesh: Any = None,
    sync_batch_norm: bool = False,
) -> Step:
    """A training step `train_state, metrics = step(train_state, batch)`, the whole of it one compiled graph.

    Give `loss_fn` and `optimizer` (see `pure_step`), or a pure `update` of your own. `donate=True` reuses the memory
    of the state passed in; that state is empty afterwards. A leaf that was taken out of it before (`w =
    train_state.params["weight"]`) shares that memory and changes: clone what you keep.

    One graph serves a whole run. Where an input changes what the graph was compiled for (a shape, a dtype, a memory
    layout, autocast, the number of threads, a value the loss function closes over), another is compiled and a warning
    names the change; with `strict=True` it is a `RecompileError` instead. `step.graphs` counts them.

    Several processes, two ways. With `mesh` (see `fnn.distributed.init`) the loss function is the program of one of
    them, over its part of the batch (`data.Loader(shard=mesh)`); the step averages gradients, loss, metrics and the
    floating leaves of the layer state over the mesh's data axis, in one all-reduce inside the graph. The loss must be
    a mean over examples, and the parts of one size. What it draws differs between processes. `sync_batch_norm` makes
    the statistics of `nn.BatchNorm` those of the whole batch. Parameters may be parted, see `fnn.distributed.fsdp`.
    Without `mesh`, parameters that are parted (`fnn.distributed.shard`) decide where the step runs: it is the same
    program over the whole batch, of which each process gives its part.

    Errors: a batch without examples, a leaf or shape that the network does not expect (named by layer and path), a
    loss that is no scalar, leaves of the state that share memory; processes whose parts of a batch differ in size, or
    whose states differ at the first step. Where no C++ compiler works, a warning says how to get one and the step runs
    eagerly.

    Example:
        >>> from fnn import losses, nn, optim, random, train
        >>> net, optimizer = nn.Linear(1), optim.sgd(0.1)
        >>> params, _ = net.init(random.key(0), torch.zeros(1, 3))
        >>> def loss_fn(params, state, batch, key):
        ...     x, y = batch
        ...     return losses.mse(net(params, x), y), (state, {})
        >>> step = train.make_step(loss_fn, optimizer, compile=False)
        >>> train_state = train.TrainState.create(params, optimizer, random.key(1))
        >>> train_state, metrics = step(train_state, (torch.ones(8, 3), torch.ones(8, 1)))
        >>> int(train_state.step)
        1
    """
    if update is None:
        if loss_fn is None or optimizer is None:
            raise TypeError("make_step needs loss_fn and optimizer, or update=")
        check_optimizer(optimizer)
        update = pure_step(loss_fn, optimizer, mesh=mesh, sync_batch_norm=sync_batch_norm)
    elif loss_fn is not None or optimizer is not None or mesh is not None or sync_batch_norm:
        raise TypeError(
            "make_step takes either loss_fn and optimizer, with mesh= and sync_batch_norm= if need be, or update=, not "
            "both; pure_step(..., mesh=mesh) makes an update for several processes"
        )
    return Step(update, compile=compile, donate=donate, strict=strict)


class Runner:
    """A function that runs compiled, or eagerly where it was asked to or where no compiler works.

    `graphs` is the number of graphs compiled so far, `compile_seconds` how long the calls took that compiled them.
    """

    def __init__(self, name: str, whole: Callable[..., Any], *, compile: bool, strict: bool):
        compile = compile and os.environ.get("TORCH_COMPILE_DISABLE") != "1"  # torch's own switch
        self.compiled, self.strict = compile, strict
        self.graphs, self.compile_seconds = 0, 0.0
        self._name, self._eager = name, own_code(whole)
        self._run = compile_whole(self._eager) if compile else whole
        self._seen: set[Any] = set()
        self._first: dict[str, str] = {}

    def _call(self, signature: Any, inputs: dict[str, Any], *arguments: Any) -> Any:
        """The function of `arguments`; `inputs` are the same by name, `signature` says what a graph depends on."""
        new = signature not in self._seen
        if new:
            self._prepare(inputs, *arguments)
        if not self.compiled:
            with torch.no_grad():
                result = self._run(*arguments)
        elif self.strict and self.graphs:
            with torch.no_grad(), one_graph(self._name):
                result = self._run(*arguments)
        else:
            result = self._call_compiled(new, inputs, *arguments)
        if new:
            self._seen.add(signature)
        return result

    def _prepare(self, inputs: dict[str, Any], *arguments: Any) -> None:
        """What is wrong with new shapes raises here, before anything is compiled."""
        check_batch(inputs["batch"])
        if not self.compiled:
            return
        if self.strict and self.graphs:
            raise RecompileError(refusal(self._name, changed(self._first, described(inputs))))
        look_up_early(inputs)
        rehearse(self._eager, *arguments)
        self._first = self._first or described(inputs)

    def _compiling(self, inputs: dict[str, Any]) -> AbstractContextManager[Any]:
        """How Inductor is set while it compiles for these inputs."""
        return contextlib.nullcontext()

    def _call_compiled(self, new: bool, inputs: dict[str, Any], *arguments: Any) -> Any:
        before, started = graphs_compiled(), time.perf_counter()
        with torch.no_grad(), self._compiling(inputs) if new else contextlib.nullcontext():
            try:
                result = self._run(*arguments)
            except Exception as error:
                if leave_damaged_cache(error):
                    before = graphs_compiled()
                    result = self._run(*arguments)
                elif no_compiler(error):
                    self.compiled, self._run = False, self._eager
                    return self._run(*arguments)
                else:
                    raise
        if compiled := graphs_compiled() - before:
            seconds = time.perf_counter() - started
            if self.graphs:
                reason = changed(self._first, described(inputs)) if new else guard_reason(self._eager.__code__)
                said = (
                    f"{self._name}: compiled another graph, in {seconds:.1f} s: {reason}; strict=True makes it an error"
                )
                warnings.warn(said, RuntimeWarning, stacklevel=4)
            self.graphs += compiled
            self.compile_seconds += seconds
        return result


class Step(Runner):
    """What `make_step` returns. `compiled` tells whether it runs compiled, `compile_seconds` how long that took."""

    def __init__(self, update: Update, *, compile: bool, donate: bool, strict: bool = False):
        super().__init__("step", _whole(update, donate), compile=compile, strict=strict)
        self.update, self.donate = update, donate
        self._alike = Alike("step")
        self._around = getattr(update, "around", lambda params: around(params, layout_of(params)))

    def _compiling(self, inputs: dict[str, Any]) -> AbstractContextManager[Any]:
        # On a CPU, Inductor would have weights and their gradients channels last, and the optimizer, whose state is
        # not, would walk across them [ResNet-18, batch 16: 406 ms a step instead of 181; LeNet, 512: 73 instead of 47].
        if any(leaf.device.type != "cpu" for leaf in tree.leaves(inputs)):
            return contextlib.nullcontext()
        from torch._inductor import config

        return config.patch(layout_optimization=False)

    def __call__(self, train_state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        if not isinstance(train_state, TrainState):
            raise TypeError(f"step: expected a TrainState, got {type(train_state).__name__}; see TrainState.create")
        given, parts = train_state, train_state.parts
        first = False
        if _ranks.count() > 1:
            check_batch(batch)
            first = self._alike.check(getattr(self.update, "mesh", None), train_state, batch, batch_size(batch))
        if self.donate:
            train_state = own_memory(train_state)
            parts = train_state.parts
        signature = (state_shapes(train_state), shapes(batch))
        with self._around(train_state.params):
            new_parts, metrics = self._call(signature, {"batch": batch, "state": train_state}, parts, batch)
        new = TrainState(*(parts if self.donate else new_parts))
        new._memory.shapes = signature[0]
        if self.donate:
            new._memory.owned = True
            given._memory.donate()
        if first:
            self._alike.check_counts(new.state)
        return new, metrics


def _whole(update: Update, donate: bool) -> Callable[[Any, Any], tuple[Any, Metrics]]:
    """The step over plain containers: (parts, batch) -> (new parts, or None where donated, and metrics)."""

    def whole(parts: Any, batch: Any) -> tuple[Any, Metrics]:
        train_state, metrics = update(TrainState(*parts), batch)
        check_same(parts, train_state.parts)
        metrics = {name: value.clone() for name, value in metrics.items()}
        if not donate:
            return train_state.parts, metrics
        old, new = tree.leaves(parts), tree.leaves(train_state.parts)
        # All new values exist before the first write: a leaf of the new state may be another leaf of the old one.
        # In a compiled graph these copies are fused away.
        new = [value.clone() for value in new]
        for target, value in zip(old, new, strict=True):
            target.copy_(value)
        return None, metrics

    return whole


def own_code(f: Callable[..., Any]) -> types.FunctionType:
    """`f` around a code object of its own, so that no other function shares its cache of graphs."""
    return types.FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)


def compile_whole(f: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` in one graph."""
    keep_writes_after_reads()
    return torch.compile(f, fullgraph=True)


def rehearse(update: Callable[..., Any], *arguments: Any) -> Any:
    """Run on fake tensors, shapes without data: what is wrong raises here, eagerly, with its own message."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = tree.map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, arguments)
    try:
        with mode, torch.no_grad():
            return update(*fake)
    except (DataDependentOutputException, GuardOnDataDependentSymNode) as error:
        raise ValueError(
            "the function reads the value of a tensor (if, float(), .item()), which one compiled graph cannot do; "
            "choose with torch.where, or pass compile=False"
        ) from error


def shapes(values: Any) -> str:
    """What decides whether a graph fits: structure, shapes, dtypes and devices."""
    flat, structure = tree.flatten(values)
    described = [
        (*v.shape, v.dtype, v.device, *getattr(v, "placements", ())) if isinstance(v, Tensor) else type(v) for v in flat
    ]
    return f"{structure}{described}"


def state_shapes(train_state: TrainState) -> str:
    """The `shapes` of a state, which its memory remembers: a step does not change them."""
    if train_state._memory.shapes is None:
        train_state._memory.shapes = shapes(train_state.parts)
    return train_state._memory.shapes


def batch_size(batch: Any) -> int:
    """The length of the batch axis: that of the first leaf that has axes."""
    return next((leaf.shape[0] for leaf in tree.leaves(batch) if leaf.dim()), 1)


def check_batch(batch: Any) -> None:
    """Raise unless a batch is a pytree of tensors that holds at least one example."""
    found = tree.paths(batch)
    if not found:
        raise ValueError(f"batch: expected tensors with a leading batch axis, got {batch!r}")
    for path, leaf in found.items():
        if not isinstance(leaf, Tensor):
            where = f"batch: leaf {path!r}" if path else "batch"
            raise TypeError(f"{where} is {type(leaf).__name__}, expected a tensor; a Python number would recompile")
        if leaf.dim() and leaf.shape[0] == 0:
            raise ValueError(f"batch: leaf {path!r} has no examples, shape {tuple(leaf.shape)}")


def no_compiler(error: BaseException) -> bool:
    """Whether `torch.compile` failed for want of a compiler; if so, says once what to do."""
    names = ("InvalidCxxCompiler", "CppCompileError", "TritonMissing")
    cause: BaseException | None = error
    while cause is not None and type(cause).__name__ not in names:
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
    if cause is None:
        return False
    warnings.warn(
        f"torch.compile found no working compiler ({type(cause).__name__}), so this runs eagerly, more slowly. "
        "Install one (Debian and Ubuntu: apt install g++; macOS: xcode-select --install; or set CXX to its path; on "
        "CUDA: pip install triton), or pass compile=False to silence this.",
        RuntimeWarning,
        stacklevel=4,
    )
    return True


def _loss_and_aux(returned: Any) -> tuple[Tensor, tuple[Any, Metrics]]:
    match returned:
        case (Tensor() as loss, (state, dict() as metrics)):
            pass
        case _:
            raise TypeError("loss_fn must return (loss, (state, metrics)), metrics a dict of 0-d tensors")
    if loss.dim() != 0 or not loss.is_floating_point():
        raise ValueError(f"loss_fn: the loss must be a 0-d floating tensor, got {loss.dtype} of {tuple(loss.shape)}")
    if "loss" in metrics:
        raise ValueError('loss_fn: the metrics must not contain "loss"; the step adds it')
    for name, value in metrics.items():
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ValueError(f"loss_fn: metric {name!r} must be a 0-d tensor; reduce it, for example with .mean()")
    return loss, (state, {name: value.detach() for name, value in metrics.items()})
