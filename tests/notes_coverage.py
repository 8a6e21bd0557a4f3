"""Whether everything that the five notes teach is shown by a test or a cookbook section; the table is notes_rows.py.

    python tests/notes_coverage.py            # fails, with a list, where evidence is missing or docs/coverage.md is old
    python tests/notes_coverage.py --write    # writes docs/coverage.md

Evidence is a test (``tests/test_x.py::test_name``), a section of a cookbook script, which asserts something and is
called by its `main` (``examples/notes/x.py::section``), a function of a benchmark, or a heading of a page
(``docs/notes.md#heading``).
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path

from notes_rows import NOTES, Row

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "coverage.md"


def missing(evidence: str, root: Path = ROOT) -> str | None:
    """What is wrong with a piece of evidence, None where it is there."""
    if "#" in evidence:
        file, _, heading = evidence.partition("#")
        if not (root / file).is_file():
            return f"there is no {file}"
        headings = re.findall(r"^#+ (.*)$", (root / file).read_text(), re.MULTILINE)
        return None if heading in map(slug, headings) else f"{file} has no heading #{heading}"
    file, _, name = evidence.partition("::")
    if not (root / file).is_file():
        return f"there is no {file}"
    functions = functions_of(root / file)
    if name not in functions:
        return f"{file} has no function {name}"
    if file.startswith("examples/"):
        if not asserts(functions[name]):
            return f"{name} in {file} asserts nothing"
        if name != "main" and not calls(functions.get("main"), name):
            return f"main in {file} does not call {name}"
    elif file.startswith("tests/") and not name.startswith("test_"):
        return f"{name} in {file} is no test"
    return None


def slug(heading: str) -> str:
    """The anchor of a heading, as MkDocs makes it."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@cache
def functions_of(file: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


def called(function: ast.AST) -> set[str]:
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return {f.attr if isinstance(f, ast.Attribute) else f.id for f in calls if isinstance(f, ast.Attribute | ast.Name)}


def asserts(function: ast.AST) -> bool:
    return any(isinstance(node, ast.Assert) for node in ast.walk(function)) or "assert_close" in called(function)


def calls(function: ast.AST | None, name: str) -> bool:
    return function is not None and name in called(function)


def gaps(notes: dict[str, tuple[Row, ...]] = NOTES, root: Path = ROOT) -> list[str]:
    """Every row without evidence and every piece of evidence that is not there."""
    found = []
    for note, rows in notes.items():
        for row in rows:
            if not row.evidence:
                found.append(f"{note}: {row.taught}: nothing shows it")
            found += [f"{note}: {row.taught}: {why}" for why in (missing(e, root) for e in row.evidence) if why]
    return found


def render(notes: dict[str, tuple[Row, ...]] = NOTES) -> str:
    lines = [
        "# Coverage of the notes",
        "",
        "<!-- written by tests/notes_coverage.py: change notes_rows.py, then run it with --write -->",
        "",
        f"The five notes teach {sum(map(len, notes.values()))} things. For each, what it is here, and the tests and",
        "cookbook sections that show it; a test fails where one of them is gone. A cookbook section is a function of a",
        "script in `examples/notes` that asserts the values of the note. [Line by line](notes.md) has the code.",
    ]
    for note, rows in notes.items():
        lines += ["", f"## {note}", "", "| in the note | here | shown by |", "|---|---|---|"]
        for row in rows:
            lines.append(f"| {row.taught} | {row.here} | {'<br>'.join(f'`{e}`' for e in row.evidence)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    found = gaps()
    if "--write" in sys.argv[1:]:
        PAGE.write_text(render())
    elif not PAGE.is_file() or PAGE.read_text() != render():
        found.append(f"{PAGE.relative_to(ROOT)} is not what this script writes; run it with --write")
    print("\n".join(found) or f"{sum(map(len, NOTES.values()))} rows, all of them shown")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
