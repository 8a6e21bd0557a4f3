"""`Record`: what a run is and what became of it, as a JSON file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fnn import _ranks
from fnn._files import replace_file
from fnn.train._callback import Callback, Run


class Record(Callback):
    """Write a JSON file with the options of a run and its status: "running", "failed", or what `write` says.

    path: the file; it is written whole or not at all
    config: a dataclass or a mapping; what JSON does not know becomes a string
    facts: more entries

    As a callback it writes "running" once the run has its folder, and "failed" with the error where one ends it; what
    came of a run that ended otherwise is told by `write`. Of several processes rank 0 alone writes; all ask it for the
    `status`.

    Example:
        >>> import tempfile
        >>> record = Record(tempfile.mkdtemp() + "/config.json", {"lr": 0.1}, classes=["cat", "dog"])
        >>> record.status() is None
        True
        >>> record.write("finished", accuracy=0.9)
        >>> record.status()
        'finished'
    """

    main_only = True

    def __init__(self, path: str | os.PathLike[str], config: Any, **facts: Any):
        if not isinstance(config, Mapping):
            config = dataclasses.asdict(config)
        self.path, self.facts = Path(path), {"config": dict(config), **facts}

    def start(self, run: Run) -> None:
        self.write("running")

    def end(self, run: Run) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            with contextlib.suppress(OSError):  # a full disk is the error already
                self.write("failed", error=str(error))

    def status(self) -> str | None:
        """What the file says now; None where there is none. Every process has to call this."""

        def read() -> str | None:
            return json.loads(self.path.read_text()).get("status") if self.path.is_file() else None

        return _ranks.on_main("Record.status", read)

    def write(self, status: str, **facts: Any) -> None:
        """Replace the file. Raises `OSError` that names it where it cannot be written."""
        if not _ranks.is_main():
            return
        text = json.dumps({**self.facts, "status": status, **facts}, indent=2, default=str) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file("Record", self.path, lambda temporary: temporary.write_text(text))
