"""`fnn.tune_cpu`, by the page faults of processes that call it and that do not."""

import os
import subprocess
import sys

import pytest
import torch

import fnn

PROGRAM = """
import resource
import sys

import torch

import fnn

print(fnn.tune_cpu() if "tuned" in sys.argv else None)
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(6 * 2**20)  # 24 MiB
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(*arguments):
    """What `tune_cpu` returned, and the page faults of each block in turn."""
    plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    returned, *faults = done.stdout.split()
    return returned, [int(count) for count in faults]


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_freed_blocks_are_kept_where_it_says_so():
    returned, faults = run("tuned")
    if returned == "False":
        pytest.skip("not glibc")
    assert returned == "True"
    assert min(faults) < 100
    # glibc adapts by itself once the first block is freed, so it is the second that is fetched anew.
    assert run()[1][1] > 1000


@pytest.mark.parametrize("name", ["MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_sets_is_left_alone(name, monkeypatch):
    monkeypatch.setattr(torch, "empty", None)  # what is freed to raise the thresholds is not even made
    monkeypatch.setenv(name, "glibc.malloc.trim_threshold=131072" if name == "GLIBC_TUNABLES" else "131072")
    assert fnn.tune_cpu() is False
