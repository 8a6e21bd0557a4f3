"""A robot arm: its Jacobian, and inverse kinematics for many targets at once.

    python examples/jacobians/robot_arm.py --out out/jacobians

The tip of a planar arm with four joints is a function of the joint angles. Its Jacobian says how the tip moves with
each joint; damped least squares on it finds angles that reach a target. One compiled call solves for all targets.
"""

from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import fnn

LENGTHS = torch.tensor([1.0, 0.8, 0.6, 0.4])


def joints(angles):
    """Positions (5, 2) of base, elbows and tip for relative joint angles (4,), in radians."""
    directions = angles.cumsum(0)
    links = LENGTHS[:, None] * torch.stack([directions.cos(), directions.sin()], 1)
    return torch.cat([torch.zeros(1, 2), links.cumsum(0)])


def tip(angles):
    return joints(angles)[-1]


def reach(angles, target, damping=0.01):
    """The angles (4,) after one step of damped least squares of the tip towards `target` (2,); Buss, 2004."""
    position, jacobian = fnn.jacobian(tip, value=True)(angles)
    damped = jacobian @ jacobian.mT + damping * torch.eye(2)
    return angles + jacobian.mT @ torch.linalg.solve(damped, target - position)


def main(out: Path = Path("out/jacobians")) -> None:
    angles = torch.tensor([0.4, 0.5, -0.3, 0.8])
    jacobian = fnn.jacobian(tip)(angles)
    # A joint turns everything beyond it about itself: its column is the lever arm, turned by 90 degrees.
    lever = tip(angles) - joints(angles)[:-1]
    torch.testing.assert_close(jacobian, torch.stack([-lever[:, 1], lever[:, 0]]))
    print(f"Jacobian of the tip, equal to the lever arms:\n{jacobian}")

    phase = torch.linspace(0, 2 * torch.pi, 64)
    targets = torch.stack([1.4 + 0.9 * phase.cos(), 0.6 + 0.6 * (2 * phase).sin()], 1)
    step = torch.compile(fnn.vmap(reach), fullgraph=True)
    solutions = angles.repeat(64, 1)
    for _ in range(100):
        solutions = step(solutions, targets)
    misses = (fnn.vmap(tip)(solutions) - targets).norm(dim=1)
    print(f"64 targets on a curve: largest miss {misses.max():.1e} of an arm of length {LENGTHS.sum():.1f}")
    assert misses.max() < 1e-3

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot(title="Inverse kinematics along a curve", aspect="equal")
    axes.plot(*targets.T, "k--", label="targets")
    for index, pose in enumerate(fnn.vmap(joints)(solutions)[::8]):
        axes.plot(*pose.T, marker="o", markersize=4, color=f"C{index}")
    axes.legend()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "robot_arm.png", dpi=120)
    print(f"wrote {out / 'robot_arm.png'}")


if __name__ == "__main__" and fnn.distributed.is_main():  # the first of torchrun's processes does it all
    tyro.cli(main, description=__doc__)
