"""The README, the guide and the docstrings' examples run as they stand."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
import textwrap
import types
from pathlib import Path

import pytest
import torch

import fnn
import triton_kernels

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md") if "```python" in page.read_text())


@pytest.mark.parametrize("page", PAGES)
def test_page(page, fast_compile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a page writes its files
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(textwrap.dedent(block), page, "exec"), names)


def test_the_readme_example_has_at_most_25_lines_and_learns(fast_compile, capsys):
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(example.splitlines()) <= 25
    exec(compile(example, "README.md", "exec"), {})
    accuracy = float(re.search(r"'accuracy': ([\d.]+)", capsys.readouterr().out)[1])
    assert accuracy > 0.95


def test_the_tables_are_what_the_benchmarks_wrote():
    report = load("benchmarks/report.py")
    assert "LeNet" in report.readme()
    assert report.readme() in (ROOT / "README.md").read_text()
    assert report.page() == (ROOT / "docs" / "performance.md").read_text()


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_a_docstring():
    pytest.importorskip("griffe", reason="the docs extra is not installed")
    hooks = load("docs/hooks.py")
    assert [path for name in hooks.PACKAGES for path in hooks.undocumented(importlib.import_module(name))] == []
    stray = types.ModuleType("stray")
    stray.nn = stray.Linear = type("Linear", (), {"__module__": "fnn.nn", "apply": lambda self: None})
    assert hooks.undocumented(stray) == ["stray.nn", "stray.Linear"]


def modules():
    packages = (fnn, triton_kernels)
    inner = [m.name for p in packages for m in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")]
    return [*(p.__name__ for p in packages), *inner]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    torch.set_printoptions(profile="default")
    failures, _ = doctest.testmod(
        importlib.import_module(name), extraglobs={"torch": torch, "fnn": fnn}, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert failures == 0
