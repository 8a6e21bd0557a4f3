"""Himmelblau's function by Newton and Gauss-Newton, from many starts at once.

    python examples/jacobians/himmelblau.py --out out/jacobians

f = |r|^2 of two residuals r has four minima, four saddles and a maximum. Newton's method needs the Hessian of f and is
drawn to any of the nine; Gauss-Newton needs the Jacobian of r only, and is drawn to minima. Both steps are written for
one point; `vmap` takes them to a grid of starts, and one compiled graph computes them.
"""

from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import fnn

MINIMA = torch.tensor([[3.0, 2.0], [-2.805118, 3.131312], [-3.779310, -3.283186], [3.584428, -1.848126]])


def residuals(p):
    x, y = p
    return torch.stack([x * x + y - 11, x + y * y - 7])


def himmelblau(p):
    return residuals(p).square().sum()


def newton(p):
    """p (2,) after one step to where the quadratic model of f is level."""
    return p - torch.linalg.solve(fnn.hessian(himmelblau)(p), fnn.grad(himmelblau)(p))


def gauss_newton(p, damping=1e-3):
    """p (2,) after one step to where the linear model of r is smallest; damping makes singular Jacobians solvable."""
    value, jacobian = fnn.jacobian(residuals, value=True)(p)
    return p - torch.linalg.solve(jacobian.mT @ jacobian + damping * torch.eye(2), jacobian.mT @ value)


def walk(method, starts, steps):
    """All points (steps + 1, n, 2) of walks from `starts` (n, 2)."""
    step = torch.compile(fnn.vmap(method), fullgraph=True)
    points = [starts]
    for _ in range(steps):
        points.append(step(points[-1]))
    return torch.stack(points)


def main(out: Path = Path("out/jacobians"), side: int = 200, steps: int = 50) -> None:
    line = torch.linspace(-6, 6, side)
    grid = torch.cartesian_prod(line, line)
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for place, method in enumerate((newton, gauss_newton)):
        ends = walk(method, grid, steps)[-1]
        distance, nearest = torch.cdist(ends, MINIMA).min(1)
        reached = distance < 1e-3
        print(f"{method.__name__}: {reached.float().mean():.1%} of {side * side} starts reach a minimum")
        basins = torch.where(reached, nearest, -1).reshape(side, side)
        axes = figure.add_subplot(1, 3, place + 1, title=f"{method.__name__}: where each start ends")
        axes.imshow(basins.T, origin="lower", extent=(-6, 6, -6, 6), cmap="Set2")
        axes.plot(*MINIMA.T, "k*")

    axes = figure.add_subplot(1, 3, 3, title="f along walks from (1, 1)", xlabel="step", yscale="log")
    start = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    for method in (newton, gauss_newton):
        values = fnn.vmap(himmelblau)(walk(method, start, 10)[:, 0])
        axes.plot(values.clamp(min=1e-32), marker="o", label=method.__name__)
        print(f"{method.__name__} from (1, 1): f = {', '.join(f'{value:.0e}' for value in values)}")
    axes.legend()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "himmelblau.png", dpi=120)
    print(f"wrote {out / 'himmelblau.png'}")


if __name__ == "__main__" and fnn.distributed.is_main():  # the first of torchrun's processes does it all
    tyro.cli(main, description=__doc__)
