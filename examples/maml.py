"""Learn to learn sinusoids: MAML, whose gradient goes through the steps of SGD inside it.

    python examples/maml.py
    python examples/maml.py --first-order --out out/maml_first_order

A task is a sinusoid of some amplitude and phase, of which a network sees ten points and is to predict the others.
MAML learns the weights from which one step of SGD on the ten points helps most: its loss is that after the step, so
its gradient is one through a gradient. Tasks are done together by `vmap`, and the whole meta-step is one compiled
graph. In the same graph, and on the same points, the same network is trained on all tasks jointly, with no step
inside: that learns the mean of all sinusoids, and adapts slowly.

Writes to --out: metrics.csv, curves.png, sinusoids.png, model.safetensors, config.json, and checkpoints, from which
--resume goes on, bit for bit.

Source: Finn, Abbeel, Levine, Model-agnostic meta-learning for fast adaptation of deep networks, 2017, section 5.1.
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import fnn
from fnn import data, interop, losses, models, optim, random, train, tree


@dataclasses.dataclass(frozen=True)
class Config:
    """Meta-learn sinusoids, and compare with joint training."""

    steps: int = 10_000
    """Meta-steps."""
    meta_batch: int = 25
    """Tasks in a meta-step."""
    shots: int = 10
    """Points that a task shows; as many others say how good the adapted network is."""
    inner_steps: int = 1
    """Steps of SGD that the meta-gradient goes through."""
    inner_lr: float = 0.01
    """Learning rate of these steps, and of those on new tasks."""
    lr: float = 1e-3
    """Of Adam, for the weights that the inner steps start from."""
    first_order: bool = False
    """Leave out the derivative of the inner gradient."""
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes an accelerator where there is one."""
    compile: bool = True
    strict: bool = False
    """Make it an error if a second graph is compiled."""
    out: Path = Path("out/maml")
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
ADAPTED = (0, 1, 5, 10)
"""Steps on a new task after which its loss is measured."""
NET = models.mlp((40, 40), classes=1)


def sinusoids(key, number: int):
    """Tasks: amplitudes 0.1 to 5 and phases 0 to pi, each (number,)."""
    amplitude_key, phase_key = random.split(key).unbind()
    amplitudes = random.uniform(amplitude_key, (number,), minval=0.1, maxval=5.0)
    return amplitudes, random.uniform(phase_key, (number,), maxval=math.pi)


def draw(key, amplitude, phase, number: int):
    """x and y of points of one task, each (number, 1), x between -5 and 5."""
    x = random.uniform(key, (number, 1), minval=-5.0, maxval=5.0)
    return x, amplitude * torch.sin(x - phase)


def drawn(key, tasks, shots: int, others: int):
    """Points of tasks (amplitudes, phases): those that each shows, and the others, as (x, y) of (tasks, n, 1)."""

    def of_task(key, amplitude, phase):
        return draw(key, amplitude, phase, shots + others)

    points = fnn.vmap(of_task)(random.split(key, len(tasks[0])), *tasks)
    return tuple(leaf[:, :shots] for leaf in points), tuple(leaf[:, shots:] for leaf in points)


def adapt(params, x, y, *, steps: int, lr: float, first_order: bool = False):
    """The params after steps of SGD on the points x and y of one task; differentiable."""
    for _ in range(steps):
        grads = fnn.grad(lambda params: losses.mse(NET(params, x), y))(params)
        if first_order:
            grads = fnn.stop_gradient(grads)
        params = tree.map(lambda p, g: p - lr * g, params, grads)
    return params


def meta_loss(params, seen, others, **options):
    """The loss of one task's other points after adaptation to those that were seen."""
    x, y = others
    return losses.mse(NET(adapt(params, *seen, **options), x), y)


def run(config: Config) -> dict[str, float]:
    """Train both networks, in one state and one graph; returns their losses on new tasks after steps of SGD."""
    for name in ("steps", "meta_batch", "shots", "inner_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    device = train.device(config.device)
    init_key, task_key, order_key, step_key, test_key = random.split(random.key(config.seed, device), 5).unbind()
    start, _ = NET.init(init_key, torch.zeros(1, 1, device=device))
    params = {"maml": start, "joint": tree.map(torch.clone, start)}
    inside = {"maml": config.inner_steps, "joint": 0}
    tasks = data.Loader(sinusoids(task_key, 1000 * config.meta_batch), config.meta_batch, key=order_key)
    new_tasks = drawn(test_key, sinusoids(random.fold_in(test_key, 1), 500), config.shots, 50)

    def loss_fn(params, state, batch, key):
        points = drawn(key, batch, config.shots, config.shots)
        found = {}
        for name, steps in inside.items():

            def of_task(seen, others, name=name, steps=steps):
                options = {"steps": steps, "lr": config.inner_lr, "first_order": config.first_order}
                return meta_loss(params[name], seen, others, **options)

            found[f"{name}_loss"] = fnn.vmap(of_task)(*points).mean()
        return found["maml_loss"] + found["joint_loss"], (state, found)  # no parameter is in both

    def errors(params, batch, steps):
        """Of each network on each task."""

        def of_task(name):
            return lambda seen, others: meta_loss(params[name], seen, others, steps=steps, lr=config.inner_lr)

        return {f"{name}_loss_{steps}": fnn.vmap(of_task(name))(*batch) for name in params}

    def metric_fn(params, state, batch):
        return errors(params, batch, 1) | errors(params, batch, 10)

    optimizer = optim.adam(config.lr)
    step = train.make_step(loss_fn, optimizer, compile=config.compile, strict=config.strict)
    eval_step = train.make_eval(metric_fn, compile=False)  # ten steps unrolled are long to compile and quick to run
    numbers = {name: value for name, value in dataclasses.asdict(config).items() if name not in NO_MATTER}
    record = train.Record(config.out / "config.json", config)
    callbacks: list[train.Callback] = [record, train.Progress()]
    if config.tensorboard:
        callbacks.append(train.TensorBoard(config.out / "tensorboard", config=numbers))
    if config.profile:
        callbacks.append(train.Profile(config.out / "profile"))
    print(f"two networks of {tree.size(start):,} parameters, device {device}")
    train_state, history = train.fit(
        step,
        train.TrainState.create(params, optimizer, step_key),
        tasks,
        steps=config.steps,
        eval=lambda train_state: train.evaluate(eval_step, train_state, [new_tasks]),
        eval_every=max(1, config.steps // 10),
        callbacks=callbacks,
        log_every=100,
        checkpoints=train.Checkpointer(config.out / "checkpoints", config=numbers, overwrite=config.overwrite),
        resume=config.resume,
    )
    interop.save_safetensors({"params": train_state.params}, config.out / "model.safetensors")
    if history.rows:
        history.to_csv(config.out / "metrics.csv")
        history.plot(config.out / "curves.png")
    found = [errors(train_state.params, new_tasks, steps) for steps in ADAPTED]
    result = {name: float(values.mean()) for each in found for name, values in each.items()}
    plot(config, train_state.params, result, config.out / "sinusoids.png")
    record.write(history.stopped or "finished", steps=int(train_state.step), test=result)
    print(f"\nsquared error on 500 new tasks, after steps of SGD on the {config.shots} points that they show:")
    print(" " * 6 + "".join(f"{steps:9}" for steps in ADAPTED))
    for name in params:
        print(f"{name:6}" + "".join(f"{result[f'{name}_loss_{steps}']:9.4f}" for steps in ADAPTED))
    print(f"wrote everything to {config.out}")
    if history.stopped:
        print(f"{history.stopped}; saved in {config.out / 'checkpoints'}: the same command with --resume goes on")
    return result


def plot(config: Config, params, result: dict[str, float], path: Path) -> None:
    """A new sinusoid as each network fits it, and the mean error over adaptation."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    line = torch.linspace(-5, 5, 201).unsqueeze(1)
    x, y = draw(random.key(config.seed), 3.0, 0.5, config.shots)
    errors = figure.add_subplot(1, 3, 3, title="500 new tasks", xlabel="steps of SGD", ylabel="mean squared error")
    for index, name in enumerate(params):
        weights = tree.map(lambda leaf: leaf.cpu(), params[name])
        axes = figure.add_subplot(1, 3, index + 1, title=f"{name}, adapted to {config.shots} points", xlabel="x")
        axes.plot(line, 3.0 * torch.sin(line - 0.5), color="black", label="the sinusoid")
        axes.plot(x, y, "^", color="tab:red", label="points seen")
        for steps, style in ((0, ":"), (1, "--"), (10, "-")):
            fitted = NET(adapt(weights, x, y, steps=steps, lr=config.inner_lr), line)
            axes.plot(line, fitted, style, color=f"C{index}", label=f"{steps} step{'s' * (steps != 1)}")
        axes.legend(fontsize=8, loc="lower center", ncols=3)
        axes.set_ylim(-7, 5)
        errors.plot(ADAPTED, [result[f"{name}_loss_{steps}"] for steps in ADAPTED], "o-", color=f"C{index}", label=name)
    errors.set_ylim(0, 1.1 * max(result.values()))
    errors.grid(alpha=0.3)
    errors.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__" and fnn.distributed.is_main():  # the first of torchrun's processes does it all
    try:
        run(tyro.cli(Config, description=__doc__))
    except (OSError, ValueError, ImportError, train.NonFiniteError) as error:
        sys.exit(f"maml: {error}")
