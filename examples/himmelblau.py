"""Minimise Himmelblau's function with Adam, from several starts at once, in a compiled loop.

    python examples/himmelblau.py --out out/himmelblau

f(x, y) = (x^2 + y - 11)^2 + (x + y^2 - 7)^2 has four minima, all of them 0. Which one is reached depends on the start.
A step of Adam is written for one point, `vmap` takes it to all starts, and `torch.compile` makes it one graph, which
a loop calls. Writes himmelblau.png: the surface, and the paths on it. (Newton's method on the same function, and which
start leads where, is examples/jacobians/himmelblau.py.)
"""

from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import fnn
from fnn import optim

MINIMA = torch.tensor([[3.0, 2.0], [-2.805118, 3.131312], [-3.779310, -3.283186], [3.584428, -1.848126]])
STARTS = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [-4.0, 0.0], [4.0, 0.0]])


def himmelblau(p):
    """f at one point p (2,)."""
    x, y = p[0], p[1]
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


def descend(starts, steps: int, lr: float):
    """Paths (steps + 1, n, 2) of Adam from `starts` (n, 2)."""
    optimizer = optim.adam(lr)

    def step(p, opt_state):
        updates, opt_state = optimizer.update(fnn.grad(himmelblau)(p), opt_state, p)
        return optim.apply_updates(p, updates), opt_state

    run = torch.compile(fnn.vmap(step), fullgraph=True)
    points, opt_state = starts, fnn.vmap(optimizer.init)(starts)
    path = [points]
    for index in range(steps):
        points, opt_state = run(points, opt_state)
        path.append(points)
        if index % (steps // 10) == 0:
            print(f"step {index}: x = {points[0].tolist()}, f(x) = {himmelblau(points[0]):.3g}")
    return torch.stack(path)


def draw(paths, file: Path) -> None:
    """The surface with its paths, seen from the side and from above."""
    line = torch.linspace(-6, 6, 121)
    x, y = torch.meshgrid(line, line, indexing="xy")
    z = himmelblau(torch.stack([x, y]))
    paths = paths[:: max(1, len(paths) // 500)]
    heights = fnn.vmap(fnn.vmap(himmelblau))(paths)
    figure = Figure(figsize=(13, 5.5), layout="constrained")

    axes = figure.add_subplot(1, 2, 1, projection="3d", title="Himmelblau's function, and Adam's paths on it")
    axes.plot_surface(x, y, z, cmap="viridis", alpha=0.6, linewidth=0, rcount=60, ccount=60)
    flat = figure.add_subplot(1, 2, 2, xlabel="x", ylabel="y", title="the same from above, with the four minima")
    levels = flat.contourf(x, y, z.clamp(min=1), levels=torch.logspace(0, 3.4, 18), norm="log", cmap="viridis")
    figure.colorbar(levels, ax=flat, label="f(x, y)", ticks=[1, 10, 100, 1000], format="%g")
    for index, color in zip(range(paths.shape[1]), ("tab:red", "tab:orange", "white", "magenta"), strict=True):
        path = paths[:, index]
        start = f"from ({path[0, 0]:g}, {path[0, 1]:g})"
        axes.plot(path[:, 0], path[:, 1], heights[:, index] + 20, color=color, linewidth=2, zorder=10)
        flat.plot(path[:, 0], path[:, 1], color=color, linewidth=2, label=start)
        flat.plot(path[0, 0], path[0, 1], "o", color=color, markeredgecolor="black")
    flat.plot(MINIMA[:, 0], MINIMA[:, 1], "k*", markersize=13, markerfacecolor="gold", linestyle="none")
    axes.set(xlabel="x", ylabel="y")
    axes.set_zlabel("f(x, y)", labelpad=10)
    axes.view_init(50, -60)
    flat.legend(loc="upper center", ncols=4, fontsize="small", facecolor="lightgrey")
    figure.savefig(file, dpi=120)


def main(out: Path = Path("out/himmelblau"), steps: int = 20_000, lr: float = 1e-3) -> None:
    paths = descend(STARTS, steps, lr)
    ends = paths[-1]
    for start, end in zip(STARTS, ends, strict=True):
        print(f"from {start.tolist()} to ({end[0]:.6f}, {end[1]:.6f}), f = {himmelblau(end):.1e}")
    assert torch.allclose(ends[0], MINIMA[0], atol=1e-3)  # from (0, 0) to (3, 2)
    assert fnn.vmap(himmelblau)(ends).max() < 1e-6
    distance, nearest = torch.cdist(ends, MINIMA).min(1)
    assert distance.max() < 1e-3
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]  # the four starts reach the four minima
    out.mkdir(parents=True, exist_ok=True)
    draw(paths, out / "himmelblau.png")
    print(f"wrote {out / 'himmelblau.png'}")


if __name__ == "__main__" and fnn.distributed.is_main():  # the first of torchrun's processes does it all
    tyro.cli(main, description=__doc__)
