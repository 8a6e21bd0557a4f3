"""A Laplace approximation: what a trained network does not know.

    python examples/jacobians/laplace.py --out out/jacobians

Around its trained weights a network's posterior is taken as normal, with the Gauss-Newton matrix and the prior as its
precision. The Jacobian of the output carries that to predictions: certain between the data, uncertain away from them.
The prior's precision is the one that explains the data best. Sources: MacKay, 1992; Immer, Korzepa and Bauer, 2021.
"""

from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import fnn
from fnn import losses, nn, optim, random, train
from fnn.diff import GGNOperator

NOISE = 0.1
NET = nn.Sequential(nn.Linear(24), nn.tanh, nn.Linear(24), nn.tanh, nn.Linear(1))


def main(out: Path = Path("out/jacobians"), steps: int = 1500) -> None:
    x_key, noise_key, init_key, step_key = random.split(random.key(0), 4).unbind()
    place = random.uniform(x_key, (60, 1), torch.float64)
    x = torch.where(place < 0.5, 4 * place - 3, 4 * place - 1)  # in [-3, -1] and [1, 3]
    y = torch.sin(2 * x) + NOISE * random.normal(noise_key, x.shape, x.dtype)

    def negative_log_likelihood(outputs, y):
        return 0.5 * ((outputs - y) / NOISE).square().sum()

    def loss_fn(params, state, batch, key):
        x, y = batch
        return negative_log_likelihood(NET(params, x), y) + 0.5 * losses.l2_penalty(params), (state, {})

    params, _ = NET.init(init_key, x[:1])
    optimizer = optim.adam(optim.cosine(1e-2, steps))
    train_state = train.TrainState.create(params, optimizer, step_key)
    step = train.make_step(loss_fn, optimizer)
    for _ in range(steps):
        train_state, _ = step(train_state, (x, y))
    params = train_state.params
    print(f"mean squared error {losses.mse(NET(params, x), y):.4f}, of which noise {NOISE**2:.4f}")

    ggn = GGNOperator(NET, negative_log_likelihood, params, x, y).to_dense()
    weights, _ = fnn.tree.ravel(params)

    def evidence(precision):
        """The logarithm of the data's probability under a prior precision, up to a constant."""
        posterior = ggn + precision * torch.eye(len(ggn), dtype=ggn.dtype)
        penalty = precision * weights.square().sum() - len(weights) * precision.log()
        return -0.5 * (penalty + torch.linalg.slogdet(posterior).logabsdet)

    precisions = torch.logspace(-2, 3, 51, dtype=ggn.dtype)
    precision = precisions[fnn.vmap(evidence)(precisions).argmax()]
    covariance = torch.linalg.inv(ggn + precision * torch.eye(len(ggn), dtype=ggn.dtype))
    print(f"prior precision of the largest evidence: {precision:.2g}")

    line = torch.linspace(-5, 5, 201, dtype=x.dtype)[:, None]
    predict = torch.compile(fnn.jacobian(lambda params, x: NET(params, x), flat=True, value=True))
    mean, jacobian = predict(params, line)
    deviation = torch.einsum("np,pq,nq->n", jacobian, covariance, jacobian).sqrt()
    near, far = (
        deviation[(line.abs()[:, 0] > 1) & (line.abs()[:, 0] < 3)].mean(),
        deviation[line.abs()[:, 0] > 4].mean(),
    )
    print(f"standard deviation of predictions: {near:.3f} at the data, {far:.3f} away from them")
    assert far > 3 * near

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title="Laplace approximation of a network's predictions", ylim=(-4, 4))
    total = (deviation.square() + NOISE**2).sqrt()
    mean, line = mean[:, 0], line[:, 0]
    axes.fill_between(line, mean - 2 * total, mean + 2 * total, alpha=0.3, label="two standard deviations")
    axes.plot(line, mean, label="prediction")
    axes.plot(x, y, "k.", label="data")
    axes.plot(line, torch.sin(2 * line), "--", color="gray", label="truth")
    axes.legend()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "laplace.png", dpi=120)
    print(f"wrote {out / 'laplace.png'}")


if __name__ == "__main__" and fnn.distributed.is_main():  # the first of torchrun's processes does it all
    tyro.cli(main, description=__doc__)
