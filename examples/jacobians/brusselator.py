"""The Brusselator, a stiff reaction-diffusion equation, by an implicit integrator with a sparse Jacobian.

    python examples/jacobians/brusselator.py --out out/jacobians

Every step of an implicit method solves a nonlinear system by Newton's method. The Jacobian of 2 x 32 x 32 unknowns has
four million entries, of which 12,288 are not zero: detected once, coloured with a dozen colours, evaluated by as many
forward derivatives in one compiled call, and solved by SciPy's sparse LU. In float64, checked against SciPy's BDF.
Source: Hairer and Wanner, Solving Ordinary Differential Equations II, 1996, IV.10.
"""

import time
from pathlib import Path

import scipy.integrate
import scipy.sparse
import scipy.sparse.linalg
import torch
import tyro
from matplotlib.figure import Figure

import fnn

SIDE = 32
DIFFUSION = 0.02 * (SIDE - 1) ** 2 / 4


def brusselator(state):
    """The time derivative (2 n,) of concentrations u, v on a periodic square of n = SIDE^2 points."""
    u, v = state.reshape(2, SIDE, SIDE)
    return torch.stack(
        [
            1 + u * u * v - 4.4 * u + DIFFUSION * spread(u),
            3.4 * u - u * u * v + DIFFUSION * spread(v),
        ]
    ).reshape(-1)


def spread(u):
    """The discrete Laplacian."""
    return u.roll(1, 0) + u.roll(-1, 0) + u.roll(1, 1) + u.roll(-1, 1) - 4 * u


def initial():
    line = torch.arange(SIDE, dtype=torch.float64) / SIDE
    x, y = torch.meshgrid(line, line, indexing="xy")
    return torch.cat([22 * (y * (1 - y)) ** 1.5, 27 * (x * (1 - x)) ** 1.5]).reshape(-1)


def integrate(rhs, jacobian, state, span, steps):
    """The state after `span` by a two-stage implicit Runge-Kutta method, L-stable, of second order; Alexander, 1977."""
    gamma, h = 1 - 0.5**0.5, span / steps
    identity = scipy.sparse.identity(len(state), format="csc")
    for _ in range(steps):
        # One factorisation serves both stages and all their Newton iterations.
        solve = scipy.sparse.linalg.splu((identity - gamma * h * jacobian(state)).tocsc()).solve
        first = stage(rhs, solve, state, state, gamma * h)
        second = stage(rhs, solve, state + (1 - gamma) / gamma * (first - state), first, gamma * h)
        state = second
    return state


def stage(rhs, solve, known, guess, h):
    """y with y = known + h rhs(y), from a guess, by Newton's method with a fixed Jacobian."""
    for _ in range(20):
        correction = torch.from_numpy(solve((known + h * rhs(guess) - guess).numpy()))
        guess = guess + correction
        if correction.abs().max() < 1e-10:
            return guess
    raise RuntimeError("Newton's method did not converge; take more steps")


def main(out: Path = Path("out/jacobians"), span: float = 2.0, steps: int = 100) -> None:
    start = initial()
    sparse = fnn.sparse_jacobian(brusselator).prepare(start)
    print(sparse)
    values = torch.compile(sparse.values, fullgraph=True)
    rhs = torch.compile(brusselator, fullgraph=True)

    def jacobian(state):
        return sparse.to_scipy(values(state))

    jacobian(start)  # compiles
    began = time.perf_counter()
    end = integrate(rhs, jacobian, start, span, steps)
    ours = time.perf_counter() - began

    began = time.perf_counter()
    reference = scipy.integrate.solve_ivp(
        lambda _, state: rhs(torch.from_numpy(state)).numpy(),
        (0, span),
        start.numpy(),
        method="BDF",
        jac=lambda _, state: jacobian(torch.from_numpy(state)),
        rtol=1e-8,
        atol=1e-8,
        t_eval=[span],
    )
    theirs = time.perf_counter() - began
    difference = (end - torch.from_numpy(reference.y[:, -1])).abs().max()
    print(
        f"{steps} implicit steps: {ours:.2f} s; SciPy's BDF with our Jacobian, {reference.njev} times: {theirs:.2f} s"
    )
    print(f"the concentrations (up to {end.max():.1f}) differ by at most {difference:.1e}")
    assert difference < 1e-2

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for place, (title, field) in enumerate((("u", end[: SIDE**2]), ("v", end[SIDE**2 :]))):
        axes = figure.add_subplot(1, 3, place + 1, title=f"{title} at t = {span:g}")
        figure.colorbar(axes.imshow(field.reshape(SIDE, SIDE), origin="lower", extent=(0, 1, 0, 1)))
    axes = figure.add_subplot(1, 3, 3, title=f"the Jacobian's {len(values(start)):,} nonzeros")
    axes.spy(jacobian(start), markersize=0.2)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "brusselator.png", dpi=120)
    print(f"wrote {out / 'brusselator.png'}")


if __name__ == "__main__" and fnn.distributed.is_main():  # the first of torchrun's processes does it all
    tyro.cli(main, description=__doc__)
