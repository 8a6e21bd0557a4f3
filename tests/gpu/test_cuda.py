"""What must hold on a GPU: `python -m pytest tests/gpu`. Skipped where there is none."""

import pytest
import torch
from torch.func import vmap

from fnn import losses, models, optim, random, train, tree

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    "draw",
    [
        lambda key: random.split(key, 5),
        lambda key: random.fold_in(key, 3),
        lambda key: random.bits(key, (1001,)),
        lambda key: random.uniform(key, (70_000,)),
        lambda key: random.bernoulli(key, 0.3, (1001,)),
        lambda key: random.randint(key, (1001,), 0, 10),
        lambda key: random.permutation(key, 1001),
    ],
)
def test_keys_give_the_cpus_bits(draw):
    on_cpu = draw(random.key(7))
    on_gpu = draw(random.key(7, device="cuda"))
    compiled = torch.compile(draw, fullgraph=True)(random.key(7, device="cuda"))
    assert on_gpu.is_cuda
    assert torch.equal(on_cpu, on_gpu.cpu())
    assert torch.equal(on_cpu, compiled.cpu())


def test_normal_is_the_cpus_to_rounding():
    torch.testing.assert_close(
        random.normal(random.key(7, device="cuda"), (70_000,)).cpu(),
        random.normal(random.key(7), (70_000,)),
        rtol=1e-5,
        atol=1e-6,
    )


def lenet_run(device, compile, steps=10):
    net, optimizer = models.lenet5(), optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.05, momentum=0.9))
    images = random.normal(random.key(1), (32, 1, 32, 32)).to(device)
    labels = random.randint(random.key(2), (32,), 0, 10).long().to(device)
    params, state = net.init(random.key(0, device=device), images)

    def loss_fn(params, state, batch, key):
        logits, state = net.apply(params, state, batch[0], key=key, train=True)
        return losses.cross_entropy(logits, batch[1]), (state, {})

    step = train.make_step(loss_fn, optimizer, compile=compile)
    train_state = train.TrainState.create(params, optimizer, random.key(3, device=device), state=state)
    history = []
    for _ in range(steps):
        train_state, metrics = step(train_state, (images, labels))
        history.append(metrics["loss"])
    assert step.compiled == compile
    return torch.stack(history).cpu(), train_state


def test_the_compiled_step_equals_eager_and_the_cpu():
    torch.backends.cudnn.allow_tf32 = False
    compiled, train_state = lenet_run("cuda", True)
    eager, _ = lenet_run("cuda", False)
    on_cpu, _ = lenet_run("cpu", False)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled, on_cpu, rtol=1e-3, atol=1e-4)
    assert all(leaf.is_cuda for leaf in tree.leaves(train_state))


def test_donation_saves_a_copy_of_the_state():
    size = 4096
    optimizer = optim.adam(1e-3)

    def loss_fn(params, state, batch, key):
        return (batch @ params["w"]).square().mean(), (state, {})

    peaks = {}
    for donate in (True, False):
        torch._dynamo.reset()
        params = {"w": torch.randn(size, size, device="cuda")}
        step = train.make_step(loss_fn, optimizer, donate=donate)
        train_state = train.TrainState.create(params, optimizer, random.key(0, device="cuda"))
        batch = torch.randn(64, size, device="cuda")
        for _ in range(2):
            train_state, _ = step(train_state, batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            train_state, _ = step(train_state, batch)
        peaks[donate] = torch.cuda.max_memory_allocated()
        del train_state, step, params
    assert peaks[False] - peaks[True] > 1.5 * size * size * 4


def test_vmap_over_keys_trains_an_ensemble():
    net, optimizer = models.mlp((16,), classes=3), optim.sgd(0.1)
    x, labels = torch.randn(8, 4, device="cuda"), torch.arange(8, device="cuda") % 3

    def loss_fn(params, state, batch, key):
        return losses.cross_entropy(net(params, batch[0]), batch[1]), (state, {})

    def create(key):
        return train.TrainState.create(net.init(key, x)[0], optimizer, key)

    step = train.make_step(update=vmap(train.pure_step(loss_fn, optimizer), in_dims=(0, None)))
    _, metrics = step(vmap(create)(random.split(random.key(0, device="cuda"), 8)), (x, labels))
    assert metrics["loss"].shape == (8,)
    assert torch.isfinite(metrics["loss"]).all()


def test_labels_out_of_range_are_nan_not_a_device_assert():
    loss = losses.cross_entropy(torch.zeros(2, 3, device="cuda"), torch.tensor([0, 9], device="cuda"))
    assert torch.isnan(loss).item()
    torch.cuda.synchronize()
