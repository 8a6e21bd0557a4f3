"""Fixtures shared by the tests."""

import functools
import gc
from pathlib import Path

import pytest
import torch

MNIST = Path(__file__).parents[1] / ".." / "shared" / "data"


def pytest_collection_finish(session):
    """What is imported by now stays; a collector that walks it at every turn is a tenth of each compilation."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Each test compiles for itself: what an earlier one compiled must not count."""
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _no_process_group():
    """A group that a test makes in this process ends with it: modules such as torch's SyncBatchNorm look for one."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def fast_compile(monkeypatch):
    """Trace and differentiate as `torch.compile` does, but leave out Inductor's C++ compiler (seconds a graph)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def trace_only(monkeypatch):
    """What Dynamo decides: what it can trace, and when it does so again. What it traced then runs eagerly."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.fixture
def mnist_root():
    """The folder of real MNIST files beside the project, where there is one."""
    if not (MNIST / "MNIST" / "raw").is_dir():
        pytest.skip("no MNIST files in ../shared/data")
    return MNIST
