"""A run that is killed at random moments ends as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_thirty_kills_leave_no_trace(tmp_path):
    script = Path(__file__).with_name("killed_run.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, "30", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["killed"] >= 20  # the others came after the end
    assert len(set(result["reached"])) >= 8  # it had got somewhere in between
    assert result["found"] == result["expected"]
