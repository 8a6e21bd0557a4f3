"""Train privately with DP-SGD: what the network learns hides whether any one example was in its data.

    python examples/dp_sgd.py                                   # scikit-learn's digits
    python examples/dp_sgd.py --data mnist --root data --batch-size 512 --epochs 20 --delta 1e-5

Each step draws its examples at random (Poisson sampling), clips the gradient of every single one of them to the same
norm (`fnn.clipped_grad`), adds Gaussian noise to the sum, and takes a step of SGD. The (epsilon, delta) that all steps
together spend comes from the Renyi differential privacy of the subsampled Gaussian mechanism. The same network trained
without privacy stands beside it.

What holds, and what does not: the guarantee is for the weights, if the seed stays secret. It leaves out what was
chosen by looking at the data before: options, and here the mean and deviation by which images are standardised. The
training numbers that are printed are not private. The noise is float32, and its generator not a cryptographic one.

Writes to --out: metrics.csv, curves.png, privacy.png, model.safetensors, config.json, and checkpoints, from which
--resume goes on, bit for bit.

Source: Abadi et al., Deep learning with differential privacy, 2016; Mironov, Talwar, Zhang, Renyi differential privacy
of the sampled Gaussian mechanism, 2019; Balle et al., Hypothesis testing interpretations and Renyi differential
privacy, 2020, for the step from Renyi differential privacy to (epsilon, delta).
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure

import fnn
from fnn import data, distributed, interop, losses, models, ops, optim, random, train, tree


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a classifier of digits with differential privacy."""

    data: Literal["digits", "mnist"] = "digits"
    root: Path = Path("data")
    """Folder of the MNIST files, the one that holds MNIST/raw."""
    epochs: int = 30
    """One epoch is as many steps as would see every example once on average."""
    batch_size: int = 256
    """Examples in a step, on average."""
    lr: float = 0.1
    """Of SGD with momentum 0.9, for the mean gradient."""
    max_norm: float = 1.0
    """Norm to which the gradient of each example is clipped."""
    noise: float = 4.0
    """Deviation of the noise, as a multiple of --max-norm; more noise spends less privacy."""
    delta: float = 1e-5
    """Of (epsilon, delta); to be well below one over the number of examples."""
    chunk_size: int | None = None
    """Examples whose gradients are in memory together; all by default."""
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes an accelerator where there is one."""
    compile: bool = True
    strict: bool = False
    """Make it an error if a second graph is compiled."""
    out: Path = Path("out/dp_sgd")
    """Folder for what the run writes."""
    resume: bool = False
    """Go on with the run in --out, or start where there is none."""
    overwrite: bool = False
    """Let a new run take the place of an unfinished one in --out."""
    tensorboard: bool = False
    """Write the numbers to --out/tensorboard, too."""
    profile: bool = False
    """Record a few steps with torch's profiler in --out/profile."""


NO_MATTER = ("root", "device", "compile", "strict", "out", "resume", "overwrite", "tensorboard", "profile")
"""Options with which a run that goes on may differ."""
ORDERS = range(2, 129)
"""Of the Renyi divergence; epsilon is the least that any of them gives."""


class PoissonLoader:
    """Batches (x, y, drawn) into which each example comes with probability `rate`, independently of the others.

    The steps are of one shape, so a batch has room for `capacity` examples and `drawn`, (capacity,) float, is 0 where
    that is not filled. More examples than that are drawn in a step with a probability under 1e-12, and would be left
    out. Batch n of an epoch depends on the key, the epoch and n alone, so a run can go on from any of them.
    The processes of the mesh `shard` have its examples in turn.
    """

    def __init__(self, examples, batch_size: int, *, key, shard=None):
        self.examples, self.key, self.size, self.shard = examples, key, len(examples[0]), shard
        self.mine = slice(shard.get_rank(), None, shard.size()) if shard else slice(None)
        self.rate = batch_size / self.size
        self.capacity = next(n for n in range(batch_size, self.size + 1) if overflow(n, self.size, self.rate) < 1e-12)

    def __len__(self) -> int:
        return max(1, round(1 / self.rate))

    @property
    def identity(self) -> dict:
        return {"kind": "Poisson", "size": self.size, "rate": self.rate, "key": self.key.tolist()}

    def __iter__(self):
        return self.epoch(0)

    def epoch(self, n: int, start: int = 0):
        epoch_key = random.fold_in(self.key, n)
        for batch in range(start, len(self)):
            chosen = random.bernoulli(random.fold_in(epoch_key, batch), self.rate, (self.size,))
            places = (~chosen).long().argsort(stable=True)[: self.capacity][self.mine]  # the chosen ones first
            yield (*(leaf[places] for leaf in self.examples), chosen[places].float())


def overflow(capacity: int, size: int, rate: float) -> float:
    """Chernoff's bound on the probability that more than `capacity` of `size` examples are drawn."""
    share = capacity / size
    if share <= rate or share == 1:
        return float(share < 1)
    return math.exp(-size * (share * math.log(share / rate) + (1 - share) * math.log((1 - share) / (1 - rate))))


def private_step(loss, optimizer, config: Config, mesh=None):
    """A pure step of DP-SGD, for `train.make_step(update=...)`.

    loss: `loss(params, x, y) -> (loss, accuracy)` of one example
    mesh: of the processes that have a part of the batch each. Noise is added to the sum of all their gradients, once:
        with one key it is the same on each of them
    """
    processes = (mesh.get_group().group_name, mesh.size()) if mesh else ("alone", 1)

    def of_drawn(params, x, y, drawn):  # what is not drawn has no gradient
        value, accuracy = loss(params, x, y)
        return drawn * value, (drawn * value, drawn * accuracy)

    gradient = fnn.clipped_grad(of_drawn, config.max_norm, has_aux=True, norms=True, chunk_size=config.chunk_size)

    def update(train_state, batch):
        params, state, opt_state, key, step = train_state.parts
        total, (values, accuracies), norms = gradient(params, *batch)
        clipped = (norms > config.max_norm).float()
        sums = torch.stack([each.sum() for each in (values, accuracies, clipped, batch[-1])])
        total, sums = tree.map(lambda leaf: ops.all_reduce(leaf, *processes), (total, sums))
        leaves, structure = tree.flatten(total)
        keys = random.split(random.fold_in(key, step), len(leaves)).unbind()
        deviation = config.noise * config.max_norm
        noisy = [leaf + deviation * random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
        # By the expected size: the actual one, too, says who was drawn.
        grads = tree.map(lambda leaf: leaf / config.batch_size, tree.unflatten(structure, noisy))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        means = sums[:3] / sums[3].clamp(min=1)
        metrics = dict(zip(("loss", "accuracy", "clipped"), means.unbind(), strict=True))
        after = train.TrainState(optim.apply_updates(params, updates), state, opt_state, key, step + 1)
        return after, metrics

    return update


def epsilon(steps: int, rate: float, noise: float, delta: float) -> float:
    """Epsilon of (epsilon, delta) after `steps` steps; any one example was added to the data or taken away.

    A step's Renyi divergence of integer order a is log(sum_k binomial(a, k) (1 - rate)^(a - k) rate^k
    exp((k^2 - k) / (2 noise^2))) / (a - 1), and those of the steps add up. `rate` is below 1.
    """
    least = math.inf
    for order in ORDERS:
        k = torch.arange(order + 1, dtype=torch.float64)
        ways = math.lgamma(order + 1) - (k + 1).lgamma() - (order - k + 1).lgamma()
        terms = ways + (order - k) * math.log1p(-rate) + k * math.log(rate) + k * (k - 1) / (2 * noise**2)
        divergence = steps * float(terms.logsumexp(0)) / (order - 1)
        least = min(least, divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1))
    return max(0.0, least)


def run(config: Config) -> dict[str, float]:
    """Train with and without privacy; returns the test accuracies and epsilon."""
    for name, least in (("epochs", 1), ("batch_size", 1), ("max_norm", 1e-9), ("noise", 1e-9), ("delta", 1e-300)):
        if not getattr(config, name) >= least:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(config, name)}")
    device = train.device(config.device)
    mesh = distributed.init(device=device)
    images = data.digits() if config.data == "digits" else data.mnist(config.root)
    examples = [leaf.to(device) for leaf in images.train]
    if not config.batch_size < len(examples[0]) or not config.delta < 1 / len(examples[0]):
        raise ValueError(
            f"--batch-size must be below the {len(examples[0])} training images and --delta below one over that, "
            f"got {config.batch_size} and {config.delta}"
        )
    init_key, order_key, step_key = random.split(random.key(config.seed, device), 3).unbind()
    net = models.mlp((64,), activation=torch.tanh)
    params, _ = net.init(init_key, examples[0][:1])

    def loss(params, x, y):
        logits = net(params, x.unsqueeze(0))
        return losses.cross_entropy(logits, y.unsqueeze(0)), (logits.argmax(-1) == y).float().squeeze(0)

    def loss_fn(params, state, batch, key):
        return losses.cross_entropy(net(params, batch[0]), batch[1]), (state, {})

    def metric_fn(params, state, batch):
        logits = net(params, batch[0])
        loss = losses.cross_entropy(logits, batch[1], reduction="none")
        return {"loss": loss, "accuracy": logits.argmax(-1) == batch[1]}

    place = {"device": device, "shard": mesh}
    sampled = PoissonLoader(examples, config.batch_size, key=order_key, shard=mesh)
    plain = data.Loader(images.train, config.batch_size, key=order_key, **place)
    test = data.Loader(images.test, 256 * mesh.size(), remainder="pad", **place)
    optimizer = optim.sgd(config.lr, 0.9)
    options = {"compile": config.compile, "strict": config.strict}
    private = train.make_step(update=private_step(loss, optimizer, config, mesh), **options)
    public = train.make_step(loss_fn, optimizer, mesh=mesh, **options)
    eval_step = train.make_eval(metric_fn, mesh=mesh, **options)

    def spent(train_state) -> float:
        return epsilon(int(train_state.step), sampled.rate, config.noise, config.delta)

    def evaluate(train_state) -> dict[str, float]:
        return train.evaluate(eval_step, train_state, test) | {"epsilon": spent(train_state)}

    print(f"{images}, device {device}")
    print(f"each image is drawn with probability {sampled.rate:.4f} a step; room for {sampled.capacity} in a batch")
    numbers = {name: value for name, value in dataclasses.asdict(config).items() if name not in NO_MATTER}
    record = train.Record(config.out / "config.json", config)
    callbacks: list[train.Callback] = [record, train.Progress()]
    if config.tensorboard:
        callbacks.append(train.TensorBoard(config.out / "tensorboard", config=numbers))
    if config.profile:
        callbacks.append(train.Profile(config.out / "profile"))
    train_state, history = train.fit(
        private,
        train.TrainState.create(params, optimizer, step_key),
        sampled,
        epochs=config.epochs,
        eval=evaluate,
        callbacks=callbacks,
        checkpoints=train.Checkpointer(config.out / "checkpoints", config=numbers, overwrite=config.overwrite),
        resume=config.resume,
    )
    result = train.evaluate(eval_step, train_state, test) | {"epsilon": spent(train_state)}
    interop.save_safetensors({"params": train_state.params}, config.out / "model.safetensors")
    if history.rows:
        history.to_csv(config.out / "metrics.csv")
        history.plot(config.out / "curves.png")
    if history.stopped is None:
        print("\nthe same network, steps and rate without privacy")
        public_state, _ = train.fit(
            public, train.TrainState.create(params, optimizer, step_key), plain, epochs=config.epochs
        )
        result["public_accuracy"] = train.evaluate(eval_step, public_state, test)["accuracy"]
        if distributed.is_main():
            plot(history, result["public_accuracy"], config, config.out / "privacy.png")
    record.write(history.stopped or "finished", steps=int(train_state.step), test=result)
    print(f"test accuracy {result['accuracy']:.4f} with (epsilon, delta) = ({result['epsilon']:.2f}, {config.delta:g})")
    if history.stopped is None:
        print(f"test accuracy {result['public_accuracy']:.4f} without privacy; wrote everything to {config.out}")
    else:
        print(f"{history.stopped}; saved in {config.out / 'checkpoints'}: the same command with --resume goes on")
    return result


def plot(history: train.History, public_accuracy: float, config: Config, path: Path) -> None:
    """Test accuracy over what it cost in privacy."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(title=f"{config.data}: accuracy and privacy, delta = {config.delta:g}")
    axes.plot(history["eval_epsilon"], history["eval_accuracy"], "o-", markersize=3, label="DP-SGD, after each epoch")
    axes.axhline(public_accuracy, color="black", linestyle="--", label="without privacy, after the last epoch")
    axes.set(xlabel="epsilon spent", ylabel="test accuracy", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        run(tyro.cli(Config, description=__doc__))
    except (OSError, ValueError, ImportError, train.NonFiniteError) as error:
        sys.exit(f"dp_sgd: {error}")
