"""`fnn doctor`: every check, as a table or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from typing import TextIO

import torch

from fnn.cli import _compiler, _machine, _packages, _settings, _torch
from fnn.cli._finding import Finding

STATUSES = ("ok", "warn", "fail")
COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def run(given: argparse.Namespace) -> int:
    print("checking, which compiles a small function ...", file=sys.stderr)
    found = [check(name, function) for name, function in checks().items()]
    worst = max((finding.status for finding in found), key=STATUSES.index)
    if given.json:
        report = {"status": worst, "findings": [dataclasses.asdict(finding) for finding in found]}
        print(json.dumps(report, indent=2))
    else:
        show(found, sys.stdout)
    return 1 if worst == "fail" else 0


def checks() -> dict[str, Callable[[], Finding]]:
    """All checks in their order, by name; the one that compiles comes after those that explain why it might not."""
    return {
        "versions": _torch.versions,
        "accelerator": _torch.accelerator,
        "Triton": _torch.triton,
        "processor": _machine.processor,
        "threads": _machine.threads,
        "memory": _machine.memory,
        "shared memory": _machine.shared_memory,
        "temporary files": _machine.temporary_folder,
        "torch.compile's cache": _machine.inductor_cache,
        **({"Triton's cache": _machine.triton_cache} if torch.cuda.is_available() else {}),
        "C++ compiler": _compiler.compiler,
        "torch.compile": _compiler.compiled_function,
        "precision": _settings.precision,
        "reproducibility": _settings.determinism,
        "kernels": _settings.kernels,
        **_packages.checks(),
    }


def check(name: str, function: Callable[[], Finding]) -> Finding:
    """What a check finds; one that breaks on a strange machine is a finding, too, and the others go on."""
    try:
        return function()
    except Exception as error:
        return Finding(name, "warn", f"could not be checked: {type(error).__name__}: {error}")


def show(found: Iterable[Finding], file: TextIO) -> None:
    """A table in a terminal, plain lines elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = list(found)
    bad = sum(finding.status == "fail" for finding in found)
    slow = sum(finding.status == "warn" for finding in found)
    counts = ((bad, "to mend"), (slow, "slower or missing"))
    verdict = ", ".join(f"{count} {what}" for count, what in counts if count) or "all is well"
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        for finding in found:
            file.write(f"{finding.status:5} {finding.name}: {finding.text}\n")
            if finding.cure:
                file.write(f"      -> {finding.cure}\n")
        file.write(f"{verdict}\n")
        return
    table = Table(header_style="bold", pad_edge=False)
    for heading in ("", "check", "found", "cure"):
        table.add_column(heading, overflow="fold")
    for finding in found:
        status = Text(finding.status, COLOURS[finding.status])
        table.add_row(status, finding.name, Text(finding.text), Text(finding.cure))
    console.print(table)
    console.print(verdict)
