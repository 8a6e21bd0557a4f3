"""The Triton kernels on a GPU, right first and then how fast: `python benchmarks/gpu.py --kernels`.

Every operation is compared with float64 on fresh random values, in memory that held NaN. Then each is timed in turns
with torch's own, eager and compiled, over input sets that together exceed the L2 cache: medians by CUDA events, of
CUDA graphs where calls are short. A section ends when its share of `--budget` is spent; what it did not reach is in
the result. `backend="triton"` is what is timed; the last section shows that "auto" takes the better one by the table.

Writes benchmarks/results/gpu_kernels.json, or `--out`, after each section. `--dry-run` goes through everything with
tiny sizes on the CPU, in Triton's interpreter, and writes to a temporary folder; its times mean nothing.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if "--dry-run" in sys.argv:  # Triton reads it when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from environment import machine  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import triton_kernels as kernels  # noqa: E402
from triton_kernels import _measure, tune  # noqa: E402
from triton_kernels._activation import ACTIVATIONS, activate  # noqa: E402
from triton_kernels._measure import Timing, random_matrix  # noqa: E402

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# Its own graphs would copy the operands; calls of all sides are put into graphs here, where they are short.
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"
MAX_AUTOTUNE_SECONDS = 45  # what it may take for one size
NOISE = 0.05  # "auto" may be this much slower than the better of both: two medians differ by as much
Calls = dict[str, Callable[[int], object]]


class Benchmark:
    """What was measured so far, and for how long the present section may go on."""

    def __init__(self, device: torch.device, path: Path, budget: float) -> None:
        self.device, self.path, self.budget = device, path, budget
        self.dry = device.type == "cpu"
        self.started = time.perf_counter()
        self.deadline = math.inf
        self.bandwidth: float | None = None  # of a copy, bytes per millisecond
        self.checks: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.not_reached: list[str] = []

    def seconds_left(self) -> float:
        return self.deadline - time.perf_counter()

    def within_time(self, items: Iterable[Any], name: Callable[[Any], str] = str) -> Iterator[Any]:
        """The items until the section's time is over; the rest is noted."""
        for item in items:
            if self.seconds_left() < 0:
                self.not_reached.append(name(item))
            else:
                yield item

    def each(self, items: Iterable[Any], name: Callable[[Any], str], measure: Callable[[Any], None]) -> None:
        """Measures the items until the section's time is over; an error ends only its item."""
        for item in self.within_time(items, name):
            try:
                measure(item)
            except Exception as error:
                self.failed(name(item), error)

    def time(self, section: str, name: str, calls: Calls, *, sets: int = 1, flop: float = 0, moved: float = 0) -> None:
        """One row: "ours" and the others in turns. flop: operations of a call; moved: bytes it must read and write."""
        times = _measure.interleaved(calls, self.device, sets=sets, seconds=0.0 if self.dry else 0.4)
        self.add(section, name, times, flop=flop, moved=moved)

    def add(self, section: str, name: str, times: dict[str, Timing], *, flop: float = 0, moved: float = 0) -> None:
        ours = times["ours"].milliseconds
        row: dict[str, Any] = {"section": section, "name": name, "graph": times["ours"].graph}
        for side, timing in times.items():
            row[side] = {"milliseconds": timing.milliseconds, "low": timing.low, "high": timing.high}
            if side != "ours":
                row[f"speed_against_{side}"] = timing.milliseconds / ours
        if flop:
            row["tflops"] = flop / ours / 1e9
        if moved:
            row["gigabytes_per_second"] = moved / ours / 1e6
            row["of_copy_bandwidth"] = moved / ours / self.bandwidth if self.bandwidth else None
        self.rows.append(row)
        print(" | ".join(cells(row)), flush=True)

    def failed(self, what: str, error: Exception) -> None:
        first = (str(error).strip() or "-").splitlines()[0]
        self.errors.append(f"{what}: {type(error).__name__}: {first[:300]}")
        print(f"ERROR {self.errors[-1]}", flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def write(self) -> None:
        import triton

        result = {
            "machine": {**machine(), "triton": triton.__version__},
            "dry_run": self.dry,
            "seconds": time.perf_counter() - self.started,
            "copy_gigabytes_per_second": self.bandwidth and self.bandwidth / 1e6,
            "checks": self.checks,
            "rows": self.rows,
            "errors": self.errors,
            "not_reached": self.not_reached,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(beside, self.path)


HEAD = ("section", "case", "ours ms", "against library", "against compiled", "against max-autotune", "rate", "of copy")


def cells(row: dict[str, Any]) -> list[str]:
    def ratio(side: str) -> str:
        value = row.get(f"speed_against_{side}")
        return "" if value is None else f"{value:.2f}"

    rate = f"{row['tflops']:.1f} TFLOP/s" if "tflops" in row else ""
    rate = f"{row['gigabytes_per_second']:.0f} GB/s" if "gigabytes_per_second" in row else rate
    of_copy = "" if row.get("of_copy_bandwidth") is None else f"{row['of_copy_bandwidth']:.0%}"
    ours = row["ours"]["milliseconds"]
    sides = [ratio(side) for side in ("library", "compiled", "max_autotune")]
    return [row["section"], row["name"], f"{ours:.4f}", *sides, rate, of_copy]


# Right ------------------------------------------------------------------------------------------------------------


def checks(device: torch.device, dry: bool) -> Iterator[tuple[str, float, Callable[[], list[tuple[Tensor, Tensor]]]]]:
    """A name, the relative error that is allowed, and what computes pairs of ours and its float64 reference."""
    sizes: dict[str, tuple[int, int, int]] = {
        "square": (1024, 1024, 1024), "odd": (257, 511, 129), "one row": (1, 4096, 4096), "16 rows": (16, 4096, 4096),
        "64 rows": (64, 4096, 4096), "tall": (16384, 256, 512), "wide": (256, 16384, 512), "deep": (64, 64, 32768),
    }  # fmt: skip
    kinds = [(BFLOAT16, "ieee"), (FLOAT16, "ieee"), (FLOAT32, "ieee"), (FLOAT32, "tf32"), (FLOAT32, "bf16x3")]
    layouts, dtypes, columns = (
        ("nn", "nt", "tn", "tt"),
        (BFLOAT16, FLOAT32, FLOAT16),
        (1, 64, 1000, 4096, 32768, 262144),
    )
    if dry:
        sizes, columns, dtypes = {"square": (32, 32, 32), "odd": (17, 9, 21)}, (1, 70), (FLOAT32, FLOAT16)
        kinds, layouts = [(FLOAT32, "ieee"), (FLOAT16, "ieee")], ("nn", "tt")
    for label, size in sizes.items():
        for dtype, precision in kinds:
            for layout in layouts if label in ("square", "odd") else ("nt",):
                name = f"matmul, {label}, {short(dtype, precision)}, {layout}"
                yield (
                    name,
                    _measure.tolerance(dtype, precision),
                    partial(check_matmul, device, dtype, precision, size, layout),
                )
    for dtype, precision in kinds[:2]:
        name = f"matmul, batch, {short(dtype, precision)}"
        yield name, _measure.tolerance(dtype), partial(check_batch, device, dtype, 8 if dry else 128)
    for activation in (None, *ACTIVATIONS):
        for dtype in dtypes:
            # a gradient goes through three more roundings
            name, allowed = f"linear, {activation}, {short(dtype)}, and gradients", 2 * _measure.tolerance(dtype)
            yield name, allowed, partial(check_linear, device, dtype, activation, 16 if dry else 1000)
    for dtype in dtypes:
        for log in (False, True):
            for width in columns:
                for dim in (0, 1):
                    name = f"{'log_' * log}softmax over {width}, dim {dim}, {short(dtype)}, and gradient"
                    yield name, 2 * _measure.tolerance(dtype), partial(check_softmax, device, dtype, width, dim, log)
        for width in columns[1:]:
            name = f"cross_entropy of {width}, {short(dtype)}, and gradient"
            yield name, 2 * _measure.tolerance(dtype), partial(check_cross_entropy, device, dtype, width)
        name = f"linear_cross_entropy, {short(dtype)}, and gradients"
        # its logits are rounded to the dtype, as those of the library are
        yield name, 4 * _measure.tolerance(dtype), partial(check_linear_cross_entropy, device, dtype, dry)


def short(dtype: torch.dtype, precision: str | None = None) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"{name} {precision}" if dtype == FLOAT32 and precision else name


def check_matmul(device, dtype, precision, size, layout):
    m, n, k = size
    a = random_matrix(1, m, k, dtype, device, transposed=layout[0] == "t")
    b = random_matrix(1, k, n, dtype, device, transposed=layout[1] == "t")
    _measure.poison((m, n), dtype, device)
    return [(kernels.matmul(a, b, precision=precision, backend="triton"), a.double() @ b.double())]


def check_batch(device, dtype, size):
    """Batch dimensions that broadcast, over expanded and sliced operands."""
    a = torch.randn(3, 1, size, 2 * size, dtype=dtype, device=device)[..., ::2]
    b = torch.randn(1, size, size + 1, dtype=dtype, device=device).expand(4, -1, -1)
    _measure.poison((3, 4, size, size + 1), dtype, device)
    return [(kernels.matmul(a, b, backend="triton"), a.double() @ b.double())]


def with_gradients(function: Callable, reference: Callable, *operands: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Outputs and gradients of floating operands, ours and float64's, for one random incoming gradient."""
    results, incoming = [], None
    for dtype, of in ((None, function), (torch.float64, reference)):
        values = [x.detach().to(dtype) if dtype and x.is_floating_point() else x.detach() for x in operands]
        wanted = [x.requires_grad_() for x in values if x.is_floating_point()]
        out = of(*values)
        incoming = torch.randn_like(out) if incoming is None else incoming
        gradients = torch.autograd.grad(out, wanted, incoming.to(out.dtype))
        results.append([out.detach(), *gradients])
    return list(zip(*results, strict=True))


def check_linear(device, dtype, activation, size):
    x, weight = (torch.randn(rows, size, dtype=dtype, device=device) for rows in (size + 3, size - 5))
    weight, bias = weight / size**0.5, torch.randn(size - 5, dtype=dtype, device=device)
    return with_gradients(
        partial(kernels.linear, activation=activation, backend="triton"),
        lambda x, weight, bias: activate(F.linear(x, weight, bias), activation),
        *(x, weight, bias),
    )


def check_softmax(device, dtype, width, dim, log):
    rows = max(3, min(4096, 2**22 // width)) if device.type == "cuda" else 3
    x = torch.randn((rows, width) if dim else (width, rows), dtype=dtype, device=device)
    # the gradient of a softmax over one column is zero, whose relative error says nothing
    ours, reference = (kernels.log_softmax, torch.log_softmax) if log else (kernels.softmax, torch.softmax)
    pairs = with_gradients(partial(ours, dim=dim, backend="triton"), partial(reference, dim=dim), x)
    return [(found + 1, exact + 1) for found, exact in pairs] if width == 1 else pairs


def check_cross_entropy(device, dtype, width):
    rows = max(3, min(4096, 2**22 // width)) if device.type == "cuda" else 3
    logits, labels = torch.randn(rows, width, dtype=dtype, device=device), torch.randint(width, (rows,), device=device)
    labels[0] = -100
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    return with_gradients(
        partial(kernels.cross_entropy, backend="triton", **options), partial(F.cross_entropy, **options), logits, labels
    )


def check_linear_cross_entropy(device, dtype, dry):
    rows, features, classes = (5, 8, 11) if dry else (700, 256, 50257)
    x, weight = (torch.randn(size, features, dtype=dtype, device=device) for size in (rows, classes))
    weight, labels = weight / features**0.5, torch.randint(classes, (rows,), device=device)
    return with_gradients(
        lambda x, weight, labels: kernels.linear_cross_entropy(x, weight, labels, reduction="sum", backend="triton"),
        lambda x, weight, labels: F.cross_entropy(F.linear(x, weight), labels, reduction="sum"),
        *(x, weight, labels),
    )


def correctness(bench: Benchmark) -> None:
    listed = list(checks(bench.device, bench.dry))
    _measure.side_by_side([compute for _, _, compute in listed], bench.device, bench.deadline)
    for name, allowed, compute in bench.within_time(listed, name=lambda check: check[0]):
        try:
            error = max(_measure.relative_error(found, exact) for found, exact in compute())
        except Exception as raised:
            bench.failed(name, raised)
            continue
        bench.checks.append({"name": name, "relative_error": error, "allowed": allowed, "right": error <= allowed})
        if error > allowed:
            print(f"WRONG {name}: relative error {error:.2e}, allowed {allowed:.1e}", flush=True)
    right = sum(check["right"] for check in bench.checks)
    print(f"{right} of {len(bench.checks)} checks are right, {len(bench.errors)} raised", flush=True)


# Fast -------------------------------------------------------------------------------------------------------------


def copy(bench: Benchmark) -> None:
    size = 2**10 if bench.dry else 2**30
    x = torch.randn(size // 4, device=bench.device)
    y = torch.empty_like(x)
    times = _measure.interleaved({"copy": lambda i: y.copy_(x)}, bench.device)
    bench.bandwidth = 2 * x.nbytes / times["copy"].milliseconds
    print(f"a copy moves {bench.bandwidth / 1e6:.0f} GB/s, read and written", flush=True)


def host(bench: Benchmark) -> None:
    """What a call costs the processor before the card has anything to do: tiny operands, nothing waited for."""
    x = torch.randn(64, 64, device=bench.device)
    pairs: list[tuple[str, Callable, Callable]] = [
        ("matmul", lambda: kernels.matmul(x, x, backend="triton"), lambda: torch.matmul(x, x)),
        ("softmax", lambda: kernels.softmax(x, backend="triton"), lambda: torch.softmax(x, -1)),
    ]
    for name, ours, library in pairs:
        found: dict[str, list[float]] = {"ours": [], "library": []}
        for _ in range(2 if bench.dry else 20):
            for side, call in (("ours", ours), ("library", library)):
                call()
                if not bench.dry:
                    torch.cuda.synchronize()
                started, calls = time.perf_counter(), 1 if bench.dry else 50
                for _ in range(calls):
                    call()
                found[side].append((time.perf_counter() - started) / calls * 1e3)
        times = {side: Timing(sorted(v)[len(v) // 2], min(v), max(v), False) for side, v in found.items()}
        bench.add("host time of a call", name, times)


def product_name(item: tuple) -> str:
    dtype, precision, layout, (m, n, k), *_ = item
    return f"{m} x {n} x {k} {short(dtype, precision)} {layout}"


def matmul(bench: Benchmark) -> None:
    squares = [(size, size, size) for size in (4096, 8192, 2048, 1024, 16384, 512)]
    thin = [(m, 4096, 4096) for m in (1, 16, 64)]
    shaped = [(65536, 512, 512), (512, 65536, 512), (16384, 1024, 4096), (512, 512, 65536)]
    odd = [(4095, 4097, 4093), (1000, 1000, 1000), (1023, 50257, 768)]
    items: list[tuple] = [(BFLOAT16, "ieee", "nn", size) for size in squares + thin + shaped + odd]
    items[1:1] = [(BFLOAT16, "ieee", layout, (4096,) * 3) for layout in ("nt", "tn", "tt")]
    items += [(FLOAT16, "ieee", "nn", size) for size in squares[:4] + thin[:2] + odd[:1]]
    for precision in ("tf32", "bf16x3", "ieee"):
        items += [(FLOAT32, precision, "nn", size) for size in squares[:3] + thin[1:2] + odd[:1]]
        items.append((FLOAT32, precision, "nt", squares[0]))
    items += [(BFLOAT16, "ieee", layout, size) for layout in ("nt", "tn") for size in squares[1:] + thin]
    if bench.dry:
        items = [(FLOAT32, "ieee", "nn", (32, 16, 16)), (FLOAT16, "ieee", "tn", (17, 8, 9))]

    def operands(item: tuple, sets: int) -> list[tuple[Tensor, Tensor]]:
        dtype, _, layout, (m, n, k) = item
        left = partial(random_matrix, 1, m, k, dtype, bench.device, transposed=layout[0] == "t")
        right = partial(random_matrix, 1, k, n, dtype, bench.device, transposed=layout[1] == "t")
        return [(left(), right()) for _ in range(sets)]

    def once(item: tuple) -> None:
        kernels.matmul(*operands(item, 1)[0], precision=item[1], backend="triton")

    def against_the_library(item: tuple) -> None:
        dtype, precision, _, (m, n, k) = item
        sets = _measure.input_sets((m * k + k * n) * dtype.itemsize, bench.device)
        inputs = operands(item, sets)
        with _measure.library_computes(precision):
            calls: Calls = {
                "ours": lambda i: kernels.matmul(*inputs[i], precision=precision, backend="triton"),
                "library": lambda i: torch.matmul(*inputs[i]),
            }
            bench.time("matmul", product_name(item), calls, sets=sets, flop=2.0 * m * n * k)

    def against_max_autotune(item: tuple) -> None:
        dtype, _, _, (m, n, k) = item
        sets = _measure.input_sets((m * k + k * n) * dtype.itemsize, bench.device)
        inputs = operands(item, sets)
        compiled = compiled_for(bench, torch.matmul, MAX_AUTOTUNE)
        calls: Calls = {
            "ours": lambda i: kernels.matmul(*inputs[i], backend="triton"),
            "library": lambda i: torch.matmul(*inputs[i]),
            "max_autotune": lambda i: compiled(*inputs[i]),
        }
        bench.time("matmul", f"{product_name(item)}, compiled", calls, sets=sets, flop=2.0 * m * n * k)

    _measure.side_by_side([partial(once, item) for item in items], bench.device, bench.deadline)
    bench.each(items, product_name, against_the_library)
    searched: list[tuple] = [(BFLOAT16, "ieee", "nn", size) for size in ((4096,) * 3, (8192,) * 3, (16, 4096, 4096))]
    bench.deadline -= MAX_AUTOTUNE_SECONDS  # none is begun that would not end in time
    bench.each(
        items[:1] if bench.dry else searched,
        lambda item: f"{product_name(item)} against max-autotune",
        against_max_autotune,
    )


def linear(bench: Benchmark) -> None:
    sizes = [(4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 1024), (2048, 2048, 2048), (64, 4096, 4096)]
    items: list[tuple] = [(BFLOAT16, "ieee", "gelu", size) for size in sizes]
    items += [(FLOAT16, "ieee", "gelu", sizes[0]), (FLOAT32, "tf32", "gelu", sizes[0])]
    if bench.dry:
        items = [(FLOAT32, "ieee", "gelu", (8, 16, 12))]

    def operands(item: tuple, sets: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        dtype, _, _, (m, n, k) = item
        normal = partial(torch.randn, dtype=dtype, device=bench.device)
        return [(normal(m, k), normal(n, k) / k**0.5, normal(n)) for _ in range(sets)]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.linear(x, weight, bias, activation="gelu", backend="triton")

    def library(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias))

    def both(function: Callable, operands: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
        values = [x.detach().requires_grad_() for x in operands]
        return torch.autograd.grad(function(*values), values, grad)

    def once(item: tuple) -> None:
        operand = operands(item, 1)[0]
        ours(*operand)
        both(ours, operand, torch.randn(item[3][0], item[3][1], dtype=item[0], device=bench.device))

    with _measure.library_computes("ieee"):
        _measure.side_by_side([partial(once, item) for item in items[:-1]], bench.device, bench.deadline)

    def measure(item: tuple) -> None:
        dtype, precision, _, (m, n, k) = item
        sets = _measure.input_sets((m * k + k * n) * dtype.itemsize, bench.device)
        inputs = operands(item, sets)
        grad = torch.randn(m, n, dtype=dtype, device=bench.device)
        sides: dict[str, Callable] = {"ours": ours, "library": library, "compiled": compiled_for(bench, library)}
        with _measure.library_computes(precision), torch.no_grad():
            calls: Calls = {side: (lambda i, f=f: f(*inputs[i])) for side, f in sides.items()}
            bench.time("linear + gelu", product_name(item), calls, sets=sets, flop=2.0 * m * n * k)
        with _measure.library_computes(precision):
            calls = {side: (lambda i, f=f: both(f, inputs[i], grad)) for side, f in sides.items()}
            name = f"{product_name(item)}, with gradients"
            bench.time("linear + gelu", name, calls, sets=sets, flop=6.0 * m * n * k)

    def against_max_autotune(item: tuple) -> None:
        dtype, _, _, (m, n, k) = item
        sets = _measure.input_sets((m * k + k * n) * dtype.itemsize, bench.device)
        inputs = operands(item, sets)
        sides: dict[str, Callable] = {"ours": ours, "library": library}
        sides["max_autotune"] = compiled_for(bench, library, MAX_AUTOTUNE)
        with torch.no_grad():
            calls: Calls = {side: (lambda i, f=f: f(*inputs[i])) for side, f in sides.items()}
            bench.time("linear + gelu", f"{product_name(item)}, compiled", calls, sets=sets, flop=2.0 * m * n * k)

    bench.each(items, product_name, measure)
    bench.deadline -= MAX_AUTOTUNE_SECONDS
    bench.each(
        items[:1], lambda item: f"linear + gelu, {product_name(item)} against max-autotune", against_max_autotune
    )


def compiled_for(bench: Benchmark, function: Callable, mode: str | None = None) -> Callable:
    def called(*operands: Tensor) -> Tensor:
        return function(*operands)

    torch._dynamo.reset()  # else torch stops to compile after some sizes
    if bench.dry:
        return torch.compile(called, dynamic=False, backend="aot_eager")
    return torch.compile(called, dynamic=False, mode=mode)


COLUMNS = (4096, 1024, 16384, 32768, 65536, 262144, 256, 64, 131072, 2048)


def softmax(bench: Benchmark) -> None:
    items = [(BFLOAT16, columns, False) for columns in COLUMNS] + [(FLOAT32, columns, False) for columns in COLUMNS[:8]]
    items += [(BFLOAT16, columns, True) for columns in COLUMNS[:6]]
    elements = 2**26
    if bench.dry:
        items, elements = [(FLOAT32, 70, False), (FLOAT16, 33, True)], 210

    def named(item: tuple) -> str:
        dtype, columns, log = item
        return f"{'log_' * log}softmax {elements // columns} x {columns} {short(dtype)}"

    def measure(item: tuple) -> None:
        dtype, columns, log = item
        sets = _measure.input_sets(elements * dtype.itemsize, bench.device)
        x, grad = (
            [torch.randn(elements // columns, columns, dtype=dtype, device=bench.device) for _ in range(sets)]
            for _ in range(2)
        )
        ours = partial(kernels.log_softmax if log else kernels.softmax, dim=-1, backend="triton")
        library = partial(torch.log_softmax if log else torch.softmax, dim=-1)
        sides: dict[str, Callable] = {"ours": ours, "library": library, "compiled": compiled_for(bench, library)}

        def both(function: Callable, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(function(x), x, grad)

        tensor = x[0].nbytes
        with torch.no_grad():
            calls: Calls = {side: (lambda i, f=f: f(x[i])) for side, f in sides.items()}
            bench.time("softmax", named(item), calls, sets=sets, moved=2.0 * tensor)
        calls = {side: (lambda i, f=f: both(f, x[i], grad[i])) for side, f in sides.items()}
        bench.time("softmax", f"{named(item)}, with gradient", calls, sets=sets, moved=5.0 * tensor)

    bench.each(items, named, measure)


def cross_entropy(bench: Benchmark) -> None:
    items = [(BFLOAT16, columns) for columns in (32768, 131072, 4096, 1024, 256, 64)] + [(FLOAT32, 32768)]
    elements = 2**27
    if bench.dry:
        items, elements = [(FLOAT32, 70)], 210

    def named(item: tuple) -> str:
        return f"{elements // item[1]} x {item[1]} {short(item[0])}"

    def measure(item: tuple) -> None:
        dtype, columns = item
        rows = elements // columns
        sets = _measure.input_sets(elements * dtype.itemsize, bench.device)
        logits = [torch.randn(rows, columns, dtype=dtype, device=bench.device) for _ in range(sets)]
        labels = [torch.randint(columns, (rows,), device=bench.device) for _ in range(sets)]

        def both(function: Callable, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            logits = logits.detach().requires_grad_()
            return torch.autograd.grad(function(logits, labels), logits)

        sides: dict[str, Callable] = {
            "ours": partial(kernels.cross_entropy, backend="triton"),
            "library": F.cross_entropy,
            "compiled": compiled_for(bench, F.cross_entropy),
        }
        tensor = logits[0].nbytes
        with torch.no_grad():
            calls: Calls = {side: (lambda i, f=f: f(logits[i], labels[i])) for side, f in sides.items()}
            bench.time("cross_entropy", named(item), calls, sets=sets, moved=1.0 * tensor)
        calls = {side: (lambda i, f=f: both(f, logits[i], labels[i])) for side, f in sides.items()}
        bench.time("cross_entropy", f"{named(item)}, with gradient", calls, sets=sets, moved=3.0 * tensor)

    bench.each(items, named, measure)


def linear_cross_entropy(bench: Benchmark) -> None:
    """Time and peak memory of loss and gradients for a vocabulary of 128 k; the operands themselves are not counted."""
    items = [(8192, 2048, 131072), (32768, 2048, 131072), (4096, 4096, 131072)]
    if bench.dry:
        items = [(8, 6, 10)]

    def named(item: tuple) -> str:
        return "{} rows, {} features, {} classes, bfloat16".format(*item)

    def ours(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(x, weight, labels, backend="triton")

    def library(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), labels)

    def both(function: Callable, x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        values = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        return torch.autograd.grad(function(*values, labels), values)

    def measure(item: tuple) -> None:
        rows, features, classes = item
        dtype = FLOAT32 if bench.dry else BFLOAT16
        x = torch.randn(rows, features, dtype=dtype, device=bench.device)
        weight = torch.randn(classes, features, dtype=dtype, device=bench.device) / features**0.5
        labels = torch.randint(classes, (rows,), device=bench.device)
        sides: dict[str, Callable] = {"ours": ours, "library": library}
        calls: Calls = {side: (lambda i, f=f: both(f, x, weight, labels)) for side, f in sides.items()}
        bench.time("linear_cross_entropy", named(item), calls, flop=6.0 * rows * features * classes)
        peaks = {}
        for side, call in calls.items():
            if bench.dry:
                call(0)
                peaks[side] = 1.0
                continue
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call(0)
            peaks[side] = (torch.cuda.max_memory_allocated() - before) / 2**20
        bench.rows[-1]["peak_mib"] = peaks
        bench.rows[-1]["memory_of_library_over_ours"] = peaks["library"] / peaks["ours"]
        print(f"peak {peaks} MiB: {peaks['library'] / peaks['ours']:.2f} times less", flush=True)

    bench.each(items, named, measure)


def auto(bench: Benchmark) -> None:
    """That `fnn.ops` under "auto" takes the better of both at sizes that the table of this card was measured at."""
    from fnn import ops
    from triton_kernels import _tables

    card = "dry run" if bench.dry else torch.cuda.get_device_name(bench.device)
    if not _tables.covered(card):
        bench.not_reached.append(f"auto: no table of {card}; python -m triton_kernels.tune writes one")
        return

    def measure(case: tune.Case) -> None:
        inputs, call = _ops_call(case, bench.device, ops)
        functions: Calls = {s: partial(_under, ops, s, call, inputs) for s in ("auto", "triton", "torch")}
        times = _measure.interleaved(functions, bench.device, sets=len(inputs), seconds=0.2)
        auto, triton, library = (times[setting] for setting in ("auto", "triton", "torch"))
        bench.add("auto", str(case), {"ours": auto, "triton": triton, "library": library})
        better = min(triton.milliseconds, library.milliseconds)
        bench.rows[-1]["of_the_better"] = better / auto.milliseconds
        bench.rows[-1]["auto_is_the_better"] = auto.milliseconds <= (1 + NOISE) * better
        bench.rows[-1]["choice"] = str(_under(ops, "auto", partial(_explained, case, ops), inputs, 0))

    known = [case for case in (tune.TINY if bench.dry else tune.cases()) if _tabled(case, card)]
    by_operation = [[case for case in known if case.operation == operation][:6] for operation in tune.OPERATIONS]
    bench.each([case for cases in by_operation for case in cases], str, measure)


def _tabled(case: tune.Case, card: str) -> bool:
    """Whether a table of the card speaks of a case: of that operation and dtype at least, where it asks again."""
    from triton_kernels import _tables

    kinds = [kind for name, operation, kind in _tables._loaded if (name, operation) == (card, case.operation)]
    return case.layout in ("nt", "last") and any(kind.startswith(short(case.dtype)) for kind in kinds)


def _ops_call(case: tune.Case, device: torch.device, ops: Any) -> tuple[list[tuple[Tensor, ...]], Callable]:
    """Input sets of a case and what `fnn.ops` does with one of them."""
    if case.operation in ("matmul", "linear"):
        batch, m, n, k = case.sizes
        sets = _measure.input_sets((m * k + k * n) * batch * case.dtype.itemsize, device)
        a = [random_matrix(batch, m, k, case.dtype, device) for _ in range(sets)]
        weight = [random_matrix(batch, n, k, case.dtype, device) for _ in range(sets)]
        if case.operation == "linear":
            bias = torch.randn(n, dtype=case.dtype, device=device)
            return [(x, w, bias) for x, w in zip(a, weight, strict=True)], lambda args: ops.linear(
                *args, activation="gelu"
            )
        return [(x, w.mT) for x, w in zip(a, weight, strict=True)], lambda args: ops.matmul(*args)
    sets = _measure.input_sets(math.prod(case.sizes) * case.dtype.itemsize, device)
    x = [torch.randn(case.sizes, dtype=case.dtype, device=device) for _ in range(sets)]
    if case.operation == "softmax":
        return [(value,) for value in x], lambda args: ops.softmax(*args)
    labels = torch.randint(case.sizes[1], case.sizes[:1], device=device)
    return [(value, labels) for value in x], lambda args: ops.cross_entropy(*args)


def _explained(case: tune.Case, ops: Any, args: tuple[Tensor, ...]) -> object:
    options = {"activation": "gelu"} if case.operation == "linear" else {}
    return ops.explain(getattr(ops, case.operation), *args, **options)


def _under(ops: Any, setting: str, call: Callable, inputs: list[tuple[Tensor, ...]], i: int) -> object:
    with ops.use(setting):
        return call(inputs[i])


SECTIONS: tuple[tuple[Callable[[Benchmark], None], float], ...] = (  # each with its share of the time
    (correctness, 0.22),
    (copy, 0.02),
    (softmax, 0.19),
    (matmul, 0.30),
    (linear, 0.11),
    (cross_entropy, 0.06),
    (linear_cross_entropy, 0.04),
    (host, 0.01),
    (auto, 0.05),
)


def report(bench: Benchmark) -> str:
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *(f"| {' | '.join(cells(r))} |" for r in bench.rows)]
    wrong = [check["name"] for check in bench.checks if not check["right"]]
    lines += ["", f"{len(bench.checks) - len(wrong)} of {len(bench.checks)} checks right"]
    lines += [f"WRONG: {name}" for name in wrong] + [f"ERROR: {error}" for error in bench.errors]
    lines += [f"not reached: {name}" for name in bench.not_reached]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernels", action="store_true", help="measure all kernels")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--budget", type=float, default=420.0, metavar="SECONDS", help="420")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_kernels.json")
    parser.add_argument("--table", type=Path, help="a table of `python -m triton_kernels.tune` to load first")
    options = parser.parse_args()
    if not options.kernels:
        parser.error("say what to measure: --kernels")
    if options.dry_run:
        folder = Path(tempfile.mkdtemp())
        device, path, table = torch.device("cpu"), folder / "gpu_kernels.json", folder / "table.json"
        tune.tune(list(tune.TINY), device, table, "dry run", most=1)
    elif not torch.cuda.is_available():
        parser.error("no CUDA device; --dry-run does without")
    else:
        device, path, table = torch.device("cuda", torch.cuda.current_device()), options.out, options.table
    if table is not None:
        print(f"table of {kernels.load_table(table)}: {table}", flush=True)
    bench = Benchmark(device, path, options.budget)
    share = 0.0
    for section, part in SECTIONS:
        share += part
        bench.deadline = bench.started + share * options.budget
        if bench.seconds_left() < 0:
            bench.not_reached.append(f"section {section.__name__}")
            continue
        print(f"\n{section.__name__}: {bench.seconds_left():.0f} s", flush=True)
        try:
            section(bench)
        except Exception as error:
            bench.failed(f"section {section.__name__}", error)
        bench.write()
    print("\n" + report(bench))
    print(f"\n{path}: {time.perf_counter() - bench.started:.0f} s")
    return int(bool(bench.errors) or not all(check["right"] for check in bench.checks))


if __name__ == "__main__":
    sys.exit(main())
