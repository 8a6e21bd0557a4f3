"""The examples in two processes: they compute what one process does, and the first of them alone prints and writes."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from idx_files import write_mnist

from fnn import distributed, interop, models, random, train, tree

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = {"data": "mnist", "epochs": 2, "batch_size": 4}
# Without what is drawn inside of the loss: there each process draws for its own part of the batch.
SMALLEST = {
    "airbench": {"width": 2, "images": 40, "batch_size": 40, "epochs": 1, "translate": 0},
    "dp_sgd": {"epochs": 1},
    "ensemble": {"members": 2, "epochs": 2, "batch_size": 256},
    "finetune": {"data": "mnist", "width": 4, "head_epochs": 1, "epochs": 1, "batch_size": 4},
    "train_gpt": {"steps": 5, "layers": 1, "heads": 2, "width": 8, "context": 16, "sample_length": 20},
    "train_image": {**TINY, "model": "mlp"},
    "train_vit": {**TINY, "layers": 1, "heads": 2, "width": 8, "mix": "none"},
}
CLOCKS = ("seconds", "examples_per_second", "images_per_second")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the examples read: images, a text, and weights of a ResNet-18 of width 4."""
    folder = tmp_path_factory.mktemp("files")
    write_mnist(folder, train=40, test=21)
    (folder / "text.txt").write_text("the cat sat on the mat, and the rat sat on the cat.\n" * 40)
    params, state = models.resnet18(1000, 4).init(random.key(7), torch.zeros(1, 3, 32, 32))
    interop.save_pth(interop.to_state_dict(params, state), folder / "resnet.pth")
    return folder


class Interrupted(train.Callback):
    """Ctrl-C, which comes to the last process alone, after its third step."""

    def step(self, run):
        if run.step == 3 and not distributed.is_main():
            signal.raise_signal(signal.SIGINT)


def run(name, files, out, *, broken_off=False, **options):
    """One example as its command line runs it; what it returns."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))  # by name, which is how the compiler looks modules up
    module = importlib.import_module(name)
    read = {"train_gpt": {"text": files / "text.txt"}, "finetune": {"weights": str(files / "resnet.pth")}}.get(name, {})
    if hasattr(module.Config, "root"):
        read["root"] = files
    with pytest.MonkeyPatch.context() as patch:
        if broken_off:
            patch.setattr(train, "Progress", Interrupted)
        return module.run(module.Config(out=out, compile=False, **{**SMALLEST[name], **read, **options}))


def rows_of(out):
    """Of metrics.csv, without what clocks tell."""
    with (out / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]


def status_of(out):
    return json.loads((out / "config.json").read_text())["status"]


def check_alike(a, b):
    """The evaluations in the rows are of the weights, too."""
    rows, others = rows_of(a), rows_of(b)
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert status_of(a) == status_of(b) == "finished"
    files, other_files = ({str(path.relative_to(out)) for path in out.rglob("*")} for out in (a, b))
    assert files == other_files


@pytest.mark.parametrize("name", sorted(SMALLEST.keys() - {"train_image"}))
def test_two_processes_train_as_one_does(name, files, tmp_path):
    one = run(name, files, tmp_path / "one")
    two, same = ranks.run(2, run, name, files, tmp_path / "two")
    check_alike(tmp_path / "one", tmp_path / "two")
    for clock in CLOCKS:
        assert (one.pop(clock, None) is None) == (two.pop(clock, None) is None)
        same.pop(clock, None)
    assert two == same == pytest.approx(one, rel=1e-5, abs=1e-6)


def test_folds_with_what_an_earlier_run_left(files, tmp_path):
    (tmp_path / "two" / "fold_2" / "left").mkdir(parents=True)
    one = run("train_image", files, tmp_path / "one", folds=2, epochs=1)
    two, same = ranks.run(2, run_with, "train_image", files, tmp_path / "two", {"folds": 2, "epochs": 1})
    assert two == same == pytest.approx(one, rel=1e-5)
    for fold in ("fold_1", "fold_2"):
        check_alike(tmp_path / "one" / fold, tmp_path / "two" / fold)


def test_a_run_that_one_process_broke_off_goes_on(files, tmp_path):
    ranks.run(2, run, "train_image", files, tmp_path / "whole")
    ranks.run(2, run_with, "train_image", files, tmp_path / "parts", {"broken_off": True})
    assert status_of(tmp_path / "parts") == "interrupted"
    with pytest.raises(FileExistsError, match="unfinished run"):
        run("train_image", files, tmp_path / "parts")
    with pytest.raises(ValueError, match="is of a run of 2 processes, this one has 1"):
        run("train_image", files, tmp_path / "parts", resume=True)
    ranks.run(2, run_with, "train_image", files, tmp_path / "parts", {"resume": True})
    check_alike(tmp_path / "whole", tmp_path / "parts")
    weights = [interop.load_safetensors(tmp_path / out / "model.safetensors") for out in ("whole", "parts")]
    assert tree.allclose(*weights, rtol=0, atol=0)


def run_with(name, files, out, options):
    return run(name, files, out, **options)


def torchrun(*command):
    """What two processes print."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*start, *map(str, command)], text=True, env=environment, **pipes)
    try:
        printed, complaints = process.communicate(timeout=120)
    finally:
        process.terminate()  # and with it the processes that it started
    assert process.returncode == 0, printed + complaints
    assert "Warning" not in complaints, complaints
    return printed


def test_torchrun_with_the_same_command_line(files, tmp_path):
    """And with what looks back on earlier epochs: averaged weights, early stopping, the plateau."""
    options = ["--no-compile", "--model", "mlp", "--epochs", 2, "--ema", 0.9]
    options += ["--early-stopping", 5, "--schedule", "plateau"]
    printed = torchrun(EXAMPLES / "train_image.py", *options, "--out", tmp_path / "two")
    for once in ("training and", "epoch   2", "test accuracy", "wrote config"):
        assert printed.count(once) == 1, printed
    options = {"data": "digits", "batch_size": 64, "ema": 0.9, "early_stopping": 5, "schedule": "plateau"}
    run("train_image", files, tmp_path / "one", **options)
    check_alike(tmp_path / "one", tmp_path / "two")


def test_torchrun_where_there_is_nothing_to_divide(tmp_path):
    """By name, through `fnn train`: the first process does it all."""
    printed = torchrun(
        "-m", "fnn", "train", "maml", *["--no-compile", "--steps", 3, "--meta-batch", 2, "--out", tmp_path]
    )
    assert printed.count(f"wrote everything to {tmp_path}") == 1
    assert json.loads((tmp_path / "config.json").read_text())["status"] == "finished"
