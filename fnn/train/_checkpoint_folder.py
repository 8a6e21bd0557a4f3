"""The folder of checkpoints: what is in it, and what goes. Only rank 0 of a run calls this."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from pathlib import Path
from typing import Any

from fnn.train import _checkpoint_sharded as checkpoint_sharded
from fnn.train._checkpoint_lock import take_lock
from fnn.train._checkpoint_saved import SUFFIX, facts_or_none
from fnn.train._checkpoint_sharded import JSON

NAME = re.compile(r"step_(\d+)(?:\.safetensors|\.\d+|)")


def make(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"Checkpointer: {folder} is a file; give the name of a folder")
    folder.mkdir(parents=True, exist_ok=True)


def take(folder: Path) -> int | None:
    """Make the folder and lock it for a run."""
    try:
        make(folder)
        return take_lock(folder)
    except FileExistsError:
        raise
    except OSError as error:
        message = f"Checkpointer: cannot use the folder {folder}: {error}; give one that can be written"
        raise OSError(error.errno, message) from error


def clear_leftovers(folder: Path) -> None:
    """Delete what a process left that was killed while it wrote."""
    for leftover in folder.glob(".step_*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def files(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints, files and folders, and their steps."""
    if not folder.is_dir():
        return []
    names = ((NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return [(int(match[1]), path) for match, path in names if match and _is_checkpoint(path)]


def by_age(folder: Path) -> list[tuple[int, Path, dict[str, Any]]]:
    """Step, path and facts of the checkpoints, newest first; one whose facts cannot be read may be the newest.

    Of one step of a run there are several where a process was killed between writing one and deleting the other.
    """
    found = [(step, path, facts_or_none(path) or {}) for step, path in files(folder)]
    written = {path: path.stat().st_mtime_ns for _, path, _ in found}
    return sorted(found, key=lambda entry: (entry[2].get("run", math.inf), entry[0], written[entry[1]]), reverse=True)


def next_run(folder: Path, *, overwrite: bool) -> int:
    """The number of a new run; raises where it would take the place of one that could go on."""
    found = by_age(folder)
    if found and not found[0][2].get("finished", False) and not overwrite:
        raise FileExistsError(
            f"Checkpointer: {folder} holds an unfinished run, saved after step {found[0][0]}; go on with it "
            "(resume, or restore), choose another folder, or let it be replaced (overwrite)"
        )
    return 1 + max((facts.get("run", 0) for *_, facts in found), default=0)


def of_run(folder: Path, number: int, last: int) -> dict[int, Path]:
    """The checkpoints of a run up to a step."""
    found = reversed(by_age(folder))
    return {step: path for step, path, facts in found if facts.get("run") == number and step <= last}


def path_of(folder: Path, number: int, step: int) -> Path:
    """Where the checkpoint of a run at a step is, or was."""
    named = {n: path for n, path in files(folder)} | of_run(folder, number, step)
    return named.get(step, new_path(folder, step, parted=False))


def new_path(folder: Path, step: int, *, parted: bool) -> Path:
    """What a new checkpoint is called. A folder, unlike a file, cannot be replaced in one go: it gets a free name."""
    name, number = f"step_{step:08d}", 0
    if not parted:
        return folder / f"{name}{SUFFIX}"
    path = folder / name
    while path.exists():
        number += 1
        path = folder / f"{name}.{number}"
    return path


def prune(folder: Path, mine: dict[int, Path], best: int | None, keep: int) -> dict[int, Path]:
    """Delete all but the best and the newest checkpoints of a run, `keep` in number; those that stay."""
    others = sorted(mine.keys() - {best}, reverse=True)
    staying = {best, *others[: keep - (best in mine)]}
    for step, path in files(folder):
        if step in staying and mine.get(step, path) == path:
            continue
        with contextlib.suppress(OSError):  # what was saved is good; the next time tries again
            if path.is_file():
                path.unlink(missing_ok=True)
            elif (path / JSON).is_file():  # which a folder of somebody else has not
                checkpoint_sharded.remove(path)
    return {step: path for step, path in mine.items() if step in staying}


def _is_checkpoint(path: Path) -> bool:
    """Whether it looks like one, damaged or not; somebody else's folder may have such a name too."""
    return path.is_file() if path.suffix == SUFFIX else any((path / name).is_file() for name in (JSON, ".metadata"))
