"""Fine-tune a ResNet-18 that was trained on ImageNet: first a new head on the frozen trunk, then all of it.

    python examples/finetune.py                                      # torchvision's weights, downloaded once
    python examples/finetune.py --weights resnet18-f37072fd.pth      # the same from a file, without a network
    python examples/finetune.py --weights none --epochs 10           # from scratch, for comparison
    python examples/finetune.py --data cifar10 --root data --size 128 --augment --batch-size 128

Writes to --out: metrics.csv, curves.png, model.safetensors, config.json, and checkpoints, from which --resume goes on,
in either phase, bit for bit.
"""

import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

import fnn
from fnn import data, distributed, interop, losses, models, optim, random, train


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tune a ResNet-18 with fnn."""

    weights: str = "imagenet"
    """imagenet downloads torchvision's through torchvision, none starts from scratch, all else is the path of a .pth
    or .safetensors file with torchvision's names, whose head (fc) is left out."""
    width: int = 64
    """Channels of the first stage; torchvision's weights have 64."""
    data: Literal["digits", "mnist", "fashion_mnist", "cifar10"] = "digits"
    root: Path = Path("data")
    """Folder of the data files, the one that holds MNIST/raw, FashionMNIST/raw or cifar-10-batches-bin."""
    download: bool = False
    """Download the data set into --root if it is not there."""
    size: int = 32
    """Side to which the 32 x 32 images are enlarged. The weights have seen 224; more is better, and slower."""
    augment: bool = False
    """Change the training images at random: digits are moved, turned and scaled, others moved and mirrored."""
    head_epochs: int = 3
    """Epochs of the first phase: only the head learns, and BatchNorm keeps the statistics that came with the weights.
    There is none from scratch."""
    head_lr: float = 1e-2
    """Peak learning rate of that phase."""
    epochs: int = 5
    """Epochs of the second phase: everything learns, and so do the statistics."""
    lr: float = 1e-3
    """Peak learning rate of that phase; both warm up over a tenth of their steps, then follow a cosine down to zero."""
    weight_decay: float = 1e-2
    label_smoothing: float = 0.1
    batch_size: int = 64
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes an accelerator where there is one."""
    compile: bool = True
    strict: bool = False
    """Make it an error if a step is compiled twice."""
    out: Path = Path("out/finetune")
    """Folder for what the run writes."""
    resume: bool = False
    """Go on with the run in --out, or start where there is none."""
    overwrite: bool = False
    """Let a new run take the place of an unfinished one in --out."""
    tensorboard: bool = False
    """Write numbers, weights and options to --out/tensorboard, too."""
    profile: bool = False
    """Record a few steps of each phase with torch's profiler in --out/profile."""


NO_MATTER = ("root", "download", "device", "compile", "strict", "out", "resume", "overwrite", "tensorboard", "profile")
"""Options with which a run that goes on may differ."""
BROKEN_OFF = ("interrupted", "terminated")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels: what torchvision's weights want to have subtracted and divided by."""


def run(config: Config) -> dict[str, float]:
    """Both phases; returns loss and accuracy of the test images."""
    for name in ("head_epochs", "epochs"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    device = train.device(config.device)
    mesh = distributed.init(device=device)
    if not (config.resume or config.overwrite) and (
        status := train.Record(config.out / "config.json", config).status()
    ) not in (None, "finished"):
        raise FileExistsError(
            f"{config.out} holds an unfinished run ({status}); go on with it (--resume), let this one take its place "
            "(--overwrite), or give another folder"
        )
    images = load_images(config)
    init_key, order_key, step_key = random.split(random.key(config.seed, device), 3).unbind()
    net = models.resnet18(len(images.classes), config.width)
    params, state = net.init(init_key, images.train[0][:1])
    if config.weights != "none":
        params, state = with_weights(config.weights, params, state)
    fnn.summary(net, images.train[0][:1]).print()
    print(f"\n{images}, weights {config.weights}, device {device}")

    change = augmentation(config)

    def inputs(x):
        return x if config.size == x.shape[-1] else F.interpolate(x, (config.size, config.size), mode="bilinear")

    def loss_fn(learn_statistics: bool):
        def loss(params, state, batch, key):
            x, labels = batch
            change_key, key = random.split(key).unbind()
            x = inputs(change(change_key, x) if config.augment else x)
            # In training mode BatchNorm would normalise with the batch's statistics, which a frozen trunk never saw.
            logits, state = net.apply(params, state, x, key=key, train=learn_statistics)
            accuracy = (logits.argmax(-1) == labels).float().mean()
            value = losses.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            return value, (state, {"accuracy": accuracy})

        return loss

    def metric_fn(params, state, batch):
        x, labels, _ = batch
        logits = net(params, inputs(x), state=state)
        loss = losses.cross_entropy(logits, labels, reduction="none")
        return {"loss": loss, "accuracy": logits.argmax(-1) == labels}

    batches = data.Loader(images.train, config.batch_size, key=order_key, device=device, shard=mesh)
    test = data.Loader(images.test, 256 * mesh.size(), remainder="pad", device=device, shard=mesh)
    options = {"mesh": mesh, "compile": config.compile, "strict": config.strict}
    eval_step = train.make_eval(metric_fn, **options)

    def optimizer(lr: float, epochs: int) -> optim.GradientTransformation:
        steps = epochs * len(batches)
        schedule, matrices = optim.warmup_cosine(0.0, lr, steps // 10, steps), lambda path, leaf: leaf.ndim > 1
        return optim.adamw(schedule, weight_decay=config.weight_decay, weight_decay_mask=matrices)

    head = optim.freeze(optimizer(config.head_lr, config.head_epochs), lambda path, leaf: not path.startswith("fc."))
    phases = {"head": (head, config.head_epochs), "all": (optimizer(config.lr, config.epochs), config.epochs)}
    if config.weights == "none":
        del phases["head"]

    then = {"channels": 3, "mean": MEAN, "std": STD, "size": config.size}
    record = train.Record(
        config.out / "config.json", config, preprocessing=images.preprocessing, then=then, classes=images.classes
    )
    numbers = {name: value for name, value in dataclasses.asdict(config).items() if name not in NO_MATTER}

    folder = config.out / "checkpoints"
    # Else the second phase could go on with what an earlier run has left.
    if not config.resume and "head" in phases and distributed.is_main():
        shutil.rmtree(folder / "all", ignore_errors=True)

    started, failure, rows, epochs, train_state, status = time.perf_counter(), None, [], 0, None, None
    for name, (phase, phase_epochs) in phases.items():
        print(f"\nphase {name!r}: {phase_epochs} epochs")
        step = train.make_step(loss_fn(name == "all"), phase, sync_batch_norm=True, **options)
        train_state = train.TrainState.create(params, phase, step_key, state=state)
        train_state = train_state.replace(step=torch.full_like(train_state.step, epochs * len(batches)))
        epochs += phase_epochs
        callbacks: list[train.Callback] = [record, train.Progress()]
        if config.tensorboard:
            callbacks.append(train.TensorBoard(config.out / "tensorboard" / name, histograms=1, config=numbers))
        if config.profile:
            callbacks.append(train.Profile(config.out / "profile" / name))
        try:
            train_state, history = train.fit(
                step,
                train_state,
                batches,
                epochs=epochs,
                eval=lambda train_state: train.evaluate(eval_step, train_state, test),
                callbacks=callbacks,
                checkpoints=train.Checkpointer(folder / name, config=numbers, overwrite=config.overwrite),
                resume=config.resume,
            )
        except train.NonFiniteError as error:  # keep the weights, which are finite, then say what happened
            failure, train_state, history = error, error.train_state, error.history
        rows += history.rows
        params, state = train_state.params, train_state.state
        status = "not finite" if failure else history.stopped
        if status:
            break
    assert train_state is not None
    status, seconds = status or "finished", time.perf_counter() - started

    result = train.evaluate(eval_step, train_state, test)
    interop.save_safetensors({"params": params, "state": state}, config.out / "model.safetensors")
    history = train.History(rows)
    if history.rows:
        history.to_csv(config.out / "metrics.csv")
        history.plot(config.out / "curves.png")
    values = {name: value if math.isfinite(value) else None for name, value in result.items()}
    record.write(status, error=str(failure) if failure else None, steps=int(train_state.step), test=values)
    print(f"\ntest accuracy {result['accuracy']:.4f}, loss {result['loss']:.4f}, after {seconds:.1f} s ({status})")
    print(f"wrote config, weights, metrics and curves to {config.out}")
    if failure is not None:
        raise failure
    if status in BROKEN_OFF:
        print(f"the run is saved in {folder}; the same command with --resume goes on with it")
    return result


def with_weights(name: str, params, state):
    """The network with the weights called `name` in all but its head."""
    if name == "imagenet":
        data.torchvision()
        from torchvision.models import ResNet18_Weights

        weights = ResNet18_Weights.IMAGENET1K_V1
        try:
            found = weights.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"--weights imagenet: could not download {weights.url}: {error}; fetch this file where there is a "
                "network and give its path, --weights PATH, or start from scratch, --weights none"
            ) from error
    else:
        found = (interop.load_safetensors if name.endswith(".safetensors") else interop.load_pth)(name)
    try:
        body = {path: value for path, value in found.items() if path.partition(".")[0] != "fc"}
        trunk, state = interop.from_state_dict(body, {k: v for k, v in params.items() if k != "fc"}, state)
    except (AttributeError, TypeError, ValueError) as error:
        width = len(params["bn1"]["weight"])
        raise ValueError(f"--weights {name} does not fit a ResNet-18 of --width {width}: {error}") from error
    return {**trunk, "fc": params["fc"]}, state


def load_images(config: Config) -> data.ImageDataset:
    """The images with three channels, standardised as those that the weights have seen."""
    if config.data == "digits":
        images = data.digits(size=32)
    else:
        read = {"mnist": data.mnist, "fashion_mnist": data.fashion_mnist, "cifar10": data.cifar10}[config.data]
        images = read(config.root, download=config.download)
    mean, std = (torch.tensor(images.preprocessing[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    standardise = data.augment.normalize(MEAN, STD)

    def photographs(x: torch.Tensor) -> torch.Tensor:
        return standardise(random.key(0), (x * std + mean).expand(-1, 3, -1, -1))

    train_part, test = ((photographs(x), labels) for x, labels in (images.train, images.test))
    return dataclasses.replace(images, train=train_part, test=test)


def augmentation(config: Config) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What leaves the labels as they are: a mirrored digit is none."""
    if config.data in ("cifar10", "fashion_mnist"):
        return data.augment.compose(data.augment.flip(), data.augment.crop(4))
    return data.augment.affine(degrees=10, translate=0.05, scale=(0.9, 1.1), padding_mode="border")


if __name__ == "__main__":
    try:
        run(tyro.cli(Config, description=__doc__))
    except (OSError, ValueError, ImportError, train.NonFiniteError) as error:
        sys.exit(f"finetune: {error}")
