"""The neural tangent kernel of a wide network against the network's own training.

    python examples/jacobians/ntk.py --out out/jacobians

Gradient descent on a wide network moves its outputs as if the network were linear in its parameters: the outputs follow
f(t) = y + exp(-lr t K) (f(0) - y) with K the kernel at the start. The wider the network, the better this holds.
Sources: Jacot, Gabriel and Hongler, 2018; Lee et al., 2019.
"""

from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import fnn
from fnn import random, tree

STEPS = 200


def network(width):
    """A network in the NTK parametrisation: normal weights, scaled in the forward pass; one input, one output."""

    def init(key):
        keys = random.split(key, 5).unbind()
        shapes = {"w1": (width, 1), "b1": (width,), "w2": (width, width), "b2": (width,), "w3": (1, width)}
        return {
            name: random.normal(key, shape, torch.float64)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def apply(params, x):
        h = torch.tanh(fnn.ops.linear(x, params["w1"], params["b1"]))
        h = torch.tanh(fnn.ops.linear(h, params["w2"]) / width**0.5 + params["b2"])
        return fnn.ops.linear(h, params["w3"])[..., 0] / width**0.5

    return init, apply


def main(out: Path = Path("out/jacobians"), widths: tuple[int, ...] = (16, 128, 512)) -> None:
    x = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    y = torch.sin(2 * x[:, 0])
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    worst = []
    for place, width in enumerate(widths):
        init, apply = network(width)
        params = init(random.key(0))
        kernel = fnn.ntk(lambda params, x, apply=apply: apply(params, x)[None], params, x, trace_outputs=True)
        values, vectors = torch.linalg.eigh(kernel)
        lr = 0.5 / values[-1]
        start = vectors.mT @ (apply(params, x) - y)

        def loss(params, apply=apply):
            outputs = apply(params, x)
            return 0.5 * (outputs - y).square().sum(), outputs

        @torch.compile(fullgraph=True)
        def step(params, lr, loss=loss):
            grads, outputs = fnn.grad(loss, has_aux=True)(params)
            return tree.map(lambda p, g: p - lr * g, params, grads), outputs

        trained, linear = [], []
        for t in range(STEPS):
            params, outputs = step(params, lr)
            trained.append(outputs)
            linear.append(y + vectors @ ((1 - lr * values) ** t * start))
        trained, linear = torch.stack(trained), torch.stack(linear)
        worst.append(float((trained - linear).abs().max()))
        print(f"width {width}: outputs and their linear prediction differ by at most {worst[-1]:.3f}")
        axes = figure.add_subplot(1, len(widths), place + 1, title=f"width {width}", xlabel="step", xscale="log")
        for index, color in enumerate(("tab:blue", "tab:orange", "tab:green", "tab:red")):
            axes.plot(range(1, STEPS + 1), trained[:, 2 * index], color=color)
            axes.plot(range(1, STEPS + 1), linear[:, 2 * index], "--", color=color)
    assert worst == sorted(worst, reverse=True)
    figure.suptitle("Outputs in training (lines) and as the kernel predicts (dashes)")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "ntk.png", dpi=120)
    print(f"wrote {out / 'ntk.png'}")


if __name__ == "__main__" and fnn.distributed.is_main():  # the first of torchrun's processes does it all
    tyro.cli(main, description=__doc__)
