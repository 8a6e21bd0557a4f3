"""Checks of the C++ compiler that torch.compile needs, and of a compiled function."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path

import torch

from fnn import train
from fnn.cli._finding import Finding
from fnn.train._step import no_compiler

HEADERS = "#include <Python.h>\n#include <omp.h>\n"
INSTALL = {
    "linux": "install one (Debian and Ubuntu: apt install g++), or set CXX to the path of one",
    "darwin": "xcode-select --install",
    "win32": "install the Build Tools for Visual Studio with C++, and start from its command prompt",
}


def compiler() -> Finding:
    """The C++ compiler that Inductor would take, and whether it makes what Inductor makes."""
    name, found = _compiler()
    install = INSTALL.get(sys.platform, INSTALL["linux"])
    slow = "compiled steps run eagerly on the CPU"
    if found is None:
        if "CXX" in os.environ:
            text = f"CXX={name!r} is no program: {slow}"
            return Finding("C++ compiler", "warn", text, "unset CXX, or set it to the path of one")
        other = shutil.which("clang++")
        cure = f"set CXX={other}" if other and name != "clang++" else install
        return Finding("C++ compiler", "warn", f"there is no {name}: {slow}", cure)
    if sys.platform == "win32":
        return Finding("C++ compiler", "ok", found)
    label = f"{found}, {_first_line([found, '--version'])}"
    if problem := _compile(found, "int one() { return 1; }\nint two() { return one() + one(); }\n"):
        cure = "free some of the disk" if "No space" in problem else install
        return Finding("C++ compiler", "warn", f"{label}, does not compile two lines: {problem}; {slow}", cure)
    if sys.platform == "linux" and (problem := _compile(found, HEADERS, "-fopenmp", f"-I{_python_headers()}")):
        cure = "apt install python3-dev (or your Python's headers)" if "Python.h" in problem else "apt install libgomp1"
        return Finding("C++ compiler", "warn", f"{label}, lacks headers: {problem}; {slow}", cure)
    return Finding("C++ compiler", "ok", label)


def compiled_function() -> Finding:
    """Whether torch.compile works here, on the accelerator if there is one, and how long three lines take."""
    device = train.device()
    switches = [name for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE") if os.environ.get(name) == "1"]
    if switches:
        return Finding("torch.compile", "warn", f"switched off by {switches[0]}=1", f"unset {switches[0]}")
    own = random.SystemRandom().random()  # a constant that no cache has seen, so that the compiler has to work

    def function(x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x) * own
        return (y + x.exp()).sum(-1)

    x = torch.linspace(-1, 1, 256, device=device).reshape(4, 64)
    started = time.perf_counter()
    try:
        y = torch.compile(function, fullgraph=True)(x)
    except Exception as error:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            eager = no_compiler(error)
        reason = f"{type(error).__name__}: {' '.join(str(error).strip().splitlines()[:2])}"[:300]
        if eager:
            text = f"no compiler, so that fnn runs eagerly on {device} ({reason})"
            return Finding("torch.compile", "warn", text, "see the compiler above")
        return Finding("torch.compile", "fail", f"{device}: {reason}", "see above; compile=False trains without it")
    seconds = time.perf_counter() - started
    if not torch.allclose(y, function(x), rtol=1e-5, atol=1e-5):
        return Finding("torch.compile", "fail", f"{device}: wrong numbers", "compile=False; report this")
    return Finding("torch.compile", "ok", f"works on {device}: a new function in {seconds:.1f} s, its import included")


def _compiler() -> tuple[str, str | None]:
    """What Inductor looks for, and the program it finds."""
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    name = os.environ.get("CXX", default)
    return name, shutil.which(name)


def _compile(program: str, source: str, *options: str) -> str:
    """The first error of compiling a shared library of these lines, or ""."""
    with tempfile.TemporaryDirectory() as where:
        file = Path(where) / "lines.cpp"
        file.write_text(source)
        command = [program, "-shared", "-fPIC", *options, str(file), "-o", str(Path(where) / "lines.so")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    if done.returncode == 0:
        return ""
    lines = [line.removeprefix(f"{file}:") for line in done.stderr.splitlines()]
    return next((line for line in lines if "error" in line), f"exit code {done.returncode}")


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return next(iter(done.stdout.splitlines()), "")


def _python_headers() -> str:
    return sysconfig.get_path("include")
