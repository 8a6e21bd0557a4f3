"""The Hessian's spectrum of a LeNet trained on digits, beside that of its Gauss-Newton part.

    python examples/jacobians/hessian_spectrum.py --out out/jacobians

The Hessian of the loss has 61,706 rows; Lanczos' method needs its products with vectors only. About as many eigenvalues
as there are classes stand out from the bulk, and the Gauss-Newton matrix explains them; what it lacks are the negative
ones. Sources: Sagun et al., 2017; Papyan, 2018.
"""

import time
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from fnn import data, distributed, losses, models, optim, random, train
from fnn.diff import GGNOperator, HessianOperator


def main(out: Path = Path("out/jacobians"), epochs: int = 3, count: int = 20) -> None:
    images = data.digits(size=32)
    net = models.lenet5()
    init_key, order_key, step_key, start_key = random.split(random.key(0), 4).unbind()
    params, _ = net.init(init_key, images.train[0][:1])

    def loss_fn(params, state, batch, key):
        x, labels = batch
        return losses.cross_entropy(net(params, x), labels), (state, {})

    optimizer = optim.adam(1e-3)
    train_state = train.TrainState.create(params, optimizer, step_key)
    step = train.make_step(loss_fn, optimizer)
    batches = data.Loader(images.train, 64, key=order_key)
    train_state, history = train.fit(step, train_state, batches, epochs=epochs)
    params = train_state.params
    print(f"loss {history.rows[-1]['loss']:.3f} after {epochs} epochs")

    x, labels = images.train[0][:128], images.train[1][:128]
    hessian = HessianOperator(lambda params, x, labels: losses.cross_entropy(net(params, x), labels), params, x, labels)
    ggn = GGNOperator(net, losses.cross_entropy, params, x, labels)
    spectra = {}
    for name, operator in (("Hessian", hessian), ("Gauss-Newton", ggn)):
        started = time.perf_counter()
        largest, _ = operator.eigsh(count, which="LA", key=start_key, rtol=1e-3)
        smallest, _ = operator.eigsh(5, which="SA", key=start_key, rtol=1e-3)
        spectra[name] = largest, smallest
        print(
            f"{name}: largest {largest.max():.2f}, smallest {smallest.min():.2f}, "
            f"in {time.perf_counter() - started:.1f} s"
        )
    assert spectra["Gauss-Newton"][1].min() > -1e-3 * spectra["Gauss-Newton"][0].max()

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="rank", ylabel="eigenvalue", yscale="log", title="LeNet-5 on digits")
    for (name, (largest, smallest)), marker in zip(spectra.items(), "ox", strict=True):
        axes.plot(range(1, count + 1), largest.sort(descending=True).values, marker, label=name)
        if name == "Hessian":
            axes.plot(range(1, 6), -smallest.sort().values, "v", color="tab:red", label="Hessian, negative ones")
    axes.axvline(len(images.classes) + 0.5, linestyle="--", color="gray", label="number of classes")
    axes.legend()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "hessian_spectrum.png", dpi=120)
    print(f"wrote {out / 'hessian_spectrum.png'}")


if __name__ == "__main__" and distributed.is_main():  # the first of torchrun's processes does it all
    tyro.cli(main, description=__doc__)
