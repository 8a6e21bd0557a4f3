"""The Jacobian studies: each asserts what it shows, and writes its picture."""

import importlib
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
    monkeypatch.syspath_prepend(str(FOLDER))  # the compiler looks modules up by name
    importlib.import_module(study).main(tmp_path)
    picture = tmp_path / f"{study}.png"
    assert f"wrote {picture}" in " ".join(capsys.readouterr().out.split())
    assert picture.read_bytes().startswith(b"\x89PNG")
