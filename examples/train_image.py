"""Train an image classifier: one pure loss function, one compiled step.

    python examples/train_image.py                                   # LeNet-5 on scikit-learn's digits
    python examples/train_image.py --data mnist --root data --augment
    python examples/train_image.py --data digits --folds 5 --epochs 10 --out out/folds
    python examples/train_image.py --data cifar10 --root data --model resnet20 --augment --optimizer sgd --lr 0.1 \\
        --weight-decay 1e-4 --batch-size 128 --epochs 100 --ema 0.999

Writes to --out: metrics.csv, curves.png, predictions.png, model.safetensors, config.json, and checkpoints, from which
--resume goes on, bit for bit.
"""

import dataclasses
import functools
import math
import shutil
import statistics
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
from fnn import data, distributed, interop, losses, models, nn, optim, random, train


@dataclasses.dataclass(frozen=True)
class Config:
    """Train an image classifier with fnn."""

    model: Literal["lenet5", "mlp", "resnet20"] = "lenet5"
    data: Literal["digits", "mnist", "fashion_mnist", "cifar10"] = "digits"
    root: Path = Path("data")
    """Folder of the data files, the one that holds MNIST/raw, FashionMNIST/raw or cifar-10-batches-bin."""
    download: bool = False
    """Download the data set into --root if it is not there."""
    augment: bool = False
    """Change the training images at random, inside the compiled step: digits are moved, turned and scaled a little,
    clothes and photographs moved and mirrored."""
    epochs: int = 20
    batch_size: int = 64
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    """mse compares the outputs with one-hot labels."""
    label_smoothing: float = 0.1
    """Of the training cross entropy."""
    optimizer: Literal["adam", "sgd"] = "adam"
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 0.0
    """Of weights, not of biases; decoupled in adam."""
    lr: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "plateau"] = "cosine"
    """cosine: linear warm-up over the first tenth of the steps, then a cosine down to zero. plateau: --lr, a third of
    it whenever the loss of held-out images has not improved for 3 epochs."""
    clip: float = 0.0
    """Greatest norm of the gradients, taken over all parameters; 0 lets them be."""
    accumulate: int = 1
    """Batches whose mean gradient makes one step of the optimizer."""
    ema: float = 0.0
    """Decay of the average of the weights with which the network is evaluated and saved; 0 takes the last weights."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; its weights are float32."""
    early_stopping: int = 0
    """Stop after so many epochs without a better loss on held-out images, with the best weights; 0 never does. For
    this and for --schedule plateau a tenth of the training images is held out: test images decide nothing."""
    folds: int = 0
    """Train so many networks on the training images without one of so many parts, which it is tested on, in the folders
    fold_1, ... of --out; prints mean and standard deviation."""
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes an accelerator where there is one."""
    compile: bool = True
    strict: bool = False
    """Make it an error if a second graph is compiled."""
    out: Path = Path("out/train_image")
    """Folder for what the run writes."""
    resume: bool = False
    """Go on with the run in --out, or start where there is none."""
    overwrite: bool = False
    """Let a new run take the place of an unfinished one in --out."""
    tensorboard: bool = False
    """Write numbers, weights, options and the graph of the step to --out/tensorboard, too."""
    profile: bool = False
    """Record a few steps with torch's profiler in --out/profile."""


NO_MATTER = ("root", "download", "device", "compile", "strict", "out", "resume", "overwrite", "tensorboard", "profile")
"""Options with which a run that goes on may differ."""
BROKEN_OFF = ("interrupted", "terminated")


def run(config: Config) -> dict[str, float]:
    """Train once, or once a fold; returns loss and accuracy of the test images."""
    if config.epochs < 1 or config.folds == 1 or config.folds < 0:
        raise ValueError(f"--epochs must be at least 1, --folds 2 or more; got {config.epochs} and {config.folds}")
    device = train.device(config.device)
    distributed.init(device=device)  # of torchrun's processes, the first prints and writes
    images = load_images(config)
    fnn.summary(network(config), images.train[0][:1]).print()
    print(f"\n{images}, device {device}")
    return cross_validate(config, images) if config.folds else train_one(config, images)[0]


def cross_validate(config: Config, images: data.ImageDataset) -> dict[str, float]:
    """One network for each fold of the training images; the test images stay aside."""
    record = train.Record(config.out / "config.json", config)
    if not config.resume:
        if record.status() in ("running", *BROKEN_OFF) and not config.overwrite:
            raise FileExistsError(
                f"{config.out} holds unfinished folds; go on with them (--resume), replace them (--overwrite), or give "
                "another folder"
            )
        for stale in config.out.glob("fold_*"):  # else --resume could go on with what an earlier run has left
            if stale.name != "fold_1" and distributed.is_main():
                shutil.rmtree(stale)
    folds = data.KFold(images.train, config.folds, key=random.key(config.seed), stratify=images.train[1])
    results: list[dict[str, float]] = []
    for number, (part, held_out) in enumerate(folds, 1):
        print(f"\nfold {number} of {config.folds}: {len(part[1])} training and {len(held_out[1])} test images")
        fold = dataclasses.replace(images, name=f"{images.name}, fold {number}", train=part, test=held_out)
        result, status = train_one(dataclasses.replace(config, out=config.out / f"fold_{number}"), fold)
        results += [] if status in BROKEN_OFF else [result]
        record.write(status if status in BROKEN_OFF else "running", folds=results)
        if status in BROKEN_OFF:
            return result
    summary: dict[str, float] = {}
    for name in results[0]:
        values = [result[name] for result in results]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        summary |= {name: mean, f"{name}_std": deviation}
        listed = ", ".join(f"{value:.4f}" for value in values)
        print(f"{name} of {config.folds} folds: {mean:.4f} +- {deviation:.4f}  ({listed})")
    record.write("finished", folds=results, test=summary)
    return summary


def train_one(config: Config, images: data.ImageDataset) -> tuple[dict[str, float], str]:
    """One network; returns what it is worth on the test images, and how the run ended."""
    device = train.device(config.device)
    mesh = distributed.init(device=device)  # of all processes: each takes its part of every batch
    init_key, order_key, step_key, split_key = random.split(random.key(config.seed, device), 4).unbind()
    part, watched = images.train, images.test
    if config.early_stopping or config.schedule == "plateau":
        part, watched = data.split(part, (0.9, 0.1), key=split_key, stratify=part[1])
    place = {"device": device, "shard": mesh}
    batches = data.Loader(part, config.batch_size, key=order_key, **place)
    watched, test = (data.Loader(x, 256 * mesh.size(), remainder="pad", **place) for x in (watched, images.test))

    net = network(config)
    if config.precision == "bfloat16":
        net = nn.Cast(net, nn.Policy(compute=torch.bfloat16))
    params, state = net.init(init_key, part[0][:1])

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

    optimizer = make_optimizer(config, steps=max(1, config.epochs * len(batches) // config.accumulate))
    options = {"mesh": mesh, "compile": config.compile, "strict": config.strict}
    step = train.make_step(loss_fn, optimizer, sync_batch_norm=True, **options)
    eval_step = train.make_eval(metric_fn, **options)
    train_state = train.TrainState.create(params, optimizer, step_key, state=state)

    def averaged(train_state):
        """The state to evaluate: with --ema that of the averaged weights."""
        if not config.ema:
            return train_state
        return train_state.replace(params=optim.eval_params(train_state.opt_state, train_state.params))

    record = train.Record(
        config.out / "config.json", config, preprocessing=images.preprocessing, classes=images.classes
    )
    numbers = {name: value for name, value in dataclasses.asdict(config).items() if name not in NO_MATTER}
    callbacks = [record, train.Progress()]
    if config.early_stopping:
        callbacks.append(train.EarlyStopping("eval_loss", patience=config.early_stopping))
    if config.schedule == "plateau":
        callbacks.append(train.ReduceOnPlateau("eval_loss", patience=3, factor=1 / 3))
    if config.tensorboard:
        callbacks.append(train.TensorBoard(config.out / "tensorboard", graph=True, histograms=1, config=numbers))
    if config.profile:
        callbacks.append(train.Profile(config.out / "profile"))

    out, started, failure = config.out, time.perf_counter(), None
    try:
        train_state, history = train.fit(
            step,
            train_state,
            batches,
            epochs=config.epochs,
            eval=lambda train_state: train.evaluate(eval_step, averaged(train_state), watched),
            callbacks=callbacks,
            checkpoints=train.Checkpointer(out / "checkpoints", config=numbers, overwrite=config.overwrite),
            resume=config.resume,
        )
    except train.NonFiniteError as error:  # keep the weights, which are finite, then say what happened
        failure, train_state, history = error, error.train_state, error.history
    seconds = time.perf_counter() - started

    final = averaged(train_state)
    result = train.evaluate(eval_step, final, test)
    interop.save_safetensors({"params": final.params, "state": final.state}, out / "model.safetensors")
    if history.rows:
        history.to_csv(out / "metrics.csv")
        history.plot(out / "curves.png")
    if distributed.is_main():
        logits = net(final.params, images.test[0][:32].to(device), state=final.state)
        plot_predictions(images, logits.argmax(-1).cpu(), out / "predictions.png")
    status = "not finite" if failure else history.stopped or "finished"
    values = {name: value if math.isfinite(value) else None for name, value in result.items()}
    record.write(status, error=str(failure) if failure else None, steps=int(train_state.step), test=values)
    print(f"\ntest accuracy {result['accuracy']:.4f}, loss {result['loss']:.4f}, after {seconds:.1f} s ({status})")
    print(f"wrote config, weights, metrics, curves and predictions to {out}")
    if failure is not None:
        raise failure
    if status in BROKEN_OFF:
        print(f"the run is saved in {out / 'checkpoints'}; the same command with --resume goes on with it")
    return result, status


def network(config: Config) -> nn.Layer:
    return models.mlp((256, 64)) if config.model == "mlp" else getattr(models, config.model)()


def load_images(config: Config) -> data.ImageDataset:
    """The images, in the size that the model wants."""
    if config.data == "cifar10":
        return data.cifar10(config.root, download=config.download)
    if config.data == "digits":
        return data.digits(size=8 if config.model == "mlp" else 32)
    read = data.mnist if config.data == "mnist" else data.fashion_mnist
    return read(config.root, download=config.download, pad=0 if config.model == "mlp" else 2)


def augmentation(config: Config) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What leaves the labels as they are: a mirrored digit is none."""
    if config.data in ("cifar10", "fashion_mnist"):
        return data.augment.compose(data.augment.flip(), data.augment.crop(4 if config.data == "cifar10" else 2))
    return data.augment.affine(degrees=10, translate=0.05, scale=(0.9, 1.1), padding_mode="border")


def make_optimizer(config: Config, steps: int) -> optim.GradientTransformation:
    lr = config.lr if config.schedule == "plateau" else optim.warmup_cosine(0.0, config.lr, steps // 10, steps)
    decay = {"weight_decay": config.weight_decay, "weight_decay_mask": lambda path, leaf: leaf.ndim > 1}
    optimizer = optim.adamw(lr, **decay) if config.optimizer == "adam" else optim.sgd(lr, config.momentum, **decay)
    if config.clip:
        optimizer = optim.chain(optim.clip_by_global_norm(config.clip), optimizer)
    if config.ema:
        optimizer = optim.ema_params(optimizer, config.ema)
    return optim.accumulate(config.accumulate, optimizer) if config.accumulate > 1 else optimizer


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


if __name__ == "__main__":
    try:
        run(tyro.cli(Config, description=__doc__))
    except (OSError, ValueError, ImportError, train.NonFiniteError) as error:
        sys.exit(f"train_image: {error}")
