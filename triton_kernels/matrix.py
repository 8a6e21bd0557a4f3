"""Every operation under every transform, eager and compiled, against plain torch: `python -m triton_kernels.matrix`.

A cell computes a transform of `y * sin(y)` with y the operation, which has derivatives of every order, and
compares it with the same function of torch's own operations under the same transform, eager and in float64. The
operations take float64 through the library's kernels; the rules of differentiation and batching are the same in every
dtype.

Prints a Markdown table of operations x transforms whose cells say how the operation does eager (in float64 and
float32) and compiled (`fullgraph=True`), and exits with 1 if any cell fails:

    python -m triton_kernels.matrix [--backend inductor] [--operation softmax] [--device cpu] [--write FILE]

What plain torch cannot compile either is named in `UPSTREAM` and tried in a process of its own, as it may crash.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, func
from torch.nn import functional as F

import triton_kernels as kernels
from triton_kernels._activation import ACTIVATIONS, activate

BATCH = 3  # examples of each operand, for `vmap`; other transforms take the first, and the second as its tangent
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the largest element of the float64 reference
TIMES_TORCH = 4  # or so many times the error of torch's own operation in the same dtype, where that is more
MARKERS = ("<!-- matrix -->", "<!-- /matrix -->")


@dataclass(frozen=True)
class Operation:
    """A function of tensors of these shapes, ours and torch's; labels come last, where there are any."""

    name: str
    ours: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...] = ()  # for each of a batch


@dataclass(frozen=True)
class Transform:
    """`apply(function, operands, labels)` computes tensors from a function and batches of its operands and labels."""

    name: str
    apply: Callable[[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]], Any]


def _linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **options) -> Tensor:
    return kernels.linear_cross_entropy(x, weight, labels, bias, backend="triton", **options)


def _smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per row, smoothed by 0.2; torch's own writes in place there, which forbids `vmap` of labels."""
    log_p = torch.log_softmax(logits, 1)
    losses = 0.8 * F.nll_loss(log_p, labels, reduction="none") - 0.2 * log_p.mean(1)
    return torch.where(labels == -100, 0.0, losses)


def _linear_reference(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> Tensor:
    return activate(F.linear(x, weight, bias), activation)


_LABELS = ((0, 2, 1), (1, 1, 2), (2, 0, 0))
_SOME_IGNORED = ((0, -100, 2), (1, 1, -100), (-100, 0, 2))
_EVERY_OPTION = {"label_smoothing": 0.2, "reduction": "none"}
_softmax = partial(kernels.softmax, dim=-1, backend="triton")
_log_softmax = partial(kernels.log_softmax, dim=0, backend="triton")
_cross_entropy = partial(kernels.cross_entropy, backend="triton")
OPERATIONS = (
    Operation("matmul", partial(kernels.matmul, backend="triton"), torch.matmul, ((2, 3), (3, 2))),
    Operation("matmul, broadcast", partial(kernels.matmul, backend="triton"), torch.matmul, ((2, 1, 2, 2), (2, 2, 1))),
    *(
        Operation(
            f"linear, {activation}" if activation else "linear",
            partial(kernels.linear, activation=activation, backend="triton"),
            partial(_linear_reference, activation=activation),
            ((2, 3), (2, 3), (2,)),
        )
        for activation in (None, *ACTIVATIONS)
    ),
    Operation("softmax", _softmax, partial(torch.softmax, dim=-1), ((2, 3),)),
    Operation("log_softmax", _log_softmax, partial(torch.log_softmax, dim=0), ((3, 2),)),
    Operation("cross_entropy", _cross_entropy, F.cross_entropy, ((3, 3),), _LABELS),
    Operation(
        "cross_entropy, smoothed",
        partial(_cross_entropy, **_EVERY_OPTION),
        _smoothed,
        ((3, 3),),
        _SOME_IGNORED,
    ),
    Operation(
        "linear_cross_entropy",
        _linear_cross_entropy,
        lambda x, weight, bias, labels: F.cross_entropy(F.linear(x, weight, bias), labels),
        ((3, 2), (3, 2), (3,)),
        _LABELS,
    ),
    Operation(
        "linear_cross_entropy, smoothed",
        partial(_linear_cross_entropy, **_EVERY_OPTION),
        lambda x, weight, bias, labels: _smoothed(F.linear(x, weight, bias), labels),
        ((3, 2), (3, 2), (3,)),
        _SOME_IGNORED,
    ),
)


def curved(out: Tensor) -> Tensor:
    """A function whose derivatives of every order are not zero."""
    return out * torch.sin(out)


def _at(values: tuple[Tensor, ...], index: int = 0) -> tuple[Tensor, ...]:
    # Copies: the compiler fails, of torch's operations too, where a tensor and its tangent are views of one base.
    return tuple(value[index].clone() for value in values)


def _flat(function: Callable, xs: tuple[Tensor, ...], labels: tuple[Tensor, ...], index: int = 0):
    """The function of all operands in one vector, and that vector: a Jacobian of it has every cross term."""
    shapes = [x.shape[1:] for x in xs]
    fixed = _at(labels, index)

    def of_vector(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        return function(*(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)), *fixed)

    return of_vector, torch.cat([x.reshape(-1) for x in _at(xs, index)])


def _sum(function: Callable) -> Callable:
    return lambda *operands: function(*operands).sum()


def _forward(function, xs, labels):
    return function(*_at(xs), *_at(labels))


def _grad(function, xs, labels):
    every = tuple(range(len(xs)))
    return [func.grad(_sum(function), argnums)(*_at(xs), *_at(labels)) for argnums in ((i,) for i in every)] + [
        func.grad(_sum(function), every)(*_at(xs), *_at(labels))
    ]


def _vmap(function, xs, labels):
    batches = (*xs, *labels)
    outs = [func.vmap(function)(*batches)]
    outs.append(func.vmap(function, in_dims=-1, out_dims=-1)(*(x.movedim(0, -1) for x in batches)))
    for i, batch in enumerate(batches):
        dims = tuple(0 if i == j else None for j in range(len(batches)))
        outs.append(func.vmap(function, dims)(*(batch if i == j else x[0] for j, x in enumerate(batches))))
    return outs


def _vmap_grad(function, xs, labels):
    grad = func.grad(_sum(function), tuple(range(len(xs))))
    shared = (0, *(None for _ in xs[1:]), *(0 for _ in labels))  # one gradient of the weights for each example
    return func.vmap(grad)(*xs, *labels), func.vmap(grad, shared)(xs[0], *_at(xs[1:]), *labels)


def _jvp(function, xs, labels):
    point, tangents, fixed = _at(xs), _at(xs, 1), _at(labels)
    outs = [func.jvp(lambda *operands: function(*operands, *fixed), point, tangents)[1]]
    for i in range(len(xs)):
        of_one = lambda x, i=i: function(*point[:i], x, *point[i + 1 :], *fixed)  # noqa: E731
        outs.append(func.jvp(of_one, (point[i],), (tangents[i],))[1])
    return outs


def _vjp(function, xs, labels):
    fixed = _at(labels)
    pulled = func.vjp(lambda *operands: function(*operands, *fixed), *_at(xs))
    return pulled[1](torch.cos(pulled[0]))


def _of_vector(transform: Callable, function, xs, labels):
    of_vector, vector = _flat(function, xs, labels)
    return transform(of_vector)(vector)


def _of_sum(transform: Callable, function, xs, labels):
    return _of_vector(transform, _sum(function), xs, labels)


def _hvp(function, xs, labels):
    of_vector, vector = _flat(_sum(function), xs, labels)
    return func.jvp(func.grad(of_vector), (vector,), (_flat(function, xs, labels, 1)[1],))[1]


def _grad_grad(function, xs, labels):
    every, fixed = tuple(range(len(xs))), _at(labels)

    def curved_gradient(*operands):
        return sum(curved(grad).sum() for grad in func.grad(_sum(function), every)(*operands, *fixed))

    return func.grad(curved_gradient, every)(*_at(xs))


def _vmap_vmap(function, xs, labels):
    pairs = [torch.stack((x, x.flip(0)), 1) for x in (*xs, *labels)]
    # the last operand belongs to the inner batch alone, the others to the outer
    inner = (*(None for _ in pairs[1:]), 0)
    outer = (*(0 for _ in pairs[1:]), None) if pairs[1:] else (0,)
    last = pairs[-1] if len(pairs) == 1 else pairs[-1][:, 0]
    apart = func.vmap(func.vmap(function, inner), outer)(*(x[:, 0] for x in pairs[:-1]), last)
    return func.vmap(func.vmap(function))(*pairs), apart


def _grad_hvp(function, xs, labels):
    of_vector, vector = _flat(_sum(function), xs, labels)
    direction = _flat(function, xs, labels, 1)[1]
    return func.grad(lambda v: curved(func.jvp(func.grad(of_vector), (v,), (direction,))[1]).sum())(vector)


def _vmap_hessian(function, xs, labels):
    of_operands = lambda *operands: function(*operands).sum()  # noqa: E731
    return func.vmap(func.jacfwd(func.jacrev(of_operands)))(*xs, *labels)


def _vmap_jacfwd(function, xs, labels):
    return func.vmap(func.jacfwd(function))(*xs, *labels)


TRANSFORMS = (
    Transform("forward", _forward),
    Transform("grad", _grad),
    Transform("vmap", _vmap),
    Transform("vmap(grad)", _vmap_grad),
    Transform("jvp", _jvp),
    Transform("vjp", _vjp),
    Transform("jacrev", partial(_of_vector, func.jacrev)),
    Transform("jacfwd", partial(_of_vector, func.jacfwd)),
    Transform("jacfwd(jacrev)", partial(_of_sum, lambda f: func.jacfwd(func.jacrev(f)))),
    Transform("jacrev(jacrev)", partial(_of_sum, lambda f: func.jacrev(func.jacrev(f)))),
    Transform("jvp(grad)", _hvp),
    Transform("grad(grad)", _grad_grad),
    Transform("vmap(vmap)", _vmap_vmap),
    Transform("grad(jvp(grad))", _grad_hvp),
    Transform("jacfwd(jacrev(jacrev))", partial(_of_sum, lambda f: func.jacfwd(func.jacrev(func.jacrev(f))))),
    Transform("jacfwd(jacfwd)", partial(_of_sum, lambda f: func.jacfwd(func.jacfwd(f)))),
    Transform("vmap(jacfwd)", _vmap_jacfwd),
    Transform("vmap(jacfwd(jacrev))", _vmap_hessian),
)

# Transforms that torch cannot compile of its own operations either.
UPSTREAM = {"vmap(jacfwd(jacrev))": "https://github.com/pytorch/pytorch/issues/183015"}


def check(
    operation: Operation,
    transform: Transform,
    mode: str = "eager",
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    *,
    of_torch: bool = False,
) -> float:
    """The greatest error of a cell, relative to the greatest element of its reference; `TOLERANCE` is what passes.

    mode: "eager" or a backend of `torch.compile`. of_torch: of torch's own operation instead of ours.
    """
    xs, labels = _inputs(operation, device)
    reference = transform.apply(lambda *operands: curved(operation.reference(*operands)), xs, labels)
    function = operation.reference if of_torch else operation.ours
    run = lambda xs, labels: transform.apply(lambda *operands: curved(function(*operands)), xs, labels)  # noqa: E731
    if mode != "eager":
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend=mode)
    found = run(tuple(x.to(dtype) for x in xs), labels)
    return max(_error(a, b) for a, b in zip(_leaves(found), _leaves(reference), strict=True))


def _inputs(operation: Operation, device: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    xs = (torch.randn(BATCH, *shape, dtype=torch.float64, generator=generator) for shape in operation.shapes)
    labels = (torch.tensor(operation.labels),) if operation.labels else ()
    return tuple(x.to(device) for x in xs), tuple(x.to(device) for x in labels)


def _error(found: Tensor, reference: Tensor) -> float:
    scale = reference.abs().max().item()
    if not 1e-3 < scale < 1e6:
        raise AssertionError(f"the reference shows nothing: its greatest element is {scale}")
    if found.shape != reference.shape:
        raise AssertionError(f"expected shape {tuple(reference.shape)}, got {tuple(found.shape)}")
    error = (found.double() - reference).abs().max().item() / scale
    return error if error == error else float("inf")


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    else:
        for branch in tree:
            yield from _leaves(branch)


def passes(operation: Operation, transform: Transform, mode: str, dtype: torch.dtype, device: str) -> str:
    """ "" for a cell that passes, else what is wrong with it."""
    try:
        error = check(operation, transform, mode, dtype, device)
    except Exception as raised:
        return f"{type(raised).__name__}: {(str(raised).strip() or '-').splitlines()[0]}"
    if error <= TOLERANCE[dtype] or error <= TIMES_TORCH * check(
        operation, transform, mode, dtype, device, of_torch=True
    ):
        return ""
    return f"relative error {error:.1e} in {dtype}"


def alone(operation: Operation, transform: Transform, mode: str, device: str = "cpu", of_torch: bool = False) -> str:
    """What a compiled cell comes to in a process of its own: "ok", "wrong" or "fails"."""
    module = [sys.executable, "-m", "triton_kernels.matrix", "--cell", operation.name, transform.name]
    options = ["--backend", mode, "--device", device, *(["--of-torch"] if of_torch else [])]
    run = subprocess.run([*module, *options], capture_output=True, text=True, check=False)
    return {0: "ok", 1: "wrong"}.get(run.returncode, "fails")


def compiled_cell(operation: Operation, transform: Transform, backend: str, device: str) -> str:
    """ "" for a compiled cell that passes, "torch" for one that torch fails in too, else what is wrong with it."""
    if transform.name not in UPSTREAM:
        return passes(operation, transform, backend, torch.float64, device)
    outcome = alone(operation, transform, backend, device)
    if outcome == "fails" and alone(operation, transform, backend, device, of_torch=True) == "fails":
        return "torch"
    return "" if outcome == "ok" else outcome


def table(operations: tuple[Operation, ...], backend: str, device: str) -> tuple[list[str], list[str]]:
    """The lines of the Markdown table, and a line for each failure."""
    lines = [f"| | {' | '.join(f'`{transform.name}`' for transform in TRANSFORMS)} |"]
    lines.append("|---" * (len(TRANSFORMS) + 1) + "|")
    failures = []
    for operation in operations:
        cells = []
        for transform in TRANSFORMS:
            eager = [passes(operation, transform, "eager", dtype, device) for dtype in TOLERANCE]
            compiled = compiled_cell(operation, transform, backend, device)
            said = {"eager": next(filter(None, eager), ""), "compiled": compiled}
            for mode, what in said.items():
                if what not in ("", "torch"):
                    failures.append(f"{operation.name}, {transform.name}, {mode}: {what}")
            cells.append("/".join({"": "ok", "torch": "torch"}.get(what, "**fails**") for what in said.values()))
        lines.append(f"| {operation.name} | {' | '.join(cells)} |")
        print(f"{operation.name}: {len(failures)} failures so far", file=sys.stderr, flush=True)
    lines += ["", f"Eager/compiled (`{backend}`, {device}), torch {torch.__version__.split('+')[0]}."]
    lines += [
        f"`torch`: torch cannot compile `{name}` of its own operations either ({why})."
        for name, why in UPSTREAM.items()
    ]
    return lines, failures


def write(path: Path, lines: list[str]) -> None:
    """Puts the table between the markers of a file."""
    text = path.read_text()
    if any(text.count(marker) != 1 for marker in MARKERS):
        raise ValueError(f"{path} must hold the markers {' and '.join(MARKERS)} once each")
    before, rest = text.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    path.write_text("\n".join([before + MARKERS[0], *lines, MARKERS[1] + after]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m triton_kernels.matrix", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--backend", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--operation", choices=[operation.name for operation in OPERATIONS])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"write the table between {' and '.join(MARKERS)}")
    parser.add_argument("--cell", nargs=2, metavar=("OPERATION", "TRANSFORM"), help="run one compiled cell")
    parser.add_argument("--of-torch", action="store_true", help="with --cell: torch's own operation")
    options = parser.parse_args(arguments)
    if options.cell:
        operation = next(operation for operation in OPERATIONS if operation.name == options.cell[0])
        transform = next(transform for transform in TRANSFORMS if transform.name == options.cell[1])
        try:
            error = check(operation, transform, options.backend, device=options.device, of_torch=options.of_torch)
        except Exception as raised:
            print(f"{type(raised).__name__}: {raised}", file=sys.stderr)
            return 2
        print(error)
        return int(error > TOLERANCE[torch.float64])
    chosen = tuple(operation for operation in OPERATIONS if options.operation in (None, operation.name))
    lines, failures = table(chosen, options.backend, options.device)
    print("\n".join(lines))
    print("\n".join(failures), file=sys.stderr)
    if options.write:
        write(options.write, lines)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
