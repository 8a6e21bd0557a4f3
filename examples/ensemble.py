"""Train a deep ensemble in one compiled step: `vmap` of the step over networks.

    python examples/ensemble.py
    python examples/ensemble.py --members 20 --out out/ensemble20

Networks that differ in their seed alone, that is in their first weights and the order of their data, err in different
places. The mean of their probabilities is a little more often right than one network's and better calibrated, and it
is less sure where they disagree: on digits on their side, and on noise. `vmap` turns the step of one network into that
of all, over every part of the state but the step count, which they share; so `train.fit` runs it like any other.

Writes to --out: metrics.csv, curves.png, entropy.png, model.safetensors, config.json, and checkpoints, from which
--resume goes on, bit for bit.

Source: Lakshminarayanan, Pritzel, Blundell, Simple and scalable predictive uncertainty estimation using deep
ensembles, 2017; Guo et al., On calibration of modern neural networks, 2017, for the calibration error.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure

import fnn
from fnn import data, distributed, interop, losses, models, optim, random, train, tree


@dataclasses.dataclass(frozen=True)
class Config:
    """Train an ensemble of classifiers of scikit-learn's digits."""

    members: int = 8
    model: Literal["mlp", "lenet5"] = "mlp"
    epochs: int = 20
    batch_size: int = 64
    """Of each member."""
    lr: float = 3e-3
    """Peak learning rate of Adam: linear warm-up over the first tenth of the steps, then a cosine down to zero."""
    seed: int = 0
    """Member i is the network of seed `seed + i`, whatever the number of members."""
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes an accelerator where there is one."""
    compile: bool = True
    strict: bool = False
    """Make it an error if a second graph is compiled."""
    out: Path = Path("out/ensemble")
    """Folder for what the run writes."""
    resume: bool = False
    """Go on with the run in --out, or start where there is none."""
    overwrite: bool = False
    """Let a new run take the place of an unfinished one in --out."""
    tensorboard: bool = False
    """Write the numbers to --out/tensorboard, too."""
    profile: bool = False
    """Record a few steps with torch's profiler in --out/profile."""


NO_MATTER = ("device", "compile", "strict", "out", "resume", "overwrite", "tensorboard", "profile")
"""Options with which a run that goes on may differ."""


class Side:
    """Batches of all members side by side, (batch, members, ...), each member's in an order of its own."""

    def __init__(self, examples, batch_size: int, *, keys, **place):
        self.loaders = [data.Loader(examples, batch_size, key=key, **place) for key in keys]
        self.shard = self.loaders[0].shard

    def __len__(self) -> int:
        return len(self.loaders[0])

    @property
    def identity(self) -> dict:
        return {"members": [loader.identity for loader in self.loaders]}

    def __iter__(self):
        return self.epoch(0)

    def epoch(self, n: int, start: int = 0):
        for batches in zip(*(loader.epoch(n, start) for loader in self.loaders), strict=True):
            yield tree.map(lambda *leaves: torch.stack(leaves, 1), *batches)


def ensemble_step(update):
    """The pure step of all members from that of one, for `train.make_step(update=...)`; metrics are their means."""
    axes = (0, 0, 0, 0, None)  # of params, state, opt_state, key and step

    def of_member(parts, batch):
        train_state, metrics = update(train.TrainState(*parts), batch)
        return train_state.parts, metrics

    def of_all(train_state, batch):
        parts, metrics = fnn.vmap(of_member, in_dims=(axes, 1), out_dims=(axes, 0))(train_state.parts, batch)
        return train.TrainState(*parts), {name: values.mean() for name, values in metrics.items()}

    return of_all


def create(config: Config, net, optimizer, example, device):
    """The state of all members at step 0, and the keys (members, 2) of the order of their data."""
    keys = torch.stack([random.key(config.seed + member, device) for member in range(config.members)])
    init_keys, order_keys, step_keys = fnn.vmap(lambda key: random.split(key, 3))(keys).unbind(1)

    def member(init_key, step_key):
        params, state = net.init(init_key, example)
        return train.TrainState.create(params, optimizer, step_key, state=state)

    members = fnn.vmap(member)(init_keys, step_keys)
    return train.TrainState(*members.parts[:-1], members.step[0]).copy(), order_keys


def run(config: Config) -> dict[str, float]:
    """Train all members; returns what one of them and all together are worth on the test images."""
    if config.members < 2 or config.epochs < 1:
        raise ValueError(
            f"--members must be at least 2 and --epochs at least 1, got {config.members} and {config.epochs}"
        )
    device = train.device(config.device)
    mesh = distributed.init(device=device)
    images = data.digits(size=32 if config.model == "lenet5" else 8)
    x, labels = (leaf.to(device) for leaf in images.test)
    net = models.lenet5() if config.model == "lenet5" else models.mlp((64, 64))
    steps = config.epochs * (len(images.train[0]) // config.batch_size)
    optimizer = optim.adam(optim.warmup_cosine(0.0, config.lr, steps // 10, steps))
    train_state, order_keys = create(config, net, optimizer, x[:1], device)

    def loss_fn(params, state, batch, key):
        logits, state = net.apply(params, state, batch[0], key=key, train=True)
        accuracy = (logits.argmax(-1) == batch[1]).float().mean()
        return losses.cross_entropy(logits, batch[1]), (state, {"accuracy": accuracy})

    def probabilities(params, state, x):
        """(members, n, classes) of images x (n, ...)."""
        return fnn.vmap(lambda params, state: net(params, x, state=state).softmax(-1))(params, state)

    def metric_fn(params, state, batch):
        x, labels, _ = batch
        mean = probabilities(params, state, x).mean(0)
        return {"loss": losses.nll(mean.log(), labels, reduction="none"), "accuracy": mean.argmax(-1) == labels}

    test = data.Loader(images.test, 256 * mesh.size(), remainder="pad", device=device, shard=mesh)
    update = ensemble_step(train.pure_step(loss_fn, optimizer, mesh=mesh))
    step = train.make_step(update=update, compile=config.compile, strict=config.strict)
    eval_step = train.make_eval(metric_fn, mesh=mesh, compile=config.compile, strict=config.strict)
    numbers = {name: value for name, value in dataclasses.asdict(config).items() if name not in NO_MATTER}
    record = train.Record(config.out / "config.json", config)
    callbacks: list[train.Callback] = [record, train.Progress()]
    if config.tensorboard:
        callbacks.append(train.TensorBoard(config.out / "tensorboard", config=numbers))
    if config.profile:
        callbacks.append(train.Profile(config.out / "profile"))
    print(f"{images}, device {device}, {config.members} networks")
    train_state, history = train.fit(
        step,
        train_state,
        Side(images.train, config.batch_size, keys=order_keys, device=device, shard=mesh),
        epochs=config.epochs,
        eval=lambda train_state: train.evaluate(eval_step, train_state, test),
        callbacks=callbacks,
        checkpoints=train.Checkpointer(config.out / "checkpoints", config=numbers, overwrite=config.overwrite),
        resume=config.resume,
    )
    weights = {"params": train_state.params, "state": train_state.state}
    interop.save_safetensors(weights, config.out / "model.safetensors")
    if history.rows:
        history.to_csv(config.out / "metrics.csv")
        history.plot(config.out / "curves.png")

    members = probabilities(train_state.params, train_state.state, x)
    result = scores(members.mean(0), labels)
    print(f"\n{'':20}{'one member':>17}{'all together':>16}")
    for name, value in list(result.items()):
        alone = torch.tensor([scores(member, labels)[name] for member in members])
        result |= {f"member_{name}": float(alone.mean()), f"member_{name}_std": float(alone.std())}
        print(f"{name:20}{alone.mean():7.4f} +- {alone.std():.4f}{value:14.4f}")
    noise = random.normal(random.key(config.seed, device), x.shape)
    kinds = {"test digits": x, "turned by 90 degrees": torch.rot90(x, 1, (-2, -1)), "noise": noise}
    found = {kind: probabilities(*weights.values(), images).cpu() for kind, images in kinds.items()}
    if distributed.is_main():
        plot(found, config.out / "entropy.png")
    record.write(history.stopped or "finished", steps=int(train_state.step), test=result)
    print(f"wrote everything to {config.out}")
    if history.stopped:
        print(f"{history.stopped}; saved in {config.out / 'checkpoints'}: the same command with --resume goes on")
    return result


def scores(probabilities, labels, bins: int = 15) -> dict[str, float]:
    """Of probabilities (n, classes): how many guesses are right, the mean negative log likelihood, and the expected
    calibration error, the mean distance between confidence and accuracy among guesses of like confidence."""
    confidence, guesses = probabilities.double().max(-1)
    right = (guesses == labels).double()
    bin_of = (confidence * bins).ceil().clamp(1, bins).long() - 1
    gaps = torch.zeros(bins, dtype=torch.float64, device=right.device).index_add(0, bin_of, confidence - right)
    likelihood = probabilities.double().gather(1, labels.unsqueeze(1)).clamp(min=1e-300)
    return {
        "accuracy": float(right.mean()),
        "nll": float(-likelihood.log().mean()),
        "calibration error": float(gaps.abs().sum() / len(labels)),
    }


def entropy(probabilities):
    """Of the last axis, in nats."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


def plot(found: dict[str, torch.Tensor], path: Path) -> None:
    """How unsure the members, each alone, and all together are of three kinds of images."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for index, (kind, members) in enumerate(found.items()):
        axes = figure.add_subplot(1, 3, index + 1, title=kind, xlabel="entropy of the prediction (nats)")
        axes.set_ylabel("images" if index == 0 else "")
        for predictions, label in ((members, "each alone"), (members.mean(0, keepdim=True), "all together")):
            values = entropy(predictions).flatten()
            weights = torch.full_like(values, 1 / len(predictions))
            label = f"{label}, mean {values.mean():.2f}"
            axes.hist(values.numpy(), bins=24, range=(0, 2.4), weights=weights.numpy(), alpha=0.6, label=label)
        axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
        axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        run(tyro.cli(Config, description=__doc__))
    except (OSError, ValueError, ImportError, train.NonFiniteError) as error:
        sys.exit(f"ensemble: {error}")
