"""Runs that torchrun starts, and what disturbs them.

FNN_KILLS=10 kills as many processes in `test_a_run_whose_processes_are_killed_ends_as_if_nothing_had_happened`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torchrun_trainer

KILLS = int(os.environ.get("FNN_KILLS", "2"))
TRAINER = Path(torchrun_trainer.__file__)


def torchrun(folder, restarts=0, limit=120, **disturbances):
    """Exit code and messages of a run that torchrun starts."""
    command = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    command += ["--master-port", str(ranks.free_port()), TRAINER, folder]
    process = subprocess.Popen(
        [str(word) for word in command] + [f"{name}={value}" for name, value in disturbances.items()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        said, _ = process.communicate(timeout=limit)
    finally:
        process.kill()
    return process.returncode, said


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What comes of a run that nothing disturbs."""
    return ranks.run(2, torchrun_trainer.main, tmp_path_factory.mktemp("undisturbed"))[0]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


def test_a_process_with_another_option_ends_all_with_a_message(tmp_path):
    started = time.monotonic()
    code, said = torchrun(tmp_path, other="lr")
    assert code == 1
    assert said.count("of the state is 0.009999999776482582 on rank 0 and 0.019999999552965164 on rank 1") >= 2
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_ends_as_if_nothing_had_happened(tmp_path, undisturbed):
    code, said = torchrun(tmp_path, restarts=KILLS, limit=60 + 60 * KILLS, kills=KILLS, seed=7)
    assert code == 0, said
    assert len((tmp_path / "kills").read_text().splitlines()) == KILLS
    assert result(tmp_path) == undisturbed
    assert "was waiting for the other processes for at most 20 s" in said  # those that were not killed


@pytest.mark.slow
def test_sigterm_ends_all_processes_after_the_same_step_and_is_saved_once(tmp_path, undisturbed):
    code, said = torchrun(tmp_path, terminate=9)
    assert code != 0
    assert f"got signal: {signal.SIGTERM.value}" in said
    broken_off = result(tmp_path)
    assert broken_off["stopped"] == "terminated"
    assert 9 < broken_off["step"] < undisturbed["step"]
    assert broken_off["rows"][-1]["step"] == broken_off["step"]
    assert checkpoints(tmp_path)[-1] == f"step_{broken_off['step']:08d}.safetensors"
    assert len(checkpoints(tmp_path)) == torchrun_trainer.KEEP
    with pytest.raises(ValueError, match=r"of a run of 2 processes, this one has 1: .*Checkpointer\(reshard=True\)"):
        torchrun_trainer.main(tmp_path)
    resumed, _ = ranks.run(2, torchrun_trainer.main, tmp_path)
    assert resumed == undisturbed
