"""Train an image classifier: one pure loss function, one compiled step.

    python examples/train_image.py                                   # LeNet-5 on scikit-learn's digits
    python examples/train_image.py --data mnist --root data --epochs 10
    python examples/train_image.py --data cifar10 --root data --augment
    python examples/train_image.py --model mlp --loss mse --optimizer sgd --lr 0.01 --momentum 0.9

Writes to --out: metrics.csv, curves.png, predictions.png, model.safetensors, config.json.
"""

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

import fnn
from fnn import data, interop, losses, models, optim, random, train


@dataclasses.dataclass(frozen=True)
class Config:
    """Train an image classifier with fnn."""

    model: Literal["lenet5", "mlp"] = "lenet5"
    data: Literal["digits", "mnist", "cifar10"] = "digits"
    root: Path = Path("data")
    """Folder of the data files, the one that holds MNIST/raw or cifar-10-batches-bin."""
    download: bool = False
    """Download MNIST or CIFAR-10 into --root if it is not there."""
    augment: bool = False
    """Train on images shifted and rotated a little at random, CIFAR-10's also mirrored, inside the compiled step."""
    epochs: int = 20
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    """mse compares the outputs with one-hot labels."""
    label_smoothing: float = 0.1
    """Of the training cross entropy."""
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.9
    """Of sgd."""
    lr: float = 3e-3
    """Peak learning rate: linear warm-up over the first tenth of the steps, then a cosine down to zero."""
    batch_size: int = 64
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes an accelerator where there is one."""
    compile: bool = True
    tensorboard: bool = False
    """Write numbers and the graph of the step to --out/tensorboard, too."""
    out: Path = Path("out/train_image")
    """Folder for what the run writes."""


def run(config: Config) -> None:
    if config.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {config.epochs}")
    if config.out.is_file():
        raise ValueError(f"--out {config.out} is a file; give a folder")
    write_json(config.out / "config.json", config, status="started")
    device = train.device(config.device)
    images = load_images(config)
    init_key, order_key, step_key = random.split(random.key(config.seed, device), 3).unbind()

    net = models.lenet5() if config.model == "lenet5" else models.mlp((256, 64))
    example = images.train[0][:1]
    params, state = net.init(init_key, example)
    fnn.summary(net, example).print()
    print(f"\n{images}, device {device}")

    mse = config.loss == "mse"
    loss_of = mse_of_one_hot if mse else losses.cross_entropy
    train_loss_of = loss_of if mse else functools.partial(loss_of, label_smoothing=config.label_smoothing)
    change = augmentation(config)

    def loss_fn(params, state, batch, key):
        x, labels = batch
        if config.augment:
            change_key, key = random.split(key).unbind()
            x = change(change_key, x)
        logits, state = net.apply(params, state, x, key=key, train=True)
        accuracy = (logits.argmax(-1) == labels).float().mean()
        return train_loss_of(logits, labels), (state, {"accuracy": accuracy})

    def metric_fn(params, state, batch):
        x, labels, _ = batch
        logits = net(params, x, state=state)
        loss = loss_of(logits, labels, reduction="none")
        return {"loss": loss, "accuracy": logits.argmax(-1) == labels}

    batches = data.Loader(images.train, config.batch_size, key=order_key, device=device)
    test = data.Loader(images.test, 256, remainder="pad", device=device)
    steps = config.epochs * len(batches)
    lr = optim.warmup_cosine(0.0, config.lr, steps // 10, steps)
    optimizer = optim.adam(lr) if config.optimizer == "adam" else optim.sgd(lr, config.momentum)
    step = train.make_step(loss_fn, optimizer, compile=config.compile)
    eval_step = train.make_eval(metric_fn, compile=config.compile)
    train_state = train.TrainState.create(params, optimizer, step_key, state=state)

    callbacks: list[train.Callback] = [train.Progress()]
    if config.tensorboard:
        callbacks.append(train.TensorBoard(config.out / "tensorboard", graph=True))

    started, failure = time.perf_counter(), None
    try:
        train_state, history = train.fit(
            step,
            train_state,
            batches,
            epochs=config.epochs,
            eval=lambda train_state: train.evaluate(eval_step, train_state, test),
            callbacks=callbacks,
        )
    except train.NonFiniteError as error:  # keep the weights, which are finite, then say what happened
        failure, train_state, history = error, error.train_state, error.history
    seconds = time.perf_counter() - started

    result = train.evaluate(eval_step, train_state, test)
    weights = {"params": train_state.params, "state": train_state.state}
    interop.save_safetensors(weights, config.out / "model.safetensors")
    if history.rows:
        history.to_csv(config.out / "metrics.csv")
        history.plot(config.out / "curves.png")
    logits = net(train_state.params, images.test[0][:32].to(device), state=train_state.state)
    plot_predictions(images, logits.argmax(-1).cpu(), config.out / "predictions.png")
    status = "not finite" if failure else history.stopped or "finished"
    write_json(
        config.out / "config.json",
        config,
        status=status,
        error=str(failure) if failure else None,
        steps=int(train_state.step),
        preprocessing=images.preprocessing,
        classes=images.classes,
        test={name: value if math.isfinite(value) else None for name, value in result.items()},
    )
    print(f"\ntest accuracy {result['accuracy']:.4f}, loss {result['loss']:.4f}, after {seconds:.1f} s ({status})")
    print(f"wrote config, weights, metrics, curves and predictions to {config.out}")
    if failure is not None:
        raise failure


def load_images(config: Config) -> data.ImageDataset:
    """The images, in the size that the model wants."""
    if config.data == "cifar10":
        return data.cifar10(config.root, download=config.download)
    if config.data == "mnist":
        return data.mnist(config.root, download=config.download, pad=2 if config.model == "lenet5" else 0)
    return data.digits(size=32 if config.model == "lenet5" else 8)


def augmentation(config: Config) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What leaves the labels as they are: a mirrored digit is none."""
    if config.data == "cifar10":
        return data.augment.compose(data.augment.flip(), data.augment.crop(4))
    return data.augment.affine(degrees=10, translate=0.05, scale=(0.9, 1.1), padding_mode="border")


def mse_of_one_hot(logits, labels, **options):
    """Squared error of the outputs against 1 for the right class and 0 for the others."""
    return losses.mse(logits, F.one_hot(labels, logits.shape[-1]).to(logits.dtype), **options)


def plot_predictions(images: data.ImageDataset, guesses, path: Path) -> None:
    """A grid of the first test images with their predictions, wrong ones in red."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    figure.suptitle(f"{images.name}: predictions for test images, wrong ones in red", fontsize=10)
    mean, std = (torch.tensor(images.preprocessing[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    for index, guess in enumerate(guesses):
        axes = figure.add_subplot(4, 8, index + 1)
        pixels = (images.test[0][index] * std + mean).clamp(0, 1)
        axes.imshow(pixels.permute(1, 2, 0), cmap="gray")
        colour = "black" if guess == images.test[1][index] else "red"
        axes.set_title(images.classes[guess], color=colour, fontsize=9)
        axes.axis("off")
    figure.savefig(path, dpi=120)


def write_json(path: Path, config: Config, **facts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"config": dataclasses.asdict(config), **facts}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    try:
        run(tyro.cli(Config, description=__doc__))
    except (OSError, ValueError, ImportError, train.NonFiniteError) as error:
        sys.exit(f"train_image: {error}")
