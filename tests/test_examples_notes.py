"""The cookbook of the notes and Himmelblau's function: each script asserts the values that the notes give."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTES = {
    "first_steps": [],
    "workflow": [],
    "regression_to_cnn": ["digits_samples.png", "digits_curve.png", "digits_predictions.png"],
    "autograd_and_classifier": [],
    "graph_and_structure": [],
}


def imported(folder, name, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))  # the compiler looks modules up by name
    return importlib.import_module(name)


def check_picture(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5_000


def test_all_notes_are_here():
    assert sorted(NOTES) == sorted(path.stem for path in (EXAMPLES / "notes").glob("*.py"))


def test_first_steps(monkeypatch, capsys):
    imported(EXAMPLES / "notes", "first_steps", monkeypatch).main()
    assert "Epoch 5, Loss:" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("note", [note for note in NOTES if note != "first_steps"])
def test_note(note, tmp_path, monkeypatch, fast_compile):
    imported(EXAMPLES / "notes", note, monkeypatch).main(tmp_path)
    for name in NOTES[note]:
        check_picture(tmp_path / name)


@pytest.mark.slow
def test_regression_on_real_mnist(mnist_root, tmp_path, monkeypatch):
    module = imported(EXAMPLES / "notes", "regression_to_cnn", monkeypatch)
    module.handwritten_digits(tmp_path, mnist_root)
    check_picture(tmp_path / "digits_predictions.png")


@pytest.mark.slow
def test_himmelblau(tmp_path, monkeypatch, fast_compile):
    # Under a name of its own: the compiler remembers modules by name, and a Jacobian study has the same.
    spec = importlib.util.spec_from_file_location("himmelblau_by_adam", EXAMPLES / "himmelblau.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    module.main(tmp_path, steps=400, lr=0.03)
    check_picture(tmp_path / "himmelblau.png")
