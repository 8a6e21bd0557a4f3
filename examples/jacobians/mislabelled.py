"""Finding mislabelled digits by the size of each example's gradient.

    python examples/jacobians/mislabelled.py --out out/jacobians

One in twenty training labels is replaced by a wrong one. A small network, trained before it can learn the wrong ones by
heart, would have to change most for them: the norm of an example's gradient ranks them first. The norms are computed
without the gradients themselves. Source: Paul et al., Deep Learning on a Data Diet (the GraNd score), 2021.
"""

import time
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import fnn
from fnn import data, losses, models, optim, random, train

WRONG = 0.05


def main(out: Path = Path("out/jacobians"), epochs: int = 10) -> None:
    images = data.digits()
    x, labels = images.train
    which_key, shift_key, init_key, order_key, step_key = random.split(random.key(0), 5).unbind()
    wrong = random.permutation(which_key, len(labels)) < WRONG * len(labels)
    given = torch.where(wrong, (labels + random.randint(shift_key, labels.shape, 1, 10)) % 10, labels)

    net = models.mlp((128,))
    params, _ = net.init(init_key, x[:1])

    def loss_fn(params, state, batch, key):
        x, labels = batch
        return losses.cross_entropy(net(params, x), labels), (state, {})

    optimizer = optim.adam(1e-3)
    step = train.make_step(loss_fn, optimizer)
    train_state = train.TrainState.create(params, optimizer, step_key)
    batches = data.Loader((x, given), 64, key=order_key)
    train_state, _ = train.fit(step, train_state, batches, epochs=epochs)

    def loss(params, image, label):  # of one example
        return losses.cross_entropy(net(params, image[None]), label[None])

    norms = torch.compile(fnn.per_sample_grad_norm(loss), fullgraph=True)
    norms(train_state.params, x, given)  # compiles
    started = time.perf_counter()
    scores = norms(train_state.params, x, given)
    seconds = time.perf_counter() - started

    order = scores.argsort(descending=True)
    found = wrong[order].cumsum(0)
    count = int(wrong.sum())
    precision = float(found[count - 1]) / count
    print(f"{len(x)} gradient norms of {fnn.tree.size(params)} parameters in {1000 * seconds:.1f} ms")
    print(
        f"of the {count} examples with the largest gradients, {precision:.0%} are mislabelled (by chance {WRONG:.0%})"
    )
    assert precision > 0.7

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes = left.add_subplot(xlabel="examples looked at", ylabel="mislabelled ones found", title="By gradient norm")
    axes.plot(found)
    axes.plot([0, len(x)], [0, count], "--", color="gray", label="by chance")
    axes.legend()
    for place, index in enumerate(order[:24]):
        axes = right.add_subplot(4, 6, place + 1)
        axes.imshow(images.train[0][index, 0], cmap="gray")
        axes.set_title(str(int(given[index])), color="red" if wrong[index] else "black", fontsize=8)
        axes.axis("off")
    right.suptitle("The largest gradients, with the given label (red: wrong)", fontsize=9)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "mislabelled.png", dpi=120)
    print(f"wrote {out / 'mislabelled.png'}")


if __name__ == "__main__" and fnn.distributed.is_main():  # the first of torchrun's processes does it all
    tyro.cli(main, description=__doc__)
