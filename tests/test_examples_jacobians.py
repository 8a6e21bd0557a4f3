"""The Jacobian studies: each asserts what it shows, and writes its picture."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "jacobians"
STUDIES = sorted(path.stem for path in FOLDER.glob("*.py"))
SMALLER = {"hessian_spectrum": {"epochs": 1, "count": 5}}
INDUCTOR = "robot_arm"  # as its reader runs it; the others leave out the C++ compiler


def test_all_studies_are_here():
    assert STUDIES == [
        "brusselator", "hessian_spectrum", "himmelblau", "laplace", "mislabelled", "ntk", "poisson", "robot_arm",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_study(study, request, tmp_path, monkeypatch, capsys):
    if study != INDUCTOR:
        request.getfixturevalue("fast_compile")
    monkeypatch.syspath_prepend(str(FOLDER))  # the compiler looks modules up by name
    importlib.import_module(study).main(tmp_path, **SMALLER.get(study, {}))
    picture = tmp_path / f"{study}.png"
    assert f"wrote {picture}" in " ".join(capsys.readouterr().out.split())
    assert picture.read_bytes().startswith(b"\x89PNG")
