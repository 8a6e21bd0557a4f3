"""What the tuner and the benchmarks measure with: operands, errors against float64, and times taken in turns."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE_MILLISECONDS = 1.0  # a sample is as many calls as take this long
GRAPH_MILLISECONDS = 1.0  # calls shorter than this are replayed from a CUDA graph, without Python's part
MAX_CALLS = 64  # of one sample, and the most input sets
CACHES = 3  # the input sets together are this many times the size of the L2 cache


class Timing(NamedTuple):
    """Milliseconds of a call: the median and the 20 % and 80 % quantiles; whether a CUDA graph was replayed."""

    milliseconds: float
    low: float
    high: float
    graph: bool


def interleaved(
    functions: Mapping[str, Callable[[int], object]],
    device: torch.device,
    *,
    sets: int = 1,
    seconds: float = 0.2,
    rounds: tuple[int, int] = (5, 50),
) -> dict[str, Timing]:
    """The time of each function, one sample of each in turn so that all meet the same clocks and temperature.

    functions: each takes the number of an input set, 0 .. sets - 1, and is given these in rotation.
    seconds: of sampling in all; rounds: at least and at most this many samples of each.
    """
    if device.type == "cuda":
        runs, calls, graph = _on_cuda(functions, sets)
        sample = _sample_cuda
    else:
        runs, calls, graph = {name: partial(f, 0) for name, f in functions.items()}, dict.fromkeys(functions, 1), False
        sample, rounds = _sample_cpu, (2, 2)
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for done in range(rounds[1]):
        if done >= rounds[0] and time.perf_counter() > end:
            break
        for name, run in runs.items():
            times[name].append(sample(run) / calls[name])
    return {name: _timing(values, graph) for name, values in times.items()}


def _on_cuda(
    functions: Mapping[str, Callable[[int], object]], sets: int
) -> tuple[Mapping[str, Callable[[], object]], dict[str, int], bool]:
    """What to run for one sample of each function, how many calls that is, and whether it replays a graph."""
    calls, runs, short = {}, {}, True
    for name, function in functions.items():
        for i in range(min(2, sets)):  # compiles, and fills the allocator
            function(i)
        estimate = _sample_cuda(partial(function, 0))
        calls[name] = min(MAX_CALLS, max(sets, math.ceil(SAMPLE_MILLISECONDS / max(estimate, 1e-3))))
        short &= estimate < GRAPH_MILLISECONDS

        def run(function=function, calls=calls[name]):
            for i in range(calls):
                function(i % sets)

        runs[name] = run
    if short:
        graphs = {name: graph for name, run in runs.items() if (graph := _captured(run)) is not None}
        if len(graphs) == len(runs):  # all or none: a graph of one side only would be unfair
            return graphs, calls, True
    return runs, calls, False


def _captured(run: Callable[[], object]) -> Callable[[], object] | None:
    """`run` as a CUDA graph, or None where it cannot be captured."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    collects = gc.isenabled()
    gc.disable()  # an old graph that is freed during a capture breaks it
    try:
        with torch.cuda.stream(stream):
            run()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        graph.replay()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    finally:
        if collects:
            gc.enable()
    return graph.replay


def _sample_cuda(run: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def _sample_cpu(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def _timing(values: list[float], graph: bool) -> Timing:
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    return Timing(median.item(), low.item(), high.item(), graph)


def side_by_side(calls: Iterable[Callable[[], object]], device: torch.device, deadline: float = math.inf) -> None:
    """Makes the calls in threads, so that all cores compile kernels. What one raises is left to the call that counts.

    deadline: by `time.perf_counter`, after which no further call is begun.
    """
    if device.type != "cuda":
        return

    def call(function: Callable[[], object]) -> None:
        if time.perf_counter() < deadline:
            torch.cuda.set_device(device)
            with suppress(Exception):
                function()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(call, calls))
    torch.cuda.synchronize()


def input_sets(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs to rotate, so that none is in the L2 cache when its turn comes."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_CALLS, math.ceil(CACHES * cache / bytes_of_one)))


def random_matrix(
    batch: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device, *, transposed: bool = False
) -> Tensor:
    """Fresh standard normal values, (rows, columns) or (batch, rows, columns) for a batch above 1."""
    sizes = (columns, rows) if transposed else (rows, columns)
    values = torch.randn(*([batch] if batch > 1 else []), *sizes, dtype=dtype, device=device)
    return values.mT if transposed else values


def poison(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> None:
    """Leaves NaN in the memory that the allocator will most likely give to the next tensor of this size."""
    torch.full(tuple(shape), math.nan, dtype=dtype, device=device)


def relative_error(found: Tensor, reference: Tensor) -> float:
    """The Frobenius norm of the difference over that of the reference; infinite where it is NaN."""
    if found.shape != reference.shape:
        raise AssertionError(f"expected shape {tuple(reference.shape)}, got {tuple(found.shape)}")
    error = ((found.to(reference.dtype) - reference).norm() / reference.norm()).item()
    return error if error == error else math.inf


def tolerance(dtype: torch.dtype, precision: str = "ieee") -> float:
    """The relative error that a right result stays under: several times what rounding makes."""
    if dtype == torch.float32:
        return {"ieee": 1e-5, "tf32": 2e-3, "bf16x3": 1e-4}[precision]
    return {torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


@contextmanager
def library_computes(precision: str) -> Iterator[None]:
    """Has cuBLAS multiply float32 in tf32 where that is the precision, else exactly."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
