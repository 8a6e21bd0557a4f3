"""The main job, run as a user runs it."""

import csv
import json
import os
import re
import runpy
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cifar10_files import write_cifar10
from idx_files import write_mnist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fnn import data, interop, models, nn, train, tree

SCRIPT = Path(__file__).parents[1] / "examples" / "train_image.py"


def run(*arguments, expect=0):
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=580)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout if expect == 0 else done.stderr


def run_here(monkeypatch, *arguments, expect=0):
    """The script in this process, which has imported what it needs. Returns what a failure says."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    message = None
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as error:
        message = error.code
    assert (message is not None) == bool(expect), message
    return message


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, run("--no-compile", "--epochs", 4, "--out", out)


def test_it_prints_the_table_the_data_and_the_result(finished):
    out, printed = finished
    words = " ".join(printed.split())
    assert "[-1, 120] 48,120" in words
    assert "training and" in words
    assert "device cpu" in words or "device cuda" in words
    assert "epoch 4 loss" in words
    assert f"wrote config, weights, metrics, curves and predictions to {out}" in words
    names = {"checkpoints", "config.json", "curves.png", "metrics.csv", "model.safetensors", "predictions.png"}
    assert {path.name for path in out.iterdir()} == names


def test_it_writes_what_another_program_can_read(finished):
    out, _ = finished
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    config = json.loads((out / "config.json").read_text())
    assert config["status"] == "finished"
    assert config["config"]["model"] == "lenet5"
    weights = interop.load_safetensors(out / "model.safetensors")
    images = data.digits(size=32)
    assert config["preprocessing"] == images.preprocessing
    found = models.lenet5()(weights["params"], images.test[0]).argmax(-1)
    accuracy = (found == images.test[1]).double().mean()
    assert float(accuracy) == pytest.approx(config["test"]["accuracy"])
    assert float(accuracy) == pytest.approx(float(rows[-1]["eval_accuracy"]))
    assert accuracy > 0.8
    for name in ("curves.png", "predictions.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_cifar10_with_augmentation_and_tensorboard(tmp_path, monkeypatch):
    write_cifar10(tmp_path, each=100)
    options = ["--data", "cifar10", "--root", tmp_path, "--augment", "--tensorboard", "--no-compile"]
    run_here(monkeypatch, *options, "--epochs", 4, "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["classes"][9] == "truck"
    assert len(config["preprocessing"]["mean"]) == 3
    assert config["test"]["accuracy"] > 0.8
    weights = interop.load_safetensors(tmp_path / "out" / "model.safetensors")
    images = data.cifar10(tmp_path)
    found = models.lenet5()(weights["params"], images.test[0]).argmax(-1)
    assert float((found == images.test[1]).double().mean()) == pytest.approx(config["test"]["accuracy"])
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert events.Tags()["graph"]
    assert [event.step for event in events.Scalars("epoch/eval_accuracy")] == [7, 14, 21, 28]


@pytest.mark.slow
def test_mse_on_one_hot_with_momentum(tmp_path, monkeypatch):
    run_here(
        monkeypatch,
        *["--model", "mlp", "--loss", "mse", "--optimizer", "sgd", "--lr", 0.1, "--epochs", 4, "--no-compile"],
        *["--out", tmp_path],
    )
    weights = interop.load_safetensors(tmp_path / "model.safetensors")["params"]
    images, labels = data.digits().test
    outputs = models.mlp((256, 64))(weights, images)
    found = json.loads((tmp_path / "config.json").read_text())["test"]
    assert found["loss"] == pytest.approx(float(torch.nn.functional.mse_loss(outputs, torch.eye(10)[labels])), rel=1e-5)
    assert found["accuracy"] > 0.85


@pytest.mark.slow
def test_the_note_s_mnist_network(tmp_path, mnist_root, monkeypatch):
    """784-256-64-10, SGD with momentum 0.9, mean squared error of one-hot labels."""
    run_here(
        monkeypatch,
        *["--data", "mnist", "--root", mnist_root, "--model", "mlp", "--loss", "mse", "--optimizer", "sgd"],
        *["--lr", 0.1, "--momentum", 0.9, "--epochs", 5, "--no-compile", "--out", tmp_path],
    )
    assert json.loads((tmp_path / "config.json").read_text())["test"]["accuracy"] > 0.9
    for name in ("curves.png", "predictions.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(tmp_path, monkeypatch):
    options = ["--model", "mlp", "--no-compile", "--epochs", 1]
    run(*options, "--seed", 0, "--out", tmp_path / "a")
    for out, seed in (("b", 0), ("c", 1)):
        run_here(monkeypatch, *options, "--seed", seed, "--out", tmp_path / out)
    a, b, c = (interop.load_safetensors(tmp_path / out / "model.safetensors") for out in ("a", "b", "c"))
    assert tree.allclose(a, b, rtol=0, atol=0)
    assert not tree.allclose(a, c)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnist", "--root", "/no/such/folder"], "/no/such/folder/MNIST/raw"),
        (["--out", "/dev/null/out"], "/dev/null"),
        (["--out", __file__], "cannot use the folder"),
        (["--device", "tpu9"], "device: 'tpu9'"),
        (["--epochs", 0], "epochs"),
        (["--folds", 1], "--folds 2 or more"),
        (["--batch-size", 5000], "batch_size is 5000"),
    ],
)
def test_bad_arguments_end_in_one_line(tmp_path, arguments, message, monkeypatch):
    arguments = arguments if "--out" in arguments else [*arguments, "--out", tmp_path / "out"]
    printed = run_here(monkeypatch, "--model", "mlp", "--no-compile", *arguments, expect=1)
    assert printed.startswith("train_image: ")
    assert message in printed


@pytest.mark.slow
def test_a_run_that_diverges_keeps_good_weights_and_fails(tmp_path, monkeypatch):
    printed = run_here(
        monkeypatch, "--model", "mlp", "--no-compile", "--epochs", 2, "--lr", 1e30, "--out", tmp_path, expect=1
    )
    assert "not finite" in printed
    assert "try a lower learning rate" in printed
    weights = interop.load_safetensors(tmp_path / "model.safetensors")
    assert all(torch.isfinite(leaf).all() for layer in weights["params"].values() for leaf in layer.values())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["status"] == "not finite"
    assert config["error"] == printed.removeprefix("train_image: ")


@pytest.mark.slow
def test_control_c_ends_cleanly_with_what_there_is(tmp_path):
    command = [sys.executable, "-u", SCRIPT, "--model", "mlp", "--no-compile", "--epochs", "5000", "--out", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "interrupted" in printed
    assert f"the run is saved in {tmp_path / 'checkpoints'}; the same command with --resume goes on with it" in printed
    assert json.loads((tmp_path / "config.json").read_text())["status"] == "interrupted"
    assert {"metrics.csv", "model.safetensors", "curves.png"} <= {path.name for path in tmp_path.iterdir()}


def interrupt(monkeypatch, step):
    """Ctrl-C after that step of every run."""

    class Interrupted(train.Progress):
        def step(self, run):
            if run.step == step:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "Progress", Interrupted)


OPTIONS = {
    "what shapes the weights": ["--model", "mlp", "--ema", 0.9, "--accumulate", 2, "--clip", 1, "--augment"],
    "what watches the run": ["--model", "mlp", "--schedule", "plateau", "--early-stopping", 1, "--weight-decay", 0.1],
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_resumed_run_ends_with_the_same_bits(options, tmp_path, monkeypatch):
    options = [*options, "--epochs", 3, "--no-compile"]
    run_here(monkeypatch, *options, "--out", tmp_path / "a")
    with monkeypatch.context() as patch:
        interrupt(patch, 30)
        run_here(patch, *options, "--out", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["status"] == "interrupted"
    assert "unfinished run" in run_here(monkeypatch, *options, "--out", tmp_path / "b", expect=1)
    other = run_here(monkeypatch, *options, "--lr", 1, "--resume", "--out", tmp_path / "b", expect=1)
    assert "lr was 0.003, is 1.0" in other
    assert json.loads((tmp_path / "b" / "config.json").read_text())["config"]["lr"] == 0.003
    run_here(monkeypatch, *options, "--resume", "--out", tmp_path / "b")
    a, b = (interop.load_safetensors(tmp_path / out / "model.safetensors") for out in "ab")
    assert tree.allclose(a, b, rtol=0, atol=0)
    a, b = (json.loads((tmp_path / out / "config.json").read_text()) for out in "ab")
    assert (a["test"], a["steps"], a["status"]) == (b["test"], b["steps"], b["status"])


@pytest.mark.slow
def test_folds_print_mean_and_deviation_and_go_on(tmp_path, monkeypatch, capsys):
    options = ["--model", "mlp", "--folds", 3, "--epochs", 2, "--no-compile"]
    run_here(monkeypatch, *options, "--out", tmp_path / "a")
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    accuracies = [fold["accuracy"] for fold in written["folds"]]
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert f"accuracy of 3 folds: {mean:.4f} +- {deviation:.4f}" in printed
    assert written["test"]["accuracy"] == mean
    assert sum(map(int, re.findall(r"fold \d of 3: \d+ training and (\d+) test images", printed))) == 1438

    with monkeypatch.context() as patch:
        interrupt(patch, 20)
        run_here(patch, *options, "--out", tmp_path / "b")
        assert json.loads((tmp_path / "b" / "config.json").read_text())["status"] == "interrupted"
    assert "unfinished folds" in run_here(monkeypatch, *options, "--out", tmp_path / "b", expect=1)
    run_here(monkeypatch, *options, "--resume", "--out", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["folds"] == written["folds"]


@pytest.mark.slow
def test_the_averaged_weights_are_evaluated_and_saved(tmp_path, monkeypatch):
    options = ["--model", "mlp", "--ema", 0.5, "--precision", "bfloat16", "--profile", "--epochs", 1, "--no-compile"]
    run_here(monkeypatch, *options, "--out", tmp_path)
    weights = interop.load_safetensors(tmp_path / "model.safetensors")["params"]
    last = interop.load_safetensors(max((tmp_path / "checkpoints").glob("*.safetensors")))["train_state"]
    saved, average, newest = (tree.paths(x) for x in (weights, last["opt_state"]["ema"], last["params"]))
    assert all(torch.equal(saved[path], average[path]) for path in newest)
    assert not any(torch.equal(saved[path], newest[path]) for path in newest)
    net = nn.Cast(models.mlp((256, 64)), nn.Policy(compute=torch.bfloat16))
    images, labels = data.digits().test
    found = (net(weights, images).argmax(-1) == labels).double().mean()
    assert float(found) == json.loads((tmp_path / "config.json").read_text())["test"]["accuracy"]
    assert (tmp_path / "profile" / "trace.json").is_file()


@pytest.mark.slow
def test_resnet20_on_clothes(tmp_path, monkeypatch):
    write_mnist(tmp_path, "FashionMNIST", train=8, test=10)
    options = ["--data", "fashion_mnist", "--root", tmp_path, "--model", "resnet20", "--augment", "--batch-size", 4]
    run_here(monkeypatch, *options, "--epochs", 1, "--no-compile", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["classes"][9] == "Ankle boot"
    weights = interop.load_safetensors(tmp_path / "out" / "model.safetensors")
    found = models.resnet20()(weights["params"], data.fashion_mnist(tmp_path).test[0], state=weights["state"]).argmax(
        -1
    )
    assert float((found == torch.arange(10)).double().mean()) == config["test"]["accuracy"]


@pytest.mark.slow
def test_lenet_on_digits_reaches_97_percent(tmp_path):
    run("--out", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["test"]["accuracy"] >= 0.97


@pytest.mark.slow
def test_lenet_on_mnist_reaches_98_percent_twice_the_same(tmp_path, mnist_root):
    for out in ("a", "b"):
        run("--data", "mnist", "--root", mnist_root, "--epochs", 10, "--out", tmp_path / out)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["test"]["accuracy"] >= 0.98
    a, b = (interop.load_safetensors(tmp_path / out / "model.safetensors") for out in ("a", "b"))
    assert tree.allclose(a, b, rtol=0, atol=0)


@pytest.mark.slow
def test_lenet_on_augmented_mnist_reaches_98_5_percent(tmp_path, mnist_root):
    run("--data", "mnist", "--root", mnist_root, "--augment", "--out", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["test"]["accuracy"] >= 0.985
