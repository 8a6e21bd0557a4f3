"""Files that are written whole or not at all, and what their writers ask for."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from torch import Tensor


def replace_file(
    who: str,
    path: str | os.PathLike[str],
    write: Callable[[Path], object],
    failures: tuple[type[Exception], ...] = (OSError,),
) -> None:
    """Have `write(temporary)` make a file beside `path`, flush it to disk, and rename it to `path`.

    Whatever interrupts this leaves the file that was there before as it was. A link is followed, and the permissions
    of the file that was there are kept.

    Raises OSError that names `who` and the file, for `failures` of `write`.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise IsADirectoryError(f"{who}: {path} is a folder or a device; give the name of a file")
    temporary = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.touch(exist_ok=False)  # an unwritable folder shows here, as the OSError that it is
        mode = (path if path.exists() else temporary).stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # writers may make files that only their owner can read
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except failures as error:
        message = (
            f"{who}: cannot write {path}: {error}. What was there before is unchanged; "
            f"check that the folder {path.parent} exists, is writable and has space"
        )
        number = getattr(error, "errno", None)
        raise (OSError(number, message) if number else OSError(message)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    flush_folder(path.parent)


def independent(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same leaves, no two of them in one storage: safetensors' writer refuses shared memory."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, leaf in leaves.items():
        storage = leaf.untyped_storage().data_ptr()
        apart[name] = leaf.clone() if storage in seen else leaf
        seen.add(storage)
    return apart


def check_readable(who: str, path: str | os.PathLike[str]) -> Path:
    """`path`, after a look at whether it can be opened: readers themselves call every file missing, or damaged."""
    path = Path(path)
    try:
        path.open("rb").close()
    except OSError as error:
        message = f"{who}: cannot read {path.absolute()}: {error.strerror}; give the path of a file"
        raise OSError(error.errno, message) from error
    return path


def flush_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system lets a folder be flushed."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
