"""Compiled code in a folder: found again by another process, refused where it cannot be written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fnn import train
from fnn.train import _compile_cache
from fnn.train._compile_cache import leave_damaged_cache

PROGRAM = """
import json, sys, warnings
import torch
from torch._dynamo.utils import counters
from fnn import losses, nn, optim, random, train

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    train.compile_cache(sys.argv[1])
net, optimizer = nn.Linear(1), optim.adam(0.1)
params, _ = net.init(random.key(0), torch.zeros(1, 3))
step = train.make_step(lambda params, state, x, key: (net(params, x).square().mean(), (state, {})), optimizer)
train_state = train.TrainState.create(params, optimizer, random.key(1))
for _ in range(3):
    train_state, metrics = step(train_state, torch.linspace(-1, 1, 24).reshape(8, 3))
print(json.dumps({
    "weights": train_state.params["weight"].tolist(),
    "loss": float(metrics["loss"]),
    "hits": counters["inductor"]["fxgraph_cache_hit"],
    "misses": counters["inductor"]["fxgraph_cache_miss"],
    "graphs": step.graphs,
    "warnings": [str(warning.message) for warning in caught],
}))
"""


def run(folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_warm_start_is_bit_identical_and_outlives_damage(tmp_path):
    cold = run(tmp_path / "a")
    assert (cold["hits"], cold["misses"]) == (0, 1)
    (tmp_path / "a").rename(tmp_path / "b")
    warm = run(tmp_path / "b")
    assert (warm["hits"], warm["misses"]) == (1, 0)
    for path in (tmp_path / "b").rglob("*.so"):
        path.write_bytes(path.read_bytes()[:1000])  # loading this would end the process by SIGBUS
        os.utime(path, (0, 0))
    damaged = run(tmp_path / "b")
    assert damaged["warnings"]
    assert all(str(tmp_path / "b") in warning for warning in damaged["warnings"])
    for other in (warm, damaged):
        assert (other["weights"], other["loss"], other["graphs"]) == (cold["weights"], cold["loss"], 1)


def test_folder_is_made_and_used_by_both_compilers(tmp_path, monkeypatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    folder = train.compile_cache(tmp_path / "new" / "cache")
    assert folder.is_dir()
    assert folder.parent == tmp_path / "new" / "cache"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert Path(os.environ["TRITON_CACHE_DIR"]).parent == folder


def test_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"cannot write compiled code into {tmp_path / 'file'} .*; give a folder"):
        train.compile_cache(tmp_path / "file")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before"


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="this system does not say how a folder is mounted")
def test_folder_whose_files_may_not_be_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    with pytest.raises(OSError, match=f"{tmp_path} is mounted noexec; give a folder"):
        train.compile_cache(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before"


def test_library_that_another_process_deletes_first(tmp_path, monkeypatch):
    library = tmp_path / "a.so"
    library.write_bytes(b"")
    os.utime(library, (0, 0))

    def truncated(library):
        library.unlink()
        return True

    monkeypatch.setattr(_compile_cache, "_truncated", truncated)
    _compile_cache._remove_truncated(tmp_path)


def test_damage_found_while_compiling_moves_to_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    error = RuntimeError("backend failed")
    error.__cause__ = ImportError("invalid ELF header", path=str(tmp_path / "a.so"))
    with pytest.warns(RuntimeWarning, match=f"compiled code in {tmp_path} cannot be used .*a.so.*Delete {tmp_path}"):
        assert leave_damaged_cache(error)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] != str(tmp_path)
    assert not leave_damaged_cache(ImportError("No module named 'triton'"))
