"""A Poisson equation by a physics-informed network, with the forward Laplacian.

    python examples/jacobians/poisson.py --out out/jacobians

-laplacian(u) = f on the unit square with u = 0 on its border. The network times x (1 - x) y (1 - y) fulfils the border;
training makes the residual small at random points. One compiled step computes the Laplacian of the network at all
points, and the gradient of the loss through it. Source: Raissi, Perdikaris and Karniadakis, 2019.
"""

import math
import time
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import fnn
from fnn import nn, optim, random, train


def exact(p):
    return torch.sin(math.pi * p[..., 0]) * torch.sin(math.pi * p[..., 1])


def source(p):
    return 2 * math.pi**2 * exact(p)


NET = nn.Sequential(nn.Linear(64), nn.tanh, nn.Linear(64), nn.tanh, nn.Linear(1))


def solution(params, p):
    """u at one point p (2,)."""
    x, y = p[0], p[1]
    return x * (1 - x) * y * (1 - y) * NET(params, p)[0]


def loss_fn(params, state, batch, key):
    laplacians = fnn.vmap(fnn.laplacian(lambda p: solution(params, p)))(batch)
    return (laplacians + source(batch)).square().mean(), (state, {})


def main(out: Path = Path("out/jacobians"), steps: int = 1500) -> None:
    init_key, point_key, step_key = random.split(random.key(0), 3).unbind()
    params, _ = NET.init(init_key, torch.zeros(2))
    optimizer = optim.adam(optim.warmup_cosine(0.0, 5e-3, 100, steps))
    step = train.make_step(loss_fn, optimizer)
    train_state = train.TrainState.create(params, optimizer, step_key)
    history = []
    started = time.perf_counter()
    for index in range(steps):
        points = random.uniform(random.fold_in(point_key, index), (256, 2))
        train_state, metrics = step(train_state, points)
        history.append(metrics["loss"])
    print(f"{steps} steps in {time.perf_counter() - started:.1f} s, with compilation")

    line = torch.linspace(0, 1, 101)
    grid = torch.cartesian_prod(line, line)
    found = fnn.vmap(solution, in_dims=(None, 0))(train_state.params, grid)
    error = (found - exact(grid)).abs()
    print(f"residual {history[0]:.0f} -> {history[-1]:.1e}, largest error of u {error.max():.1e} (u is up to 1)")
    assert error.max() < 2e-3

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for place, (title, values) in enumerate((("u by the network", found), ("its error", error))):
        axes = figure.add_subplot(1, 3, place + 1, title=title)
        image = axes.imshow(values.reshape(101, 101).T, origin="lower", extent=(0, 1, 0, 1))
        figure.colorbar(image)
    axes = figure.add_subplot(1, 3, 3, title="mean squared residual", xlabel="step", yscale="log")
    axes.plot(torch.stack(history))
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "poisson.png", dpi=120)
    print(f"wrote {out / 'poisson.png'}")


if __name__ == "__main__" and fnn.distributed.is_main():  # the first of torchrun's processes does it all
    tyro.cli(main, description=__doc__)
