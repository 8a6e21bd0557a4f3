"""The Jacobian studies run as a user runs them; each asserts what it shows, and writes its picture."""

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "jacobians"
STUDIES = sorted(path.stem for path in FOLDER.glob("*.py"))


def test_all_studies_are_here():
    assert STUDIES == [
        "brusselator", "hessian_spectrum", "himmelblau", "laplace", "mislabelled", "ntk", "poisson", "robot_arm",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_study(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{study}.py", "--out", str(tmp_path)])
    runpy.run_path(str(FOLDER / f"{study}.py"), run_name="__main__")
    picture = tmp_path / f"{study}.png"
    assert f"wrote {picture}" in " ".join(capsys.readouterr().out.split())
    assert picture.read_bytes().startswith(b"\x89PNG")
