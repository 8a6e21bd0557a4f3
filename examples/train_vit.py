"""Train a small vision transformer: mixed images, label smoothing, AdamW with warm-up and a cosine.

    python examples/train_vit.py                                     # 2 x 2 patches of scikit-learn's digits
    python examples/train_vit.py --data cifar10 --root data --augment --mix cutmix --alpha 1 --layers 6 --heads 6 \\
        --width 192 --batch-size 256 --lr 1e-3 --epochs 100 --precision bfloat16

Writes to --out: metrics.csv, curves.png, model.safetensors, config.json, and checkpoints, from which --resume goes on,
bit for bit.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

import fnn
from fnn import data, distributed, interop, losses, models, nn, optim, random, train


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a vision transformer with fnn."""

    data: Literal["digits", "mnist", "fashion_mnist", "cifar10"] = "digits"
    root: Path = Path("data")
    """Folder of the data files, the one that holds MNIST/raw, FashionMNIST/raw or cifar-10-batches-bin."""
    download: bool = False
    """Download the data set into --root if it is not there."""
    augment: bool = False
    """Move the training images by up to an eighth of their side; photographs and clothes are mirrored, too. Of the
    digits' 8 pixels one is too much."""
    mix: Literal["none", "mixup", "cutmix"] = "mixup"
    """mixup blends each training image with another, cutmix puts a box of another into it; labels likewise."""
    alpha: float = 0.2
    """The shares of the two images follow Beta(alpha, alpha): 1 makes all equally likely, less leaves most images
    nearly as they are."""
    patch: int = 0
    """Side of a patch; 0 takes a quarter of that of the digits (2), an eighth of that of larger images (4)."""
    layers: int = 2
    heads: int = 4
    width: int = 64
    """Numbers that stand for a patch; the hidden layers between them are twice as wide."""
    dropout: float = 0.0
    epochs: int = 40
    batch_size: int = 64
    lr: float = 4e-3
    """Peak learning rate: linear warm-up over the first tenth of the steps, then a cosine down to zero."""
    weight_decay: float = 0.05
    """Of the matrices, decoupled."""
    label_smoothing: float = 0.1
    """Of the training cross entropy."""
    clip: float = 1.0
    """Greatest norm of the gradients, taken over all parameters."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; its weights are float32."""
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes an accelerator where there is one."""
    compile: bool = True
    strict: bool = False
    """Make it an error if a second graph is compiled."""
    out: Path = Path("out/train_vit")
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


def run(config: Config) -> dict[str, float]:
    """Train; returns loss and accuracy of the test images."""
    if config.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {config.epochs}")
    device = train.device(config.device)
    mesh = distributed.init(device=device)
    images = load_images(config)
    init_key, order_key, step_key = random.split(random.key(config.seed, device), 3).unbind()
    classes, (_, side, _) = len(images.classes), images.image_shape
    patch = config.patch or (2 if side < 28 else 4)
    net: nn.Layer = models.vit(
        classes, side, patch, config.layers, config.heads, config.width, 2 * config.width, config.dropout
    )
    fnn.summary(net, images.train[0][:1]).print()
    print(f"\n{images}, {(side // patch) ** 2} patches, device {device}")
    if config.precision == "bfloat16":
        net = nn.Cast(net, nn.Policy(compute=torch.bfloat16))
    params, state = net.init(init_key, images.train[0][:1])

    change = data.augment.crop(side // 8)
    if config.data in ("cifar10", "fashion_mnist"):  # a mirrored digit is none
        change = data.augment.compose(data.augment.flip(), change)
    mix = {"mixup": data.augment.mixup, "cutmix": data.augment.cutmix}.get(config.mix)

    def loss_fn(params, state, batch, key):
        x, labels = batch
        change_key, mix_key, key = random.split(key, 3).unbind()
        x = change(change_key, x) if config.augment else x
        x, targets = mix(config.alpha, classes)(mix_key, x, labels) if mix else (x, labels)
        logits, state = net.apply(params, state, x, key=key, train=True)
        loss = losses.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
        # The greater share of a mixture is what it should be taken for.
        wanted = targets.argmax(-1) if mix else labels
        return loss, (state, {"accuracy": (logits.argmax(-1) == wanted).float().mean()})

    def metric_fn(params, state, batch):
        x, labels, _ = batch
        logits = net(params, x, state=state)
        loss = losses.cross_entropy(logits, labels, reduction="none")
        return {"loss": loss, "accuracy": logits.argmax(-1) == labels}

    batches = data.Loader(images.train, config.batch_size, key=order_key, device=device, shard=mesh)
    test = data.Loader(images.test, 256 * mesh.size(), remainder="pad", device=device, shard=mesh)
    steps = config.epochs * len(batches)
    lr = optim.warmup_cosine(0.0, config.lr, steps // 10, steps)
    optimizer = optim.chain(
        optim.clip_by_global_norm(config.clip),
        optim.adamw(lr, weight_decay=config.weight_decay, weight_decay_mask=decays),
    )
    step = train.make_step(loss_fn, optimizer, mesh=mesh, compile=config.compile, strict=config.strict)
    eval_step = train.make_eval(metric_fn, mesh=mesh, compile=config.compile, strict=config.strict)
    train_state = train.TrainState.create(params, optimizer, step_key, state=state)

    record = train.Record(
        config.out / "config.json", config, preprocessing=images.preprocessing, classes=images.classes
    )
    numbers = {name: value for name, value in dataclasses.asdict(config).items() if name not in NO_MATTER}
    callbacks = [record, train.Progress()]
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
            eval=lambda train_state: train.evaluate(eval_step, train_state, test),
            callbacks=callbacks,
            checkpoints=train.Checkpointer(out / "checkpoints", config=numbers, overwrite=config.overwrite),
            resume=config.resume,
        )
    except train.NonFiniteError as error:  # keep the weights, which are finite, then say what happened
        failure, train_state, history = error, error.train_state, error.history
    seconds = time.perf_counter() - started

    result = train.evaluate(eval_step, train_state, test)
    interop.save_safetensors({"params": train_state.params, "state": train_state.state}, out / "model.safetensors")
    if history.rows:
        history.to_csv(out / "metrics.csv")
        history.plot(out / "curves.png")
    status = "not finite" if failure else history.stopped or "finished"
    values = {name: value if math.isfinite(value) else None for name, value in result.items()}
    record.write(status, error=str(failure) if failure else None, steps=int(train_state.step), test=values)
    print(f"\ntest accuracy {result['accuracy']:.4f}, loss {result['loss']:.4f}, after {seconds:.1f} s ({status})")
    print(f"wrote config, weights, metrics and curves to {out}")
    if failure is not None:
        raise failure
    if history.stopped:
        print(f"the run is saved in {out / 'checkpoints'}; the same command with --resume goes on with it")
    return result


def load_images(config: Config) -> data.ImageDataset:
    """The images: 8 x 8 digits, or 32 x 32."""
    if config.data == "digits":
        return data.digits()
    read = {"mnist": data.mnist, "fashion_mnist": data.fashion_mnist, "cifar10": data.cifar10}[config.data]
    return read(config.root, download=config.download)


def decays(path: str, leaf: torch.Tensor) -> bool:
    """Whether weight decay applies: not to biases, norms, the token of the class and the positions."""
    return leaf.ndim > 1 and path not in ("class_token", "encoder.pos_embedding")


if __name__ == "__main__":
    try:
        run(tyro.cli(Config, description=__doc__))
    except (OSError, ValueError, ImportError, train.NonFiniteError) as error:
        sys.exit(f"train_vit: {error}")
