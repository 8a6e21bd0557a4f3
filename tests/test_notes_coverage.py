"""Every row of the notes is shown by a test or a cookbook section that exists, and the page lists them."""

import pytest
from notes_coverage import PAGE, gaps, main, render
from notes_rows import NOTES, Row


def test_every_row_is_shown():
    assert not gaps()
    assert [len(rows) for rows in NOTES.values()] == [7, 10, 17, 7, 13]


def test_the_page_is_what_the_script_writes():
    assert PAGE.read_text() == render()
    assert all(row.taught in render() for rows in NOTES.values() for row in rows)


@pytest.mark.parametrize(
    ("evidence", "why"),
    [
        ("tests/test_nowhere.py::test_x", "there is no tests/test_nowhere.py"),
        ("tests/test_tree.py::test_that_nobody_wrote", "has no function test_that_nobody_wrote"),
        ("tests/notes_coverage.py::render", "is no test"),
        ("examples/notes/first_steps.py::no_section", "has no function no_section"),
        ("examples/notes/first_steps.py::main", "asserts nothing"),
        ("docs/notes.md#no-such-heading", "has no heading #no-such-heading"),
    ],
)
def test_missing_evidence_is_found(evidence, why):
    shown = "tests/test_notes_coverage.py::test_missing_evidence_is_found"
    (gap,) = gaps({"a note": (Row("a thing", "its form", (shown, evidence)),)})
    assert gap.startswith("a note: a thing: ")
    assert why in gap


def test_a_row_without_evidence_and_sections_that_prove_nothing_are_found(tmp_path):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "script.py").write_text(
        "def proves():\n    assert 1 == 1\n\n\ndef idle():\n    assert 1 == 1\n\n\ndef main():\n    proves()\n"
    )

    def found(*evidence):
        return gaps({"a note": (Row("a thing", "its form", evidence),)}, tmp_path)

    assert found("examples/script.py::proves") == []
    assert found("examples/script.py::idle") == ["a note: a thing: main in examples/script.py does not call idle"]
    assert found() == ["a note: a thing: nothing shows it"]


def test_an_old_page_fails(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["notes_coverage.py"])
    assert main() == 0
    monkeypatch.setitem(NOTES, "a made-up note", (Row("a thing", "its form", ("tests/test_tree.py::test_gone",)),))
    assert main() == 1
    printed = capsys.readouterr().out
    assert "a made-up note: a thing: tests/test_tree.py has no function test_gone" in printed
    assert "docs/coverage.md is not what this script writes" in printed
