"""CIFAR-10 to 94 % in seconds on one GPU: the recipe of airbench94_muon as pure functions.

    python examples/airbench.py --root data --download               # 8 epochs over CIFAR-10
    python examples/airbench.py --width 16                           # without its files: synthetic images of that shape

What makes it fast, each where it is used: the whole data set on the device, a first convolution that whitens patches,
filters that start as the identity, BatchNorm without scale and with little memory, Muon on filters of fixed norm,
mirror images in turn instead of by chance, labels smoothed a good deal, bfloat16, and six views of each test image.

Source: K. Jordan, 94 % on CIFAR-10 in 3.29 seconds on a single GPU, 2024, https://arxiv.org/abs/2404.00498, and the
version with Muon, https://github.com/KellerJordan/cifar10-airbench, which has no lookahead. Differences: weights stay
float32 under bfloat16 arithmetic, and the graph is Inductor's default one.

Writes to --out: metrics.csv, curves.png, model.safetensors, config.json, and checkpoints, from which --resume goes on,
bit for bit.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro

import fnn
from fnn import data, distributed, interop, losses, nn, optim, random, train, tree
from fnn.nn.initializers import fan_in_uniform


@dataclasses.dataclass(frozen=True)
class Config:
    """Train airbench's network with fnn."""

    root: Path = Path("data")
    """Folder that holds cifar-10-batches-bin. Without it images are synthetic, and only the speed means something."""
    download: bool = False
    """Download CIFAR-10 into --root if it is not there."""
    images: int = 0
    """Synthetic training images; 0 makes 50,000, as CIFAR-10 has, and on a CPU 512."""
    width: int = 64
    """Channels of the first group; the others have four times as many."""
    epochs: int = 8
    batch_size: int = 2000
    lr: float = 0.24
    """Of the filters, with Muon. All learning rates fall in a line to zero."""
    bias_lr: float = 0.053
    head_lr: float = 0.67
    """These two, with SGD, are for one image: the loss is summed over the batch."""
    weight_decay: float = 2e-6
    """For one image, of biases and head."""
    whiten_bias_epochs: int = 3
    """Epochs in which the bias of the whitening layer learns."""
    label_smoothing: float = 0.2
    translate: int = 2
    """Greatest shift of a training image, in pixels."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the network computes in; auto is bfloat16 on CUDA."""
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes an accelerator where there is one."""
    compile: bool = True
    strict: bool = False
    """Make it an error if a second graph is compiled."""
    out: Path = Path("out/airbench")
    """Folder for what the run writes."""
    resume: bool = False
    """Go on with the run in --out, or start where there is none."""
    overwrite: bool = False
    """Let a new run take the place of an unfinished one in --out."""
    tensorboard: bool = False
    """Write numbers, weights and options to --out/tensorboard, too."""
    profile: bool = False
    """Record a few steps with torch's profiler in --out/profile."""


NO_MATTER = ("root", "download", "device", "compile", "strict", "out", "resume", "overwrite", "tensorboard", "profile")
"""Options with which a run that goes on may differ."""


def run(config: Config) -> dict[str, float]:
    """Train; returns loss and accuracy of the test images, of one view and of six."""
    if config.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {config.epochs}")
    device = train.device(config.device)
    mesh = distributed.init(device=device)
    init_key, order_key, mirror_key, step_key, data_key = random.split(random.key(config.seed, device), 5).unbind()
    images = load_images(config, data_key)
    half = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    net: nn.Layer = network(config.width, len(images.classes))
    fnn.summary(net, images.train[0][:1]).print()
    print(f"\n{images}, device {device}, computing in {'bfloat16' if half else 'float32'}")
    params, state = net.init(init_key, images.train[0][:1])
    params["whiten"]["weight"] = whitening(images.train[0][:5000].to(device))
    params["head"]["weight"] /= params["head"]["weight"].std()
    if half:
        net = nn.Cast(net, nn.Policy(compute=torch.bfloat16))
    move = data.augment.crop(config.translate)

    def loss_fn(params, state, batch, key):
        x, labels, mirrored = batch
        x = move(key, torch.where(mirrored.reshape(-1, 1, 1, 1), x.flip(-1), x))
        logits, state = net.apply(params, state, x, train=True)
        accuracy = (logits.argmax(-1) == labels).float().mean()
        loss = losses.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        return loss, (state, {"accuracy": accuracy})

    def metric_fn(params, state, batch):
        x, labels, _ = batch
        views, shares = six_views(x)
        logits = net(params, views.flatten(0, 1), state=state).unflatten(0, views.shape[:2])
        loss = losses.cross_entropy(logits[0], labels, reduction="none")
        scores = {"accuracy": logits[0], "accuracy_6_views": torch.tensordot(shares, logits, 1)}
        return {"loss": loss, **{name: score.argmax(-1) == labels for name, score in scores.items()}}

    mirrored = random.bernoulli(mirror_key, 0.5, (len(images.train[1]),)).to(images.train[1].device)
    size = min(config.batch_size, len(mirrored))
    place = {"device": device, "shard": mesh}
    batches = Alternating(data.Loader((*images.train, mirrored), size, key=order_key, **place))
    test_size = min(size, len(images.test[1]) // mesh.size() * mesh.size())
    test = data.Loader(images.test, test_size, remainder="pad", **place)
    optimizer = make_optimizer(config, size, len(batches))
    options = {"mesh": mesh, "compile": config.compile, "strict": config.strict}
    step = train.make_step(loss_fn, optimizer, sync_batch_norm=True, **options)
    eval_step = train.make_eval(metric_fn, **options)
    train_state = train.TrainState.create(params, optimizer, step_key, state=state)

    record = train.Record(
        config.out / "config.json", config, data=images.name, preprocessing=images.preprocessing, classes=images.classes
    )
    numbers = {name: value for name, value in dataclasses.asdict(config).items() if name not in NO_MATTER}
    callbacks = [record, train.Progress()]
    if config.tensorboard:
        callbacks.append(train.TensorBoard(config.out / "tensorboard", histograms=1, config=numbers))
    if config.profile:
        callbacks.append(train.Profile(config.out / "profile"))

    out, failure = config.out, None
    try:
        train_state, history = train.fit(
            step,
            train_state,
            batches,
            epochs=config.epochs,
            eval=lambda train_state: train.evaluate(eval_step, train_state, test),
            callbacks=callbacks,
            log_every=len(batches),
            checkpoints=train.Checkpointer(out / "checkpoints", config=numbers, overwrite=config.overwrite),
            resume=config.resume,
        )
    except train.NonFiniteError as error:  # keep the weights, which are finite, then say what happened
        failure, train_state, history = error, error.train_state, error.history

    result = train.evaluate(eval_step, train_state, test)
    interop.save_safetensors({"params": train_state.params, "state": train_state.state}, out / "model.safetensors")
    speed = math.nan
    if history.rows:
        history.to_csv(out / "metrics.csv")
        history.plot(out / "curves.png")
        speed = statistics.median(history["examples_per_second"])
    status = "not finite" if failure else history.stopped or "finished"
    values = {name: value if math.isfinite(value) else None for name, value in result.items()}
    error = str(failure) if failure else None
    record.write(status, error=error, steps=int(train_state.step), images_per_second=speed, test=values)
    print(
        f"\ntest accuracy {result['accuracy']:.4f}, of six views {result['accuracy_6_views']:.4f} ({status}); "
        f"{speed:,.0f} training images/s, compiled in {step.compile_seconds:.0f} s"
    )
    print(f"wrote config, weights, metrics and curves to {out}")
    if failure is not None:
        raise failure
    if history.stopped:
        print(f"the run is saved in {out / 'checkpoints'}; the same command with --resume goes on with it")
    return {**result, "images_per_second": speed}


def network(width: int, classes: int) -> nn.Sequential:
    """Whitened patches, three groups of two convolutions, one linear layer: input (N, 3, 32, 32)."""

    def group(channels: int) -> nn.Sequential:
        conv = nn.Conv2d(channels, 3, padding="same", bias=False, weight_init=identity)
        # The statistics are those of the last few batches: in 200 steps the weights leave older ones behind.
        norm = nn.BatchNorm(eps=1e-12, momentum=0.4)
        first = {"conv1": conv, "pool": nn.MaxPool2d(2), "norm1": norm, "gelu1": nn.gelu}
        return nn.Sequential({**first, "conv2": conv, "norm2": norm, "gelu2": nn.gelu})

    return nn.Sequential(
        {
            "whiten": nn.Conv2d(2 * 3 * 2 * 2, 2),
            "gelu": nn.gelu,
            "group1": group(width),
            "group2": group(4 * width),
            "group3": group(4 * width),
            "pool": nn.MaxPool2d(3),
            "flatten": nn.Flatten(),
            "head": nn.Linear(classes, bias=False),
            "scale": lambda logits: logits / (4 * width),
        }
    )


def identity(key, shape, dtype=torch.float32):
    """Filters of which the first hand a channel on as it is (Dirac), and the others start as usual."""
    weight, n = fan_in_uniform(key, shape, dtype), min(shape[:2])
    weight[:n] = 0
    weight[range(n), range(n), 1, 1] = 1
    return weight


def whitening(images: torch.Tensor, eps: float = 5e-4) -> torch.Tensor:
    """Filters (24, 3, 2, 2): those that make 2 x 2 patches of images uncorrelated, of variance 1, and minus them."""
    patches = F.unfold(images, 2).transpose(1, 2).flatten(0, 1)
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (directions / (variances + eps).sqrt()).T.reshape(-1, 3, 2, 2)
    return torch.cat([filters, -filters])


def six_views(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(6, n, 3, 32, 32): as is, moved up left, moved down right, and all that mirrored; and the weight of each view."""
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    views = [x, padded[..., 2:, 2:], padded[..., :-2, :-2]]
    return torch.stack([*views, *(view.flip(-1) for view in views)]), x.new_tensor([2, 1, 1, 2, 1, 1]) / 8


def make_optimizer(config: Config, batch_size: int, steps_per_epoch: int) -> optim.GradientTransformation:
    """Muon for filters, SGD for biases and head; whitening filters and BatchNorm's scales stay as they are."""
    steps = config.epochs * steps_per_epoch

    def sgd(lr: float, steps: int) -> optim.GradientTransformation:
        lr *= batch_size  # the loss here is the mean over the batch
        decay = config.weight_decay * batch_size / lr
        return optim.sgd(optim.linear(lr, 0.0, steps), 0.85, nesterov=True, weight_decay=decay)

    groups = {
        "filters": muon_of_filters(optim.linear(config.lr, 0.0, steps)),
        "whiten": sgd(config.bias_lr, config.whiten_bias_epochs * steps_per_epoch),
        "biases": sgd(config.bias_lr, steps),
        "head": sgd(config.head_lr, steps),
    }
    labels = {"whiten.bias": "whiten", "head.weight": "head", "*.bias": "biases", "*": "filters"}
    frozen = lambda path, leaf: path == "whiten.weight" or ("norm" in path and path.endswith("weight"))  # noqa: E731
    return optim.freeze(optim.by_label(groups, labels), frozen)


def muon_of_filters(lr: optim.Schedule) -> optim.GradientTransformation:
    """Muon on filters (out, in, 3, 3) as matrices (out, 9 in), each brought to the norm sqrt(out) before its step."""
    muon = optim.muon(lr, momentum=0.6, ns_steps=3, weight_decay=0.0)

    def matrices(filters: Any) -> Any:
        return tree.map(lambda leaf: leaf.flatten(1), filters)

    def update(grads: Any, opt_state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, opt_state = muon.update(matrices(grads), opt_state, matrices(params), **extra)

        def scaled(u: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
            return (len(p) ** 0.5 / torch.linalg.vector_norm(p) - 1) * p + u.reshape(p.shape)

        return tree.map(scaled, updates, params), opt_state

    return optim.GradientTransformation(lambda params: muon.init(matrices(params)), update)


class Alternating:
    """The batches (images, labels, mirrored) of a loader; what is mirrored in one epoch is not in the next.

    In two epochs the network sees each image both ways, where chance would show it one way twice half of the time.
    """

    def __init__(self, loader: data.Loader):
        self.loader, self.identity = loader, {**loader.identity, "mirror": "alternating"}
        self.shard = loader.shard

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    def epoch(self, n: int, start: int = 0) -> Iterator[Any]:
        for images, labels, mirrored in self.loader.epoch(n, start):
            yield images, labels, mirrored ^ (n % 2 == 1)


def load_images(config: Config, key: torch.Tensor) -> data.ImageDataset:
    """CIFAR-10, or noise with a coloured half that tells the label."""
    if config.download or (config.root / "cifar-10-batches-bin").exists():
        return data.cifar10(config.root, download=config.download)
    count = config.images or (512 if key.device.type == "cpu" else 50_000)
    print(f"no cifar-10-batches-bin in {config.root}, so {count:,} synthetic images: their accuracy means nothing")
    noise_key, label_key = random.split(key).unbind()
    total = count + count // 5
    labels = random.randint(label_key, (total,), 0, 10)
    images = random.normal(noise_key, (total, 3, 32, 32))
    half = torch.arange(32, device=key.device) // 16 == (labels // 5).reshape(-1, 1)
    colour = torch.arange(1, 4, device=key.device) * (labels % 5 - 2).reshape(-1, 1) / 4
    images = images + torch.where(half.reshape(-1, 1, 32, 1), colour.reshape(-1, 3, 1, 1), 0.0)
    parts = (images[:count], labels[:count]), (images[count:], labels[count:])
    return data.ImageDataset("synthetic", *parts, tuple(str(label) for label in range(10)), {})


if __name__ == "__main__":
    try:
        run(tyro.cli(Config, description=__doc__))
    except (OSError, ValueError, ImportError, train.NonFiniteError) as error:
        sys.exit(f"airbench: {error}")
