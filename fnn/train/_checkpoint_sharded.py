"""One checkpoint of a state that is parted over processes: a folder that `torch.distributed.checkpoint` fills.

Each process writes what it holds. Beside that there is "checkpoint.json" with the entries "fnn.checkpoint", the facts;
"files", the size and the SHA-256 of every other file; and "sha256", the digest of this very text, taken with zeros in
the place of the digest. The folder gets its name when all of it is on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnn import _ranks
from fnn._files import flush_folder
from fnn._placement import is_parted
from fnn._ranks import everywhere
from fnn.train._checkpoint_file import CHUNK, FACTS, NO_DIGEST, DamagedError

WHO = "Checkpointer"
JSON = "checkpoint.json"

Files = dict[str, list[Any]]
"""Size and digest by name."""


def write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all; every process has to call this. Raises `OSError` on all of them.

    A tensor that is not parted is taken from rank 0.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    for name, leaf in tensors.items():
        if is_parted(leaf) and any(placed.is_partial() for placed in leaf.placements):  # type: ignore[attr-defined]
            raise ValueError(f"Checkpointer: leaf {name!r} is a sum that is not done yet; redistribute it to Replicate")
    mine = {name: leaf.detach() for name, leaf in tensors.items() if is_parted(leaf) or _ranks.rank() == 0}
    temporary = _ranks.on_main(WHO, lambda: _begin(path))
    try:
        everywhere(WHO, lambda: check_seen(temporary))
        with _writing(path), _ranks.waiting(WHO):
            planner = DefaultSavePlanner(flatten_state_dict=False)
            save(mine, storage_writer=FileSystemWriter(temporary), planner=planner)
        files = everywhere(WHO, lambda: _written(temporary, path))
        everyone = _ranks.gather(WHO, files)
        _ranks.on_main(WHO, lambda: _complete(temporary, path, everyone, facts))
    finally:
        if _ranks.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a checkpoint; what is half deleted does not look like one."""
    leaving = _temporary(path)
    path.rename(leaving)
    shutil.rmtree(leaving)


def read(path: Path) -> tuple[dict[str, Any], Files]:
    """The facts, and what to check the other files against. Raises `DamagedError`."""
    try:
        text = (path / JSON).read_text()
        whole = json.loads(text)
        digest, facts, files = whole["sha256"], dict(whole[FACTS]), dict(whole["files"])
        good = hashlib.sha256(text.replace(digest, NO_DIGEST).encode()).hexdigest() == digest
    except FileNotFoundError as error:
        raise DamagedError(f"{JSON} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{JSON} is not one of a checkpoint") from error
    if not good:
        raise DamagedError(f"the checksum of {JSON} does not fit its content")
    return facts, files


def faults(path: Path, files: Files) -> list[str]:
    """What is wrong with the files of a checkpoint, of which each process looks at its share."""
    found = []
    for name in sorted(files)[_ranks.rank() :: _ranks.count()]:
        size, digest = files[name]
        if not (path / name).is_file():
            found.append(f"{name} is missing")
        elif (path / name).stat().st_size != size:
            found.append(f"{name} has another length")
        elif _digest(path / name) != digest:
            found.append(f"the checksum of {name} does not fit its content")
    return found


def leaves(path: Path) -> dict[str, Tensor]:
    """The tensors by name, without their data: on the meta device."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        found = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # whatever unpickling raises
        raise ValueError(
            f"Checkpointer: {path} is whole, but torch {torch.__version__} cannot read it ({error}); use the version "
            "that wrote it"
        ) from error
    return {
        name: torch.empty(leaf.size, dtype=leaf.properties.dtype, device="meta")
        for name, leaf in found.items()
        if isinstance(leaf, TensorStorageMetadata)
    }


def fill(path: Path, targets: dict[str, Tensor]) -> None:
    """Read tensors into those given, by name; of a parted one what this process holds."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads for itself
        try:
            planner = DefaultLoadPlanner(flatten_state_dict=False)
            load(dict(targets), storage_reader=FileSystemReader(path), planner=planner, no_dist=True)
        except CheckpointException as error:
            raise OSError(f"Checkpointer: cannot read {path}: {_cause(error)[1]}") from error


def check_seen(path: Path) -> None:
    """Raise where this process does not see what another one sees."""
    if not path.exists():
        raise OSError(
            f"Checkpointer: rank {_ranks.rank()} does not see {path}, which another process sees; give a folder on a "
            "file system that all of them share"
        )


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def _begin(path: Path) -> Path:
    temporary = _temporary(path)
    with _writing(path):
        temporary.mkdir()
    return temporary


def _written(temporary: Path, path: Path) -> Files:
    """The files of this process."""
    with _writing(path):
        return {file.name: _entry(file) for file in temporary.glob(f"__{_ranks.rank()}_*")}


def _complete(temporary: Path, path: Path, everyone: list[Files], facts: dict[str, Any]) -> None:
    """Write down what is in the folder, and give it its name."""
    files = {name: entry for written in everyone for name, entry in written.items()}
    for name in files:
        check_seen(temporary / name)
    with _writing(path):
        files |= {file.name: _entry(file) for file in temporary.iterdir() if file.name not in files}
        text = json.dumps({FACTS: facts, "files": files, "sha256": NO_DIGEST})
        before, _, after = text.rpartition(NO_DIGEST)
        with (temporary / JSON).open("w") as file:
            file.write(before + hashlib.sha256(text.encode()).hexdigest() + after)
            file.flush()
            os.fsync(file.fileno())
        flush_folder(temporary)
        temporary.rename(path)
        flush_folder(path.parent)


def _entry(file: Path) -> list[Any]:
    return [file.stat().st_size, _digest(file)]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Gives every error of the disk the name of the checkpoint."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (OSError, CheckpointException) as error:
        where, cause = _cause(error) if isinstance(error, CheckpointException) else ("", error)
        if not isinstance(cause, Exception):  # Ctrl-C
            raise cause from error
        message = (
            f"Checkpointer: cannot write {path}: {where}{cause}. What was there before is unchanged; check that the "
            f"folder {path.parent} exists, is writable and has space"
        )
        number = getattr(cause, "errno", None)
        raise (OSError(number, message) if number else OSError(message)) from error


def _cause(error: Any) -> tuple[str, BaseException]:
    """Where something was raised first, and what."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"on rank {rank}: ", cause
