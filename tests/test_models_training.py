"""fnn.models trained from a seed: the loss curves that Flax and Optax gave (tests/golden/record_models_training.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fnn import losses, models, optim, random, train
from fnn.nn import initializers

GOLDEN = np.load(Path(__file__).parent / "golden" / "models_training.npz")
STEPS = 50
KEY, DATA = random.key(42), random.key(7)


def mlp_batches():
    x = random.normal(random.fold_in(DATA, 0), (128, 8))
    labels = (x @ random.normal(random.fold_in(DATA, 1), (8, 5))).argmax(-1)
    for step in range(STEPS):
        rows = random.randint(random.fold_in(DATA, 2 + step), (32,), 0, 128)
        yield x[rows], labels[rows]


def gpt_batches():
    for step in range(STEPS):
        first = random.randint(random.fold_in(DATA, 2 * step), (8, 1), 0, 17)
        stride = random.randint(random.fold_in(DATA, 2 * step + 1), (8, 1), 1, 4)
        tokens = (first + stride * torch.arange(17)) % 17
        yield tokens[:, :-1], tokens[:, 1:].contiguous()


def matrices(path, leaf):
    """Whether a leaf decays. Of stacked blocks, a matrix has three axes and a bias has two."""
    return leaf.ndim > 1 + ("*" in path)


MLP = models.mlp((32, 16), 5, weight_init=initializers.lecun_normal(), bias_init=initializers.zeros)
ADAMW = optim.chain(
    optim.clip_by_global_norm(1.0),
    optim.adamw(optim.warmup_cosine(0.0, 1e-2, 10, STEPS, 1e-3), b2=0.95, weight_decay=0.1, weight_decay_mask=matrices),
)
CURVES = {
    "mlp": ("mlp", MLP, optim.sgd(0.1, momentum=0.9), mlp_batches),
    "gpt": ("gpt", models.gpt(17, 16, 2, 4, 32), ADAMW, gpt_batches),
    "stacked gpt": ("gpt", models.gpt(17, 16, 2, 4, 32, stacked=True), ADAMW, gpt_batches),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c != "mlp" else c for c in CURVES])
def test_the_loss_curve_is_that_of_flax_and_optax(case):
    name, net, optimizer, batches = CURVES[case]
    params, _ = net.init(KEY, next(batches())[0])

    def loss_fn(params, state, batch, key):
        return losses.cross_entropy(net(params, batch[0]).movedim(-1, 1), batch[1]), (state, {})

    step = train.make_step(loss_fn, optimizer, compile=False)
    train_state, found = train.TrainState.create(params, optimizer, KEY), []
    for batch in batches():
        train_state, metrics = step(train_state, batch)
        found.append(float(metrics["loss"]))
    np.testing.assert_allclose(found, GOLDEN[name], rtol=1e-4, atol=0)
    assert found[-1] < 0.6 * found[0]
