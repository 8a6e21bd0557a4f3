"""One checkpoint: a safetensors file with JSON in its header and a checksum over all of it.

The header's metadata has the entries "fnn.checkpoint", the JSON, and "sha256": the digest of the file, taken with
zeros in the place of the digest. `safetensors.safe_open(path, "pt").metadata()` shows both.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fnn._files import independent, replace_file
from fnn._placement import is_parted

FACTS = "fnn.checkpoint"
NO_DIGEST = "0" * 64
PLACE = b'"sha256":"'  # inside the JSON of FACTS the quotes have backslashes, so this is found once
CHUNK = 1 << 20


class DamagedError(ValueError):
    """A file that is no whole checkpoint."""


def write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all. Raises `OSError`."""
    header = {FACTS: json.dumps(facts, separators=(",", ":")), "sha256": NO_DIGEST}

    def save(temporary: Path) -> None:
        save_file(_writable(tensors), temporary, header)
        digest, place = _digest(temporary)
        with temporary.open("r+b") as file:
            file.seek(place)
            file.write(digest.encode())

    replace_file("Checkpointer", path, save, failures=(OSError, SafetensorError))


def read(path: Path) -> dict[str, Any]:
    """The facts of a file that is whole. Raises `DamagedError`, or `OSError` where the file cannot be read."""
    facts = read_facts(path)
    digest, place = _digest(path)
    with path.open("rb") as file:
        file.seek(place)
        if file.read(len(digest)) != digest.encode():
            raise DamagedError("its checksum does not fit its content")
    try:
        leaves(path)
    except SafetensorError as error:
        raise DamagedError(str(error)) from error
    return facts


def leaves(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, without their data: on the meta device."""
    with safe_open(path, "pt") as file:  # which maps the file, so that no data is read
        mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {name: torch.empty_like(leaf, device="meta") for name, leaf in mapped.items()}


def fill(path: Path, targets: dict[str, Tensor]) -> None:
    """Read tensors into those given, by name; of a parted one what this process holds."""
    with safe_open(path, "pt") as file:
        for name, target in targets.items():
            if is_parted(target):
                (chunk,) = target.__create_chunk_list__()  # type: ignore[attr-defined]  # DTensor's, for checkpoints
                bounds = zip(chunk.offsets, chunk.sizes, strict=True)
                part = tuple(slice(start, start + length) for start, length in bounds)
                target.to_local().detach().copy_(file.get_slice(name)[part])  # type: ignore[attr-defined]
            else:
                target.copy_(file.get_tensor(name))


def read_facts(path: Path) -> dict[str, Any]:
    """The facts alone, without a look at the rest of the file."""
    try:
        facts = json.loads(json.loads(_header(path))["__metadata__"][FACTS])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError("its header is not one of a checkpoint") from error
    if not isinstance(facts, dict):
        raise DamagedError("its header is not one of a checkpoint")
    return facts


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > os.fstat(file.fileno()).st_size:
            raise DamagedError("it is cut short")
        return file.read(size)


def _writable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as the format wants them."""
    for name, leaf in tensors.items():
        if leaf.dtype == torch.complex128:
            raise ValueError(f"Checkpointer: leaf {name!r} is complex128, which safetensors lacks; make it complex64")
    return independent({name: leaf.detach().contiguous() for name, leaf in tensors.items()})


def _digest(path: Path) -> tuple[str, int]:
    """The digest of a file, and where in the file it belongs."""
    header = _header(path)
    place = header.find(PLACE)
    if place < 0:
        raise DamagedError("its header has no checksum")
    place += 8 + len(PLACE)
    digest, seen = hashlib.sha256(), 0
    for chunk in _chunks(path):
        start, stop = max(place - seen, 0), min(place + len(NO_DIGEST) - seen, len(chunk))
        if start < stop:
            chunk = chunk[:start] + b"0" * (stop - start) + chunk[stop:]
        digest.update(chunk)
        seen += len(chunk)
    return digest.hexdigest(), place


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
