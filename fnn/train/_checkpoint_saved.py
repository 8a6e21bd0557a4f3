"""One checkpoint that was found good, whichever kind it is: a file, or a folder that several processes wrote."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fnn import _ranks
from fnn._ranks import everywhere
from fnn.train import _checkpoint_file as file
from fnn.train import _checkpoint_sharded as sharded
from fnn.train._checkpoint_file import DamagedError

WHO = "Checkpointer"
SUFFIX = ".safetensors"
"""What the name of a checkpoint that is a file ends with."""


@dataclasses.dataclass
class Saved:
    """A good checkpoint; its data is read when it is asked for."""

    path: Path
    facts: dict[str, Any]
    leaves: dict[str, Tensor]
    """Its tensors, without data."""

    def fill(self, targets: dict[str, Tensor]) -> None:
        """Read tensors into those given, by name; of a parted one what this process holds."""
        _kind(self.path).fill(self.path, targets)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        whole = torch.empty_like(self.leaves[name], device="cpu")
        self.fill({name: whole})
        return whole


def read(path: Path) -> Saved:
    """A checkpoint that is good and that every process can read; every process has to call this.

    Raises `DamagedError`, or `OSError` where it cannot be read, on all of them.
    """
    facts, files, fault = _ranks.on_main(WHO, lambda: _read(path))
    if fault is not None:
        raise DamagedError(fault)
    found = everywhere(WHO, lambda: _look(path, files))
    if all_found := [fault for found in _ranks.gather(WHO, found) for fault in found]:
        raise DamagedError(", ".join(all_found))
    return Saved(path, facts, everywhere(WHO, lambda: _kind(path).leaves(path)))


def facts_or_none(path: Path) -> dict[str, Any] | None:
    """The facts, where they are whole."""
    try:
        return file.read_facts(path) if _kind(path) is file else sharded.read(path)[0]
    except DamagedError:
        return None


def _read(path: Path) -> tuple[dict[str, Any], sharded.Files, str | None]:
    """The facts, what is left to check, and what is wrong."""
    try:
        return (file.read(path), {}, None) if _kind(path) is file else (*sharded.read(path), None)
    except DamagedError as error:
        return {}, {}, str(error)


def _look(path: Path, files: sharded.Files) -> list[str]:
    """What this process finds wrong."""
    sharded.check_seen(path)
    return sharded.faults(path, files)


def _kind(path: Path) -> ModuleType:
    return file if path.suffix == SUFFIX else sharded
