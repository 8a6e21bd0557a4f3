"""Checks of the machine: processor, threads, memory, and the folders that compilers write to."""

from __future__ import annotations

import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from fnn.cli._finding import Finding

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
CPU_INFO = Path("/proc/cpuinfo")
MEMORY_INFO = Path("/proc/meminfo")
SHARED_MEMORY = Path("/dev/shm")

FULL = 32 * 2**20  # a compiled step's files, with its C++ headers, take some MB
LITTLE_DISK = 2**30
LITTLE_MEMORY = 2 * 2**30
LITTLE_SHARED_MEMORY = 2**28


def processor() -> Finding:
    """Model, cores and the vector instructions that torch's kernels use."""
    flags = _fields(CPU_INFO).get("flags", "").split()
    capability = torch.backends.cpu.get_cpu_capability()
    there = [name for name, flag in (("AVX2", "avx2"), ("AVX512", "avx512f"), ("AMX", "amx_tile")) if flag in flags]
    text = f"{model()}, {os.cpu_count()} cores; torch's kernels use {capability}"
    if there:
        text += f" (the processor has {', '.join(there)})"
    if capability in ("DEFAULT", "NO AVX") and "ATEN_CPU_CAPABILITY" in os.environ:
        return Finding("processor", "warn", text, "unset ATEN_CPU_CAPABILITY, which turns vector instructions off")
    if capability == "NO AVX" or (capability == "DEFAULT" and flags):
        return Finding("processor", "warn", text, "without AVX2 everything is several times slower: another machine")
    return Finding("processor", "ok", text)


def model() -> str:
    """The processor's name."""
    return _fields(CPU_INFO).get("model name") or platform.processor() or platform.machine()


def threads() -> Finding:
    """Torch's threads against the cores that this process may use."""
    cores, count = usable_cores(), torch.get_num_threads()
    text = f"{count} for {cores:g} usable core{'' if cores == 1 else 's'}"
    names = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    text += f" ({', '.join(names)})" if names else ""
    whole = max(1, math.floor(cores))
    if count > math.ceil(cores):
        cure = f"OMP_NUM_THREADS={whole}: threads that share a core wait for each other at every operation"
        return Finding("threads", "warn", text, cure)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 1.5 * cores + 0.5 and count > 1:
        cure = "OMP_NUM_THREADS=1 until the other processes have ended: threads wait for those that are put aside"
        return Finding("threads", "warn", f"{text}; the cores are busy (load {load:.1f})", cure)
    if count < whole:
        return Finding("threads", "ok", text, f"OMP_NUM_THREADS={whole} would use all cores")
    return Finding("threads", "ok", text)


def usable_cores() -> float:
    """The cores this process may run on: its affinity, and the share that a container allows, which may be a part."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    for line in _limits("cpu.max"):
        quota, _, period = line.partition(" ")
        if quota != "max":
            cores = min(cores, int(quota) / int(period or 100_000))
    return cores


def memory() -> Finding:
    """Memory that is free, within what a container allows."""
    if not MEMORY_INFO.exists():
        return Finding("memory", "ok", "not known on this system")
    info = {name: int(value.split()[0]) * 1024 for name, value in _fields(MEMORY_INFO).items() if "kB" in value}
    total, free = info.get("MemTotal", 0), info.get("MemAvailable", 0)
    text = ""
    for limit, used in zip(_limits("memory.max"), _limits("memory.current"), strict=False):
        if limit != "max" and int(limit) < total:
            total, text = int(limit), " (the container's limit)"
            free = min(free, total - int(used))
    text = f"{_size(free)} free of {_size(total)}{text}"
    if free < LITTLE_MEMORY:
        return Finding(
            "memory", "warn", text, "compiling takes 1 to 2 GB; end other programs, or TORCHINDUCTOR_COMPILE_THREADS=1"
        )
    return Finding("memory", "ok", text)


def shared_memory() -> Finding:
    """Where worker processes put the batches that they hand over; containers have 64 MB unless told otherwise."""
    if not SHARED_MEMORY.is_dir():
        return Finding("shared memory", "ok", "none of its own on this system")
    free = shutil.disk_usage(SHARED_MEMORY).free
    text = f"{SHARED_MEMORY}: {_size(free)} free"
    if free < LITTLE_SHARED_MEMORY:
        cure = "docker run --shm-size=2g; or no worker processes for the loader"
        return Finding("shared memory", "warn", f"{text}; a loader's workers need more", cure)
    return Finding("shared memory", "ok", text)


def temporary_folder() -> Finding:
    """Where compilers, and Inductor's cache by default, write."""
    try:
        path = tempfile.gettempdir()
    except OSError as error:
        return Finding("temporary files", "fail", str(error), "set TMPDIR to a folder that you may write to")
    given = os.environ.get("TMPDIR")
    if given and os.path.abspath(given) != os.path.abspath(path):  # Python and g++ pass over it, other programs fail
        text = f"TMPDIR={given} is no folder that can be written to; they are in {path}"
        return Finding("temporary files", "warn", text, f"mkdir -p {given}, or unset TMPDIR")
    return folder("temporary files", Path(path), "TMPDIR")


def inductor_cache() -> Finding:
    """Where torch.compile keeps what it compiled, for the next process."""
    name, variable = "torch.compile's cache", "TORCHINDUCTOR_CACHE_DIR"
    if variable in os.environ:
        return folder(name, Path(os.environ[variable]), variable)
    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # the import makes the folder

        return folder(name, Path(default_cache_dir()), variable)
    except (KeyError, OSError) as error:  # no name for the user's number, or no place for the folder
        return Finding(name, "fail", f"no folder: {error!r}", f"set {variable} to a folder that you may write to")


def triton_cache() -> Finding:
    """Where Triton keeps the kernels of `triton_kernels`."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    path = os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")
    return folder("Triton's cache", Path(path), "TRITON_CACHE_DIR")


def folder(name: str, path: Path, variable: str) -> Finding:
    """Whether a folder, which may be yet to be made, can be written to and has room; nothing is left behind."""
    there = path.absolute()
    while not os.path.exists(there):
        there = there.parent
    move = f"set {variable} to a folder that you may write to"
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0" * 2**16)
            file.flush()
    except OSError as error:
        return Finding(name, "fail", f"{path}: cannot write: {error.strerror or error}", move)
    free = shutil.disk_usage(there).free
    held = _held(path) if path.is_dir() and variable != "TMPDIR" else 0
    text = f"{path}: {_size(held)}, {_size(free)} free" if held else f"{path}: {_size(free)} free"
    if free < FULL:
        return Finding(name, "fail", text, f"the disk is full: free some of it, or {move}")
    if free < LITTLE_DISK:
        return Finding(name, "warn", text, f"little room: free some of it, or {move}")
    return Finding(name, "ok", text)


def _held(path: Path) -> int:
    """Bytes of the files in a folder, without those that vanish meanwhile."""
    total = 0
    for where, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except OSError:
                continue
    return total


def _limits(name: str) -> Iterator[str]:
    """A setting of the control group of this process, and of those that it is in, where there are any."""
    try:
        groups = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return
    own = next((line[3:] for line in groups if line.startswith("0::")), "/").lstrip("/")
    for group in (CGROUPS / own, *(CGROUPS / own).parents):
        if not group.is_relative_to(CGROUPS):
            return
        try:
            yield (group / name).read_text().strip()
        except OSError:
            continue


def _fields(path: Path) -> dict[str, str]:
    """`name : value` lines, the first of each name."""
    found: dict[str, str] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    return found


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"
