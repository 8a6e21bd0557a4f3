"""The command `fnn`: what it prints and with which code it ends, on this machine and on worse ones."""

import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

import fnn
from fnn import cli, interop, models
from fnn.cli import _bench, _compiler, _doctor, _machine, _packages, _settings, _torch, _train
from fnn.cli._finding import Finding
from fnn.data import _torchvision

ROOT = Path(__file__).parents[1]


def raising(error):
    def raises(*arguments, **keywords):
        raise error

    return raises


# The command line


def test_help_comes_without_torch():
    """Of this package alone: `import fnn` itself needs torch, so a stand-in takes its place."""
    code = f"""
import sys, types
fnn = sys.modules["fnn"] = types.ModuleType("fnn")
fnn.__path__ = [{str(ROOT / "fnn")!r}]
from fnn.cli import main
try:
    main(["doctor", "--help"])
finally:
    print("heavy:", [name for name in ("torch", "rich", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    assert "exit code is 1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "doctor"),
        (["summary", "--help"], 0, "--input 1,1,32,32"),
        (["train", "--help"], 0, "fnn train --list"),
        (["bench", "--help"], 0, "lenet5"),
        ([], 2, "COMMAND"),
        (["nothing"], 2, "invalid choice"),
        (["summary", "lenet5"], 2, "--input"),
        (["bench", "resnet"], 2, "invalid choice"),
    ],
)
def test_help_and_mistakes(arguments, code, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == code
    assert said in "".join(capsys.readouterr())


# fnn summary


def test_summary_prints_the_table(capsys):
    arguments = ["lenet5", "--input", "2,1,32,32", "--set", "classes=100", "--flops"]
    assert cli.main(["summary", *arguments]) == 0
    expected = fnn.summary(models.lenet5(classes=100), torch.zeros(2, 1, 32, 32), flops=True)
    assert capsys.readouterr().out == f"{expected}\n"


def test_summary_of_tokens_with_several_keywords(capsys):
    sizes = ["vocab_size=11", "context=8", "layers=2", "heads=2", "width=4"]
    assert cli.main(["summary", "gpt", "--input", "1,5:int64", *[a for size in sizes for a in ("--set", size)]]) == 0
    assert "Total params: 572" in capsys.readouterr().out


def test_summary_of_one_s_own_function_layer_and_module(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_nets.py").write_text(
        "import torch\nfrom fnn import nn\n\n"
        "def module(width=3):\n    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Dropout())\n\n"
        "class Holder:\n    layer = nn.Linear(5)\n\n"
        "def number():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert cli.main(["summary", "my_nets:module", "--input", "1,4", "--set", "width=7"]) == 0
    assert "Total params: 35" in capsys.readouterr().out
    assert cli.main(["summary", "my_nets:Holder.layer", "--input", "1,4"]) == 0
    assert "Total params: 25" in capsys.readouterr().out
    assert cli.main(["summary", "my_nets:number", "--input", "1,4"]) == 1
    assert "expected an fnn layer or a torch.nn.Module, got int" in capsys.readouterr().err
    assert cli.main(["summary", "my_nets:missing", "--input", "1,4"]) == 1
    assert "my_nets has no 'missing'" in capsys.readouterr().err


CONVOLUTION = [f"--set={word}" for word in ("in_channels=3", "out_channels=2", "kernel_size=3")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lenet", "--input", "1,1,32,32"], "'lenet' is not in fnn.models (googlenet, gpt, lenet5, mlp, resnet18,"),
        (["Any", "--input", "1"], "'Any' is not in fnn.models"),
        (["no_such_package:f", "--input", "1,4"], "there is no module 'no_such_package'"),
        (["mlp", "--input", "1,a"], "--input 1,a: expected sizes and a dtype"),
        (["mlp", "--input", "1,4:int65"], "--input 1,4:int65: expected sizes and a dtype"),
        (["mlp", "--input", "1,-4"], "--input 1,-4: expected sizes"),
        (["mlp", "--input", "1,4", "--set", "classes"], "--set classes: expected NAME=VALUE"),
        (["mlp", "--input", "1,4", "--set", "clases=3"], "unexpected keyword argument 'clases'"),
        (["lenet5", "--input", "1,32"], "conv1"),
        (["mlp", "--input", "1,99999999999999999999"], "--input 1,99999999999999999999: expected sizes"),
        (["mlp", "--input", "1,99999999999,99999999999"], "--input 1,99999999999,99999999999: expected sizes"),
        (["torch.nn:Conv2d", "--input", "1,1,8,8", *CONVOLUTION], "expected input[1, 1, 8, 8] to have 3 channels"),
    ],
)
def test_summary_says_what_is_wrong(arguments, message, capsys):
    assert cli.main(["summary", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fnn summary: ")
    assert message in said


# fnn train


@pytest.fixture
def trainers(tmp_path, monkeypatch):
    """A folder of trainers in place of examples/."""

    def write(name, body):
        (tmp_path / name).write_text(f'"""What it trains.\n\nMore."""\nimport sys\n\nclass Config: ...\n\n{body}\n')
        return tmp_path / name

    monkeypatch.setattr(_train, "folder", lambda: tmp_path)
    return write


def test_every_trainer_of_the_examples_is_listed(capsys):
    assert cli.main(["train", "--list"]) == 0
    printed = capsys.readouterr().out
    configured = [path for path in (ROOT / "examples").glob("*.py") if "\nclass Config" in path.read_text()]
    assert len(configured) >= 1
    for path in configured:
        name = path.stem.removeprefix("train_")
        assert re.search(rf"^{name} +\S.*\.$", printed, re.MULTILINE), name
    assert "himmelblau" not in printed
    assert str(ROOT / "examples") in printed


def test_a_trainer_runs_as_its_file_would(trainers, capsys):
    path = trainers("train_thing.py", "if __name__ == '__main__': print(sys.argv, sys.modules['__main__'].__file__)")
    argv = list(sys.argv)
    assert cli.main(["train", "thing", "--help", "--epochs", "3", "--list"]) == 0
    assert capsys.readouterr().out.split("\n")[0] == f"{[str(path), '--help', '--epochs', '3', '--list']} {path}"
    assert sys.argv == argv
    assert cli.main(["train"]) == 0
    assert "thing  What it trains.\n" in capsys.readouterr().out


def test_how_a_trainer_ends_is_how_the_command_ends(trainers):
    trainers("one.py", "sys.exit('one: out of digits')")
    with pytest.raises(SystemExit, match="one: out of digits"):
        cli.main(["train", "one"])
    trainers("two.py", "raise TypeError('a defect of the trainer')")
    with pytest.raises(TypeError, match="a defect of the trainer"):
        cli.main(["train", "two"])
    trainers("three.py", "raise ModuleNotFoundError('No module', name='sklearn')")
    with pytest.raises(SystemExit, match=r'three.py needs scikit-learn; pip install "fnn\[examples\]" brings it'):
        cli.main(["train", "three"])
    trainers("four.py", "import a_module_of_its_own")
    with pytest.raises(ModuleNotFoundError, match="a_module_of_its_own"):
        cli.main(["train", "four"])
    with pytest.raises(SystemExit, match="'five' is no trainer; there are four, one, three, two"):
        cli.main(["train", "five"])


def test_where_the_trainers_of_an_installed_fnn_lie(tmp_path, monkeypatch):
    """A wheel lays them under share/fnn/examples of the environment, or of the folder of `pip install --target`."""
    site = tmp_path / "lib" / "site-packages"
    monkeypatch.setattr(fnn, "__file__", str(site / "fnn" / "__init__.py"))
    shared = tmp_path / "share" / "fnn" / "examples"
    noted = types.SimpleNamespace(
        parent=Path("../../share/fnn/examples"), locate=lambda: site / "../../share/fnn/examples/train_image.py"
    )
    monkeypatch.setattr(_train.importlib.metadata, "files", lambda name: [noted])
    with pytest.raises(SystemExit, match="not installed with fnn"):
        cli.main(["train", "--list"])
    shared.mkdir(parents=True)
    site.mkdir(parents=True)
    assert _train.folder() == shared
    (site / "share" / "fnn" / "examples").mkdir(parents=True)
    assert _train.folder() == site / "share" / "fnn" / "examples"


# fnn doctor: each check on machines that this one is not


@pytest.mark.parametrize(
    ("version", "status", "said"),
    [
        ("2.10.3", "fail", "needs torch 2.11 or newer"),
        ("2.11.0", "ok", "2.13 orders"),
        ("2.13.0+cpu", "ok", "2.15 mends"),
        ("2.15.1", "ok", ""),
        ("2.16.0.dev20261101", "warn", "tested with torch 2.11 to 2.15"),
    ],
)
def test_versions(version, status, said, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    found = _torch.versions()
    assert (found.status, version in found.text) == (status, True)
    assert said in found.cure
    assert bool(found.cure) == bool(said)


def test_an_unused_card(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 570.10'\necho 'NVIDIA H200, 570.10'\n")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _torch.accelerator() == Finding("accelerator", "ok", "none: fnn computes on the CPU")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(torch.version, "cuda", None)
    found = _torch.accelerator()
    assert found.status == "warn"
    assert "NVIDIA H200 with driver 570.10" in found.text
    assert "built for the CPU alone" in found.text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "a driver for CUDA 13.0" in _torch.accelerator().cure
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset CUDA_VISIBLE_DEVICES" in _torch.accelerator().cure
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert _torch.accelerator().status == "ok"


def test_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(_torch.importlib.metadata, "version", lambda name: "3.7.1")
    monkeypatch.setattr(_torch.importlib.util, "find_spec", lambda name: object())
    assert "no C compiler" in _torch.triton().text
    monkeypatch.setattr(_torch.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert _torch.triton() == Finding("Triton", "ok", "3.7.1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset TRITON_INTERPRET" in _torch.triton().cure
    monkeypatch.setattr(_torch.importlib.util, "find_spec", lambda name: None)
    assert _torch.triton().status == "warn"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _torch.triton().status == "ok"


def test_a_processor_without_vector_instructions(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name : Old One\nflags : fpu sse avx2\n\nprocessor : 1\nmodel name : Other\n")
    monkeypatch.setattr(_machine, "CPU_INFO", info)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    found = _machine.processor()
    assert (found.status, found.text.startswith("Old One, ")) == ("ok", True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "without AVX2" in _machine.processor().cure
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert "unset ATEN_CPU_CAPABILITY" in _machine.processor().cure


@pytest.mark.parametrize(
    ("cores", "count", "load", "status", "said"),
    [
        (2, 64, 0.0, "warn", "OMP_NUM_THREADS=2:"),
        (1.5, 3, 0.0, "warn", "OMP_NUM_THREADS=1:"),
        (1.5, 2, 0.0, "ok", ""),
        (2, 2, 6.0, "warn", "OMP_NUM_THREADS=1 until"),
        (2, 1, 6.0, "ok", "OMP_NUM_THREADS=2 would use"),
        (8, 8, 8.0, "ok", ""),
    ],
)
def test_threads(cores, count, load, status, said, monkeypatch):
    monkeypatch.setattr(_machine, "usable_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    found = _machine.threads()
    assert found.status == status
    assert said in found.cure
    assert bool(found.cure) == bool(said)
    assert "OMP_NUM_THREADS=64" in found.text


@pytest.fixture
def container(tmp_path, monkeypatch):
    """A control group called /box/inner; gives the folder of the outer one."""
    (tmp_path / "box" / "inner").mkdir(parents=True)
    (tmp_path / "own").write_text("0::/box/inner\n")
    monkeypatch.setattr(_machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(_machine, "OWN_CGROUP", tmp_path / "own")
    return tmp_path / "box"


def test_a_container_s_share_of_the_cores(container, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    assert _machine.usable_cores() == 16
    (container / "inner" / "cpu.max").write_text("max 100000\n")
    (container / "cpu.max").write_text("250000 100000\n")
    assert _machine.usable_cores() == 2.5
    monkeypatch.setattr(_machine, "OWN_CGROUP", container / "none")
    assert _machine.usable_cores() == 16


def test_memory(container, tmp_path, monkeypatch):
    info = tmp_path / "meminfo"
    info.write_text(f"MemTotal: {64 * 2**20} kB\nMemFree: 100 kB\nMemAvailable: {32 * 2**20} kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(_machine, "MEMORY_INFO", info)
    assert _machine.memory() == Finding("memory", "ok", "32.0 GB free of 64.0 GB")
    (container / "memory.max").write_text(f"{4 * 2**30}\n")
    (container / "memory.current").write_text(f"{3 * 2**30}\n")
    found = _machine.memory()
    assert (found.status, found.text) == ("warn", "1.0 GB free of 4.0 GB (the container's limit)")
    monkeypatch.setattr(_machine, "MEMORY_INFO", tmp_path / "none")
    assert _machine.memory().status == "ok"


def test_folders(tmp_path, monkeypatch):
    (tmp_path / "cache" / "inner").mkdir(parents=True)
    (tmp_path / "cache" / "inner" / "kernel").write_bytes(bytes(3 * 2**20))
    found = _machine.folder("cache", tmp_path / "cache", "CACHE")
    assert found.status == "ok"
    assert "cache: 3.0 MB, " in found.text
    assert _machine.folder("cache", tmp_path / "to" / "be" / "made", "CACHE").status == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "nothing is left behind"

    found = _machine.folder("cache", tmp_path / "cache" / "inner" / "kernel" / "below", "CACHE")
    assert (found.status, "cannot write" in found.text) == ("fail", True)
    assert "set CACHE" in found.cure
    for free, status in ((2**20, "fail"), (2**28, "warn"), (2**31, "ok")):
        monkeypatch.setattr(_machine.shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        assert _machine.folder("cache", tmp_path, "CACHE").status == status
    monkeypatch.setattr(_machine.tempfile, "TemporaryFile", raising(OSError(28, "No space left on device")))
    assert "No space left" in _machine.folder("cache", tmp_path, "CACHE").text


def test_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(_machine, "SHARED_MEMORY", tmp_path / "none")
    assert _machine.shared_memory().status == "ok"
    monkeypatch.setattr(_machine, "SHARED_MEMORY", tmp_path)
    for free, status in ((2**26, "warn"), (2**30, "ok")):
        monkeypatch.setattr(_machine.shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        assert _machine.shared_memory().status == status


def test_caches_and_temporary_files(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    found = _machine.inductor_cache()
    assert (found.status, "set TORCHINDUCTOR_CACHE_DIR" in found.cure) == ("fail", True)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    from torch._inductor.runtime import cache_dir_utils

    monkeypatch.setattr(cache_dir_utils, "default_cache_dir", lambda: str(tmp_path / "default"))
    assert str(tmp_path / "default") in _machine.inductor_cache().text
    monkeypatch.setattr(cache_dir_utils, "default_cache_dir", raising(KeyError("getpwuid(): uid not found: 1234")))
    found = _machine.inductor_cache()
    assert (found.status, "uid not found" in found.text) == ("fail", True)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    assert str(tmp_path / "triton") in _machine.triton_cache().text
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file" / "temporary"))
    found = _machine.temporary_folder()  # Python and g++ pass over it
    assert found.status == "warn"
    assert f"they are in {tempfile.gettempdir()}" in found.text
    monkeypatch.delenv("TMPDIR")
    assert _machine.temporary_folder().status in ("ok", "warn")
    monkeypatch.setattr(tempfile, "gettempdir", raising(FileNotFoundError(2, "No usable temporary directory")))
    assert "set TMPDIR" in _machine.temporary_folder().cure


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A path with nothing on it but the shell scripts that a test writes."""

    def write(name, script):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
        return str(tmp_path / name)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    return write


def test_no_compiler(programs, monkeypatch):
    found = _compiler.compiler()
    assert (found.status, "there is no g++" in found.text) == ("warn", True)
    assert "apt install g++" in found.cure
    clang = programs("clang++", "exit 0")
    assert _compiler.compiler().cure == f"set CXX={clang}"
    monkeypatch.setenv("CXX", "/no/such/g++")
    found = _compiler.compiler()
    assert "CXX='/no/such/g++' is no program" in found.text
    assert "unset CXX" in found.cure


def test_a_compiler_that_does_not_compile(programs):
    programs(
        "g++", 'case "$1" in --version) echo g++ 99;; *) echo "x.cpp:1: error: cannot find cc1plus" >&2; exit 1;; esac'
    )
    found = _compiler.compiler()
    assert found.status == "warn"
    assert "g++ 99, does not compile two lines" in found.text
    assert "cannot find cc1plus" in found.text
    programs("g++", 'echo "fatal error: No space left on device" >&2; exit 1')
    assert _compiler.compiler().cure == "free some of the disk"
    programs("g++", 'case "$*" in *fopenmp*) echo "fatal error: omp.h: No such file" >&2; exit 1;; esac')
    assert "lacks headers: fatal error: omp.h" in _compiler.compiler().text
    programs("g++", "exit 3")
    assert "exit code 3" in _compiler.compiler().text


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_compiler_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setattr(_compiler, "_python_headers", lambda: str(tmp_path))
    found = _compiler.compiler()
    assert (found.status, "Python.h" in found.text, "python3-dev" in found.cure) == ("warn", True, True)


def test_a_compiled_function(fast_compile, monkeypatch):
    for switch in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        monkeypatch.delenv(switch, raising=False)
    assert _compiler.compiled_function().status == "ok"
    monkeypatch.setattr(torch, "compile", lambda f, **options: lambda x: f(x) + 1e-2)
    assert "wrong numbers" in _compiler.compiled_function().text
    monkeypatch.setattr(torch, "compile", lambda f, **options: raising(PermissionError(13, "denied: /cache")))
    found = _compiler.compiled_function()
    assert (found.status, "denied: /cache" in found.text) == ("fail", True)
    wrapped = RuntimeError("backend='inductor' raised:\nUnicodeEncodeError: 'ascii' codec\n\nlong advice")
    monkeypatch.setattr(torch, "compile", lambda f, **options: raising(wrapped))
    found = _compiler.compiled_function()
    assert (found.status, found.text.endswith("raised: UnicodeEncodeError: 'ascii' codec")) == ("fail", True)
    monkeypatch.setattr(torch, "compile", lambda f, **options: raising(InvalidCxxCompiler()))
    found = _compiler.compiled_function()
    assert (found.status, "so that fnn runs eagerly" in found.text) == ("warn", True)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert _compiler.compiled_function().cure == "unset TORCHDYNAMO_DISABLE"


def test_packages(monkeypatch):
    monkeypatch.setattr(_torchvision, "torchvision", raising(RuntimeError("libtorch_cuda.so: undefined symbol\nmore")))
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    found = _packages.torchvision()
    assert (found.status, found.cure) == ("warn", "pip install torchvision==0.29.*")
    assert found.text == "does not import: RuntimeError: libtorch_cuda.so: undefined symbol"
    for version, status in (("0.29.1+cpu", "ok"), ("0.28.0", "warn")):
        module = types.SimpleNamespace(__version__=version)
        monkeypatch.setattr(_torchvision, "torchvision", lambda module=module: module)
        assert _packages.torchvision().status == status
    assert _packages.package("tyro").status == "ok"
    monkeypatch.setattr(_packages.importlib.util, "find_spec", lambda name: None)
    assert _packages.torchvision().cure == 'pip install "fnn[examples]"'
    assert _packages.package("tensorboard").cure == 'pip install "fnn[log]"'
    assert _packages.package("wandb").cure == "pip install wandb"


def test_every_package_s_extra_brings_it():
    extras = re.findall(r"^(examples|log|onnx) = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(extras) == 3
    brought = {name: [re.split("[><=]", need)[0] for need in json.loads(needs)] for name, needs in extras}
    for package, _, extra in _packages.PACKAGES.values():
        assert not extra or package in brought[extra]


def test_settings_on_a_card(monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert '"high"' in _settings.precision().cure
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert _settings.precision().cure == ""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    assert _settings.precision().status == "warn"
    assert "use_deterministic_algorithms" in _settings.determinism().cure
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        assert _settings.determinism().cure == ""
    finally:
        torch.use_deterministic_algorithms(False)


# fnn doctor: the report

WELL = Finding("threads", "ok", "2 for 2 usable cores")
SLOW = Finding("C++ compiler", "warn", "there is no g++: [slow]", "apt install g++")
WRONG = Finding("torch.compile's cache", "fail", "/full", "free some of it")


def doctor(monkeypatch, *found, options=()):
    monkeypatch.setattr(_doctor, "checks", lambda: {f.name: lambda f=f: f for f in found})
    return cli.main(["doctor", *options])


def test_the_report_and_its_exit_code(monkeypatch, capsys):
    assert doctor(monkeypatch, WELL) == 0
    assert capsys.readouterr().out == "ok    threads: 2 for 2 usable cores\nall is well\n"
    assert doctor(monkeypatch, WELL, SLOW) == 0
    assert "warn  C++ compiler: there is no g++: [slow]\n      -> apt install g++\n" in capsys.readouterr().out
    assert doctor(monkeypatch, WRONG, SLOW, WELL) == 1
    assert capsys.readouterr().out.endswith("1 to mend, 1 slower or missing\n")


def test_the_report_as_json(monkeypatch, capsys):
    assert doctor(monkeypatch, WELL, WRONG, options=["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "fail"
    assert [Finding(**finding) for finding in report["findings"]] == [WELL, WRONG]


def test_the_report_in_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "150")
    terminal = Terminal()
    _doctor.show([WELL, SLOW, WRONG], terminal)
    assert "\x1b[33mwarn" in terminal.getvalue()
    assert "there is no g++: [slow]" in terminal.getvalue()
    assert "apt install g++" in terminal.getvalue()


def test_a_check_that_breaks_stops_no_other(monkeypatch, capsys):
    found = _doctor.check("memory", raising(ZeroDivisionError("a strange machine")))
    assert found == Finding("memory", "warn", "could not be checked: ZeroDivisionError: a strange machine")


@pytest.mark.slow
def test_the_doctor_on_this_machine(tmp_path):
    def ask(**environment):
        command = [sys.executable, "-m", "fnn", "doctor", "--json"]
        settings = {**os.environ, **environment}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=settings)
        report = json.loads(done.stdout)
        assert done.returncode == (report["status"] == "fail"), done.stderr
        return {finding["name"]: finding for finding in report["findings"]}

    found = ask()
    assert list(found) == list(_doctor.checks())
    assert not [name for name, finding in found.items() if "could not be checked" in finding["text"]]
    assert re.search(r"works on \w+: a new function in \d+\.\d s", found["torch.compile"]["text"])
    assert torch.__version__ in found["versions"]["text"]

    (tmp_path / "file").touch()
    found = ask(CXX="/no/g++", OMP_NUM_THREADS="64", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert found["C++ compiler"]["status"] == "warn"
    assert found["torch.compile's cache"]["status"] == "fail"
    assert found["torch.compile"]["status"] == "fail"
    assert "Not a directory" in found["torch.compile"]["text"]
    assert "OMP_NUM_THREADS=64" in found["threads"]["text"]


# fnn bench


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(_bench, "TURNS", 3)
    monkeypatch.setattr(_bench, "TURN_SECONDS", 0.002)


def test_times_and_ratio_of_known_sides(quick):
    found = _bench.compare(lambda: time.sleep(0.002), lambda: time.sleep(0.01), torch.device("cpu"))
    low, middle, high = found["times_as_fast"]
    assert low <= middle <= high
    assert 2 < middle < 6
    assert 2 <= found["fnn_ms"][1] < found["torch_ms"][1]


def test_both_steps_compute_the_same_losses(quick, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(_bench.train, "make_step", functools.partial(_bench.train.make_step, compile=False))
    path = tmp_path / "new" / "bench.json"
    assert cli.main(["bench", "--device", "cpu", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "times as fast" in printed
    rows = json.loads(path.read_text())["results"]
    assert [row["name"] for row in rows] == ["mlp, batch 64", "lenet5, batch 64"]
    for row in rows:
        assert row["note"].startswith("not compiled")
        assert f"{row['times_as_fast'][1]:.3g} [" in printed

    other = models.mlp().init(fnn.random.key(9), torch.zeros(1, 784))[0]
    monkeypatch.setattr(interop, "to_state_dict", lambda params, rule=interop.to_state_dict: rule(other))
    with pytest.raises(RuntimeError, match="step 1 has the loss"):
        cli.main(["bench", "mlp", "--device", "cpu"])


def test_products_and_their_kernels(quick, capsys, monkeypatch):
    monkeypatch.setattr(_bench, "product", lambda size, dtype, device, rule=_bench.product: rule(8, dtype, device))
    assert cli.main(["bench", "matmul", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    a = torch.zeros(8, 8)
    assert f"8 x 8 float32: {fnn.ops.explain(fnn.ops.matmul, a, a)}" in printed
    assert cli.main(["bench", "--device", "tpu9"]) == 1
    assert "device: 'tpu9'" in capsys.readouterr().err
