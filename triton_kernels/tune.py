"""Measures the kernels on the present card and writes the table that chooses them: `python -m triton_kernels.tune`.

For each size, every configuration that the rule holds for possible is checked against float64 and timed in turns
with the library. The table names a Triton kernel where it is faster than the library by more than `NOISE`, in all
passes together and slower in none; elsewhere it names the library:

    python -m triton_kernels.tune [--out FILE] [--budget SECONDS] [--operations matmul linear softmax cross_entropy]

The file is written anew after each size, so a run that is stopped keeps what it measured, and the next one goes on
from there. By default it is `tables/<card>.json` in the package, which is read from there; one that is elsewhere is
read by `triton_kernels.load_table`. With --dry-run tiny sizes are "measured" on the CPU, in Triton's interpreter.

The library is cuBLAS, with an activation in a kernel of its own, or torch's own softmax and cross-entropy, which are
what the operators fall back on. For the last two the table also says what `torch.compile` takes
(`compiled_milliseconds`) at some sizes, but that decides nothing: a compiled graph calls the same operators.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from triton_kernels import _choice, _launch, _measure
from triton_kernels._choice import Choice
from triton_kernels._cross_entropy import op as cross_entropy
from triton_kernels._matmul import choice as matmul
from triton_kernels._measure import Timing, random_matrix
from triton_kernels._softmax import op as softmax

NOISE = 0.02  # a kernel counts as faster where it saves more than this share of the time
FINALISTS = 3  # the configurations that a first look leaves, to be timed at length beside the library
OPERATIONS = ("matmul", "linear", "softmax", "cross_entropy")
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One size to measure. sizes: (batch, m, n, k) of a product, else (rows, columns).

    layout: of a product, which operands are transposed, as BLAS says it ("nt": b is); of softmax, "last" where it
    goes along contiguous memory, else "strided".
    """

    operation: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    layout: str = "last"
    precision: str = "ieee"
    compiled: bool = False  # whether torch.compile is measured too

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        dtype += f" {self.precision}" if self.dtype == torch.float32 and self.operation in ("matmul", "linear") else ""
        return f"{self.operation} {' x '.join(map(str, self.sizes))} {dtype} {self.layout}"


class Pass(NamedTuple):
    """A thing to do with the i-th input set: by the library, and by ours with a configuration (None: by its rule)."""

    library: Callable[[int], object]
    ours: Callable[[int, Any], object]
    compiled: Callable[[int], object] | None = None


class Problem(NamedTuple):
    """What is needed to measure a case. right: whether ours with a configuration gives the right results."""

    key: tuple[str, str, tuple[int, ...]]
    configs: list[Any]
    passes: list[Pass]
    right: Callable[[Any], bool]
    sets: int
    has_library: bool = True


# Which sizes ------------------------------------------------------------------------------------------------------

SQUARES = tuple((1, size, size, size) for size in (4096, 8192, 2048, 1024, 16384, 512))
FEW_ROWS = tuple((1, m, n, k) for n, k in ((4096, 4096), (16384, 4096), (4096, 16384)) for m in (1, 16, 64, 256))
LAYERS = (
    (1, 8192, 4096, 1024), (1, 8192, 1024, 4096), (1, 1024, 16384, 1024), (1, 1024, 1024, 16384),
    (1, 16384, 2048, 2048), (1, 65536, 512, 512), (1, 512, 65536, 512), (1, 512, 512, 65536), (1, 65536, 128, 128),
)  # fmt: skip
ODD = ((1, 1000, 1000, 1000), (1, 4095, 4097, 4093))
BATCHES = ((64, 1024, 1024, 64), (64, 1024, 64, 1024), (256, 256, 256, 256))
ACTIVATED = (
    (1, 4096, 4096, 4096), (1, 8192, 8192, 8192), (1, 2048, 2048, 2048), (1, 16384, 4096, 1024),
    (1, 16384, 1024, 4096), (1, 1024, 1024, 1024), (1, 64, 4096, 4096), (1, 512, 512, 512), (1, 65536, 512, 512),
)  # fmt: skip
# An entry speaks for sizes up to twice and down to half its own, so steps of four leave no gap.
ROWS = (4096, 16384, 1024, 65536, 256, 64, 16)
COLUMNS = (4096, 1024, 16384, 65536, 262144, 256, 64)
ELEMENTS = 2**29  # the largest tensor of a softmax


def cases(operations: tuple[str, ...] = OPERATIONS) -> list[Case]:
    """The cases of some operations, what matters most first."""
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    products = partial(_products, "matmul")
    found = [
        *_products("linear", bfloat16, ACTIVATED[:4], ("nt",)),
        *products(bfloat16, SQUARES + FEW_ROWS, ("nt",)),
        *products(bfloat16, SQUARES, ("nn", "tn")),
        *_reductions("softmax", bfloat16, "last"),
        *_reductions("cross_entropy", bfloat16),
        *_reductions("softmax", float32, "last"),
        *_reductions("cross_entropy", float32),
        *products(bfloat16, LAYERS + ODD + BATCHES, ("nt", "nn", "tn")),
        *_products("linear", bfloat16, ACTIVATED[4:], ("nt",)),
        *products(float32, SQUARES[:4], ("nt", "nn", "tn"), "tf32"),
        *products(float32, SQUARES[:4], ("nt", "nn", "tn"), "ieee"),
        *products(float32, SQUARES[:4], ("nt", "nn", "tn"), "bf16x3"),
        *_products("linear", float32, ACTIVATED, ("nt",), "tf32"),
        *_products("linear", float32, ACTIVATED, ("nt",), "ieee"),
        *_reductions("softmax", bfloat16, "strided"),
        *_reductions("softmax", float32, "strided"),
        *products(bfloat16, FEW_ROWS, ("nn", "tn")),
        *products(float16, SQUARES + FEW_ROWS + LAYERS + ODD + BATCHES, ("nt", "nn", "tn")),
        *_products("linear", float16, ACTIVATED, ("nt",)),
        *_reductions("softmax", float16, "last"),
        *_reductions("cross_entropy", float16),
        *products(float32, FEW_ROWS + LAYERS + ODD + BATCHES, ("nt", "nn", "tn"), "tf32"),
        *products(float32, FEW_ROWS + LAYERS + ODD + BATCHES, ("nt", "nn", "tn"), "ieee"),
        *products(bfloat16, SQUARES, ("tt",)),
    ]
    return [case for case in found if case.operation in operations]


def _products(
    operation: str, dtype: torch.dtype, sizes: tuple[tuple[int, ...], ...], layouts: tuple[str, ...], precision="ieee"
) -> Iterator[Case]:
    for size in sizes:
        for layout in layouts:
            yield Case(operation, dtype, size, layout, precision)


def _reductions(operation: str, dtype: torch.dtype, layout: str = "last") -> Iterator[Case]:
    for columns in COLUMNS:
        for rows in ROWS:
            if rows * columns <= ELEMENTS:
                compiled = layout == "last" and dtype == torch.bfloat16 and rows == 4096
                yield Case(operation, dtype, (rows, columns), layout, compiled=compiled)


TINY = (
    Case("matmul", torch.float32, (1, 33, 20, 40), "nt"),
    Case("matmul", torch.bfloat16, (2, 16, 24, 32), "tn"),
    Case("linear", torch.float16, (1, 24, 16, 40), "nt"),
    Case("softmax", torch.float32, (6, 70), compiled=True),
    Case("softmax", torch.float16, (6, 70), "strided"),
    Case("cross_entropy", torch.float32, (6, 70), compiled=True),
)
"""The cases of a dry run."""


# What is measured -------------------------------------------------------------------------------------------------


def problem(case: Case, device: torch.device, most: int) -> Problem:
    """most: how many configurations of a product are tried at the most, those first that its rule thinks best."""
    if case.operation in ("matmul", "linear"):
        return _product(case, device, most)
    return _softmax(case, device) if case.operation == "softmax" else _cross_entropy(case, device)


def key(ask: Callable[[], Choice]) -> tuple[str, str, tuple[int, ...]]:
    """The operation, kind and sizes under which the operators look into the tables, from a call of their rule."""
    asked = []

    def record(operation: str, kind: str, sizes: tuple[int, ...], *_: object) -> Choice:
        asked.append((operation, kind, sizes))
        return Choice("PyTorch", "recorded")

    with mock.patch.object(_choice, "on_cuda", record):
        ask()
    return asked[0]


def as_on_cuda(x: Tensor) -> Tensor:
    """The tensor, or one without values that says of itself to be on CUDA: the rules ask only there."""
    if x.is_cuda:
        return x
    with FakeTensorMode():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def _product(case: Case, device: torch.device, most: int) -> Problem:
    from triton_kernels._matmul import _configs
    from triton_kernels._matmul._launch import _Operands, product

    batch, m, n, k = case.sizes
    fused = case.operation == "linear"
    sets = _measure.input_sets((m * k + k * n) * batch * case.dtype.itemsize, device)
    a_transposed, b_transposed = (letter == "t" for letter in case.layout)
    a = [random_matrix(batch, m, k, case.dtype, device, transposed=a_transposed) for _ in range(sets)]
    b = [random_matrix(batch, k, n, case.dtype, device, transposed=b_transposed) for _ in range(sets)]
    bias = torch.randn(n, dtype=case.dtype, device=device) if fused else None
    options = {"precision": case.precision, "activation": "gelu" if fused else None}

    def ours(i: int, config: Any, pair: bool = False) -> Any:
        return product(a[i], b[i], bias, preactivation=pair, config=config, **options)

    def library(i: int) -> object:
        return F.gelu(torch.addmm(bias, a[i], b[i])) if bias is not None else torch.matmul(a[i], b[i])

    before = a[0].double() @ b[0].double()
    before = before if bias is None else before + bias.double()
    expected = (F.gelu(before), before) if fused else (before,)
    allowed = _measure.tolerance(case.dtype, case.precision)

    def right(config: Any) -> bool:
        for _ in expected:
            _measure.poison(before.shape, case.dtype, device)
        found = ours(0, config, pair=True) if fused else (ours(0, config),)
        errors = [_measure.relative_error(x, exact) for x, exact in zip(found, expected, strict=True)]
        return max(errors) <= allowed

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    sizes = (m, n, k, batch, case.dtype, case.precision)
    tma = _Operands(a[0], b[0], a[0].shape[:-2]).fit_tma(case.precision)
    configs = _configs.candidates(*sizes, capability=capability, tma=tma)
    configs = sorted(configs, key=lambda config: _configs.cycles(config, *sizes))[:most]
    passes = [Pass(library, ours)]
    if fused:  # and for training, which keeps what goes into the activation
        passes.append(Pass(library, partial(ours, pair=True)))
    asked = key(lambda: matmul.on_cuda(a[0], b[0], case.precision, None, "auto", activated=fused))
    # cuBLAS has nothing like bf16x3: there the table only says which configuration is the fastest.
    return Problem(asked, configs, passes, right, sets, has_library=case.precision != "bf16x3")


def _softmax(case: Case, device: torch.device) -> Problem:
    from triton_kernels._softmax import _launch

    rows, columns = case.sizes
    dim = 1 if case.layout == "last" else 0
    shape = (rows, columns) if dim == 1 else (columns, rows)
    sets = _measure.input_sets(rows * columns * case.dtype.itemsize, device)
    x, grad = ([torch.randn(shape, dtype=case.dtype, device=device) for _ in range(sets)] for _ in range(2))
    outputs = [torch.softmax(value, dim) for value in x]

    def forward(x: Tensor) -> Tensor:
        return torch.softmax(x, dim)

    def backward(grad: Tensor, output: Tensor) -> Tensor:
        return torch.ops.aten._softmax_backward_data(grad, output, dim, output.dtype)

    compiled_forward, compiled_backward = (_compiled(f, device) if case.compiled else None for f in (forward, backward))
    passes = [
        Pass(
            lambda i: forward(x[i]),
            lambda i, _: _launch.softmax(x[i], dim),
            compiled_forward and (lambda i: compiled_forward(x[i])),
        ),
        Pass(
            lambda i: backward(grad[i], outputs[i]),
            lambda i, _: _launch.softmax_backward(grad[i], outputs[i], dim),
            compiled_backward and (lambda i: compiled_backward(grad[i], outputs[i])),
        ),
    ]

    def right(_: Any) -> bool:
        exact = forward(x[0].double()), backward(grad[0].double(), outputs[0].double())
        return _is_right(case.dtype, device, [(one.ours, e) for one, e in zip(passes, exact, strict=True)])

    asked = key(lambda: softmax.choose(as_on_cuda(x[0]), dim, "auto"))
    return Problem(asked, [None], passes, right, sets)


def _cross_entropy(case: Case, device: torch.device) -> Problem:
    from triton_kernels._cross_entropy import _launch

    rows, columns = case.sizes
    sets = _measure.input_sets(rows * columns * case.dtype.itemsize, device)
    logits = [torch.randn(rows, columns, dtype=case.dtype, device=device) for _ in range(sets)]
    labels = [torch.randint(columns, (rows,), device=device) for _ in range(sets)]
    grads = torch.randn(rows, device=device)

    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    def both(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor, grads: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        losses = function(logits, labels)
        return torch.autograd.grad(losses, logits, grads.to(losses.dtype))[0]

    def ours(i: int, _: Any) -> Tensor:
        log_normalizers = _launch.cross_entropy(logits[i], labels[i])[1]
        return _launch.cross_entropy_backward(grads, None, logits[i], labels[i], log_normalizers)

    compiled = _compiled(forward, device) if case.compiled else None
    passes = [
        Pass(
            lambda i: forward(logits[i], labels[i]),
            lambda i, _: _launch.cross_entropy(logits[i], labels[i])[0],
            compiled and (lambda i: compiled(logits[i], labels[i])),
        ),
        Pass(
            lambda i: both(forward, logits[i], labels[i], grads),
            ours,
            compiled and (lambda i: both(compiled, logits[i], labels[i], grads)),
        ),
    ]

    def right(_: Any) -> bool:
        wide = logits[0].double()
        exact, exact_gradient = forward(wide, labels[0]), both(forward, wide, labels[0], grads.double())
        losses_right = _is_right(torch.float32, device, [(passes[0].ours, exact)])
        return losses_right and _is_right(case.dtype, device, [(passes[1].ours, exact_gradient)])

    asked = key(lambda: cross_entropy.choose(as_on_cuda(logits[0]), "auto"))
    return Problem(asked, [None], passes, right, sets)


def _is_right(
    dtype: torch.dtype, device: torch.device, results: list[tuple[Callable[[int, Any], Any], Tensor]]
) -> bool:
    for ours, exact in results:
        _measure.poison(exact.shape, dtype, device)
        if _measure.relative_error(ours(0, None), exact) > _measure.tolerance(dtype):
            return False
    return True


def _compiled(function: Callable, device: torch.device) -> Callable:
    return torch.compile(function, dynamic=False, backend="inductor" if device.type == "cuda" else "aot_eager")


# How it is measured -----------------------------------------------------------------------------------------------


def measured(case: Case, device: torch.device, most: int, deadline: float = math.inf) -> dict[str, Any]:
    """The entry of the table for a case."""
    if case.compiled:
        torch._dynamo.reset()  # else torch stops to compile after some sizes
    with _measure.library_computes(case.precision):
        task = problem(case, device, most)
        tried = [partial(one.ours, 0, config) for config in task.configs for one in task.passes]
        _measure.side_by_side(tried, device, deadline)
        configs = [config for config in task.configs if _works(case, config, task.right)]
        if len(configs) > FINALISTS:
            configs = _fastest(task, configs, device)
        return _entry(task, configs, device)


def _works(case: Case, config: Any, right: Callable[[Any], bool]) -> bool:
    """Whether a configuration compiles, launches and is right; one that is wrong is said aloud."""
    try:
        works = right(config)
    except Exception as error:  # too much shared memory, operands that the copy engine cannot take, ...
        first = (str(error).strip() or "-").splitlines()[0]
        print(f"  {case}: {config or 'the kernel'} does not run: {type(error).__name__}: {first[:160]}", flush=True)
        return False
    if not works:
        print(f"  {case}: {config or 'the kernel'} IS WRONG and is left out", flush=True)
    return works


def _fastest(task: Problem, configs: list[Any], device: torch.device) -> list[Any]:
    """The few fastest at a first look."""
    functions = {str(i): partial(_ours, task.passes[0], config) for i, config in enumerate(configs)}
    found = _measure.interleaved(functions, device, sets=task.sets, seconds=0.0, rounds=(3, 3))
    return [configs[int(i)] for i in sorted(found, key=lambda i: found[i].milliseconds)[:FINALISTS]]


def _ours(one: Pass, config: Any, i: int) -> object:
    return one.ours(i, config)


def _entry(task: Problem, configs: list[Any], device: torch.device) -> dict[str, Any]:
    times: list[dict[str, Timing]] = []
    for one in task.passes:
        functions: dict[str, Callable[[int], object]] = {"library": one.library}
        functions |= {str(i): partial(_ours, one, config) for i, config in enumerate(configs)}
        if one.compiled is not None:
            functions["compiled"] = one.compiled
        times.append(_measure.interleaved(functions, device, sets=task.sets))
    total = {name: sum(found[name].milliseconds for found in times) for name in times[0]}
    library = total.pop("library")
    compiled = total.pop("compiled", None)
    best = min(total, key=lambda name: total[name], default=None)
    fastest = None if best is None else _fields(configs[int(best)])
    wins = best is not None and (
        not task.has_library or faster([(found[best].milliseconds, found["library"].milliseconds) for found in times])
    )
    operation, kind, sizes = task.key
    entry = {
        "operation": operation,
        "kind": kind,
        "sizes": list(sizes),
        "config": fastest if wins else None,
        "milliseconds": None if best is None else total[best],
        "library_milliseconds": library,
        "fastest": fastest,
    }
    return entry if compiled is None else entry | {"compiled_milliseconds": compiled}


def faster(passes: list[tuple[float, float]]) -> bool:
    """Whether ours beats the library by more than noise over all passes, and loses none of them by more than noise."""
    ours, library = (sum(times) for times in zip(*passes, strict=True))
    return ours < (1 - NOISE) * library and all(mine < (1 + NOISE) * theirs for mine, theirs in passes)


def _fields(config: Any) -> dict[str, Any]:
    """What the table says of a configuration; nothing of those that follow from the sizes by rule."""
    return {} if config is None else asdict(config)


# The table --------------------------------------------------------------------------------------------------------


def default_path(card: str) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in card.lower())
    return Path(__file__).parent / "tables" / f"{name}.json"


def begun(path: Path, card: str) -> dict[str, Any]:
    """The table to go on with: that of the file if it is of this card and these versions, else an empty one."""
    import triton

    head = {"device": card, "torch": torch.__version__, "triton": triton.__version__}
    table = json.loads(path.read_text()) if path.exists() else {}
    same = all(table.get(name) == value for name, value in head.items())
    return {**head, "date": date.today().isoformat(), "entries": table["entries"] if same else []}


def write(path: Path, table: dict[str, Any]) -> None:
    """Writes the whole file or, if interrupted, leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = ",\n".join("  " + json.dumps(entry) for entry in table["entries"])
    head = json.dumps({name: value for name, value in table.items() if name != "entries"}, indent=1)
    text = f'{head[:-2]},\n "entries": [\n{entries}\n ]\n}}\n'
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    os.replace(beside, path)


def tune(
    chosen: list[Case], device: torch.device, path: Path, card: str, budget: float = math.inf, most: int = 24
) -> tuple[int, int]:
    """Measures the cases that the table does not have yet. Returns how many were measured and how many were left."""
    deadline = time.perf_counter() + budget
    table = begun(path, card)
    entries = {(entry["operation"], entry["kind"], tuple(entry["sizes"])): entry for entry in table["entries"]}
    done, left = 0, 0
    known = {entry.get("case") for entry in table["entries"]}
    for case in chosen:
        if str(case) in known:
            continue
        if time.perf_counter() > deadline:
            left += 1
            continue
        try:
            entry = measured(case, device, most, deadline) | {"case": str(case)}
        except torch.cuda.OutOfMemoryError:
            print(f"{case}: does not fit the card's memory", flush=True)
            continue
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        entries[entry["operation"], entry["kind"], tuple(entry["sizes"])] = entry
        table["entries"] = list(entries.values())
        write(path, table)
        done += 1
        print(_line(case, entry), flush=True)
    return done, left


def _line(case: Case, entry: dict[str, Any]) -> str:
    if entry["milliseconds"] is None:
        return f"{case}: no configuration works, the library takes {entry['library_milliseconds']:.4f} ms"
    ratio = entry["library_milliseconds"] / entry["milliseconds"]
    compiled = entry.get("compiled_milliseconds")
    beside = f", torch.compile {compiled / entry['milliseconds']:.2f}" if compiled else ""
    chosen = "the library" if entry["config"] is None else "Triton"
    return (
        f"{case}: Triton {entry['milliseconds']:.4f} ms, the library takes {ratio:.2f} times as long{beside}: {chosen}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m triton_kernels.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table, tables/<card>.json in the package")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin nothing after that")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--configs", type=int, default=24, metavar="N", help="tried for each product, 24")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in the interpreter; needs --out")
    options = parser.parse_args(arguments)
    if options.dry_run:
        if options.out is None:
            parser.error("--dry-run measures nothing that belongs into the package: say --out FILE")
        if not _launch.INTERPRETED:  # what holds when triton is imported holds for the whole process
            command = [sys.executable, "-m", "triton_kernels.tune", *(sys.argv[1:] if arguments is None else arguments)]
            os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})
        device, card, chosen, most = torch.device("cpu"), "dry run", list(TINY), 2
    elif not _launch.INSTALLED or not torch.cuda.is_available():
        parser.error("needs Triton and a CUDA device; --dry-run does without")
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        card, chosen, most = torch.cuda.get_device_name(device), cases(tuple(options.operations)), options.configs
    path = options.out or default_path(card)
    chosen = [case for case in chosen if case.operation in options.operations]
    done, left = tune(chosen, device, path, card, options.budget, most)
    print(f"{path}: {done} sizes measured, {left} not reached" + ("; run again to go on" if left else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
