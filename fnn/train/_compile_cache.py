"""Compiled code kept in a folder of one's own, and what the compiler looks up anew in each process."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import tempfile
import threading
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fnn import tree


def compile_cache(folder: str | os.PathLike[str]) -> Path:
    """From now on, compile into `folder` and take from there what an earlier process compiled; returns the subfolder.

    Without it the compiler keeps its files in the system's temporary folder, which a container or a restart empties.
    Call it before the first step. There is a subfolder for each version of torch and processor, since machine code of
    one processor may end the process on another. To start warm elsewhere, copy the folder to a machine of that kind;
    delete it to start anew. Use only a folder that you trust: what lies in it is executed. A library in it that a full
    disk or a power cut has truncated is deleted, with a warning, and compiled again.

    Raises `OSError` where the folder cannot be written, or its file system forbids to run what lies in it (noexec).

    Example:
        >>> from fnn import train
        >>> folder = train.compile_cache("out/compiled")  # doctest: +SKIP
    """
    kind = hashlib.sha256(_processor().encode()).hexdigest()[:8]
    inside = Path(folder).absolute() / f"torch{torch.__version__}-{platform.machine()}-{kind}"
    try:
        inside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=inside):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(
            error.errno,
            f"compile_cache: cannot write compiled code into {folder} ({reason}); give a folder that can be written",
        ) from None
    if hasattr(os, "ST_NOEXEC") and os.statvfs(inside).f_flag & os.ST_NOEXEC:
        raise OSError(errno.ENOEXEC, f"compile_cache: {folder} is mounted noexec; give a folder whose files may be run")
    _remove_truncated(inside)
    # Both are read at each look-up; Triton's own kernels, which Inductor does not see, follow the second.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(inside)
    os.environ["TRITON_CACHE_DIR"] = str(inside / "triton")
    return inside


def _remove_truncated(folder: Path) -> None:
    """Delete libraries that were not written to their end: loading one ends the process by a signal."""
    for library in folder.rglob("*.so"):
        with contextlib.suppress(FileNotFoundError):  # another process may delete it at the same time
            if time.time() - library.stat().st_mtime > 60 and _truncated(library):  # a younger one may be being written
                library.unlink()
                warnings.warn(f"{library} was truncated; it is compiled again", RuntimeWarning, stacklevel=3)


def _truncated(library: Path) -> bool:
    """Whether an ELF file ends before its table of sections, which linkers write last."""
    with open(library, "rb") as file:
        header, size = file.read(64), file.seek(0, os.SEEK_END)
    if len(header) < 64:
        return True
    if header[:6] != b"\x7fELF\x02\x01":  # another system's format, or not 64 bits, little-endian
        return False
    start, entry, count = (int.from_bytes(header[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    return start + entry * count > size


def leave_damaged_cache(error: BaseException) -> bool:
    """Whether compiling failed on a damaged file of the cache; if so, warns, and a fresh folder serves this process."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    cause: BaseException | None = error
    while cause is not None and not (folder and folder in _where(cause)):
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
    if cause is None:
        return False
    where = _where(cause)
    from torch._inductor.utils import clear_caches

    clear_caches()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = fresh = tempfile.mkdtemp(prefix="fnn-compiled-")
    warnings.warn(
        f"the compiled code in {folder} cannot be used ({type(cause).__name__}: {where}); compiling anew in {fresh}. "
        f"Delete {folder} to be rid of this warning",
        RuntimeWarning,
        stacklevel=5,
    )
    return True


def _where(error: BaseException) -> str:
    """The file that an error is about, or what it says where it could not load one; otherwise nothing."""
    if isinstance(error, ImportError | SyntaxError | EOFError | OSError):
        return getattr(error, "filename", None) or getattr(error, "path", None) or str(error)
    return next((line for line in str(error).splitlines() if "Failed to import" in line), "")


def _processor() -> str:
    """Its name and instruction sets."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
        found = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
        if found:
            return "\n".join(found)
    return platform.processor() or platform.machine()


def look_up_early(values: Any) -> None:
    """Begin, beside tracing, what the compiler looks up once a process before it can use a cached graph.

    On a CPU it tries each instruction set in a process of its own, 1 to 2 s in all, which then costs no time where
    there is a second core. What fails here fails again, with its message, where the compiler needs it.
    """
    if any(leaf.device.type == "cpu" for leaf in tree.leaves(values)):
        _start_look_up()


@cache
def _start_look_up() -> None:
    # Imported here and not in the thread: two threads must not import parts of one package at once.
    from torch._inductor import codecache, compile_fx, cpu_vec_isa  # noqa: F401

    def look_up() -> None:
        with contextlib.suppress(Exception):
            cpu_vec_isa.pick_vec_isa()
            codecache.CacheBase.get_system()
            codecache.torch_key()

    threading.Thread(target=look_up, name="fnn compiler look-up", daemon=True).start()
