"""Note 001, the workflow: tensors, autograd, a model, data, training, saving, and what helps, in functional form.

    python examples/notes/workflow.py --out out/notes

Each function is one chapter of the note, with its numbers. Writes workflow.safetensors, model_weights.pth and a folder
of TensorBoard events to --out. With --compile the training step is one compiled graph, which pays in longer runs.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

import fnn
from fnn import data, interop, losses, models, nn, ops, optim, random, train, tree


def choosing_a_device() -> None:
    """In the note: cuda if there is one, else mps, else cpu. Here: `train.device()`; a whole tree moves at once."""
    device = train.device("auto")
    params, _ = nn.Linear(2).init(random.key(0), torch.zeros(1, 3))
    moved = tree.map(lambda leaf: leaf.to(device), params)
    print(f"Using {device} device")
    assert {leaf.device.type for leaf in tree.leaves(moved)} == {device.type}
    # Parameters are made on the key's device in the first place.
    params, _ = nn.Linear(2).init(random.key(0, device), torch.zeros(1, 3))
    assert {leaf.device.type for leaf in tree.leaves(params)} == {device.type}


def tensors() -> None:
    """Creation and attributes are torch's; products go through `fnn.ops`, which picks the fastest kernel."""
    assert torch.tensor([[1, 2], [3, 4]]).dtype == torch.int64
    assert torch.ones(2, 3).sum() == 6
    assert torch.zeros(2, 3).sum() == 0
    tensor = random.uniform(random.key(0), (3, 4))
    print(f"Shape: {tuple(tensor.shape)}, datatype: {tensor.dtype}, device: {tensor.device}")
    t1, t2 = random.uniform(random.key(1), (2, 2, 2))
    assert torch.allclose(ops.matmul(t1, t2), torch.matmul(t1, t2))
    assert torch.equal(t1 * t2, torch.mul(t1, t2))
    gradient = fnn.grad(lambda a: ops.matmul(a, t2).sum())(t1)  # and it differentiates
    assert torch.allclose(gradient, t2.sum(1).expand(2, 2))


def autograd() -> None:
    """The note's z = x @ w + b under binary cross entropy: both gradients from one call, and the closed form."""
    x, y = torch.ones(5), torch.zeros(3)
    w_key, b_key = random.split(random.key(0)).unbind()
    params = {"w": random.normal(w_key, (5, 3)), "b": random.normal(b_key, (3,))}

    def loss_fn(params):
        z = x @ params["w"] + params["b"]
        return losses.binary_cross_entropy_with_logits(z, y)

    loss, grads = fnn.value_and_grad(loss_fn)(params)
    print(f"loss {loss:.4f}, gradient of b {grads['b'].tolist()}")

    w, b = params["w"].clone().requires_grad_(), params["b"].clone().requires_grad_()  # as the note has it
    expected = F.binary_cross_entropy_with_logits(torch.matmul(x, w) + b, y)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grads, {"w": w.grad, "b": b.grad})
    assert torch.allclose(grads["b"], torch.sigmoid(x @ params["w"] + params["b"]) / 3)


NET = models.mlp((512, 512))  # Flatten, 784-512-512-10


def a_model() -> None:
    """In the note: a class. Here: an expression, whose parameters are made apart and passed in."""
    print(f"{NET}\n{fnn.summary(NET, torch.zeros(1, 28, 28))}")
    assert str(NET) == "Sequential(Flatten(), Linear(512), relu, Linear(512), relu, Linear(10))"
    params, _ = NET.init(random.key(0), torch.zeros(1, 28, 28))
    assert NET(params, torch.zeros(3, 28, 28)).shape == (3, 10)
    shapes = {path: tuple(leaf.shape) for path, leaf in tree.paths(params).items()}
    assert shapes == {
        "1.weight": (512, 784),
        "1.bias": (512,),
        "3.weight": (512, 512),
        "3.bias": (512,),
        "5.weight": (10, 512),
        "5.bias": (10,),
    }


class CustomNumberDataset(torch.utils.data.Dataset):
    """The note's data set, with a key for its numbers."""

    def __init__(self, key, length=1000):
        data_key, label_key = random.split(key).unbind()
        self.data = random.normal(data_key, (length, 28, 28))
        self.labels = random.randint(label_key, (length,), 0, 10).long()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, idx):
        return self.data[idx], self.labels[idx]


def dataset_and_loader() -> None:
    """`data.Loader` takes any `Dataset`; of arrays in memory it gathers whole batches, in the same keyed order."""
    training = CustomNumberDataset(random.key(0))
    from_dataset = data.Loader(training, 64, key=random.key(1))
    from_arrays = data.Loader((training.data, training.labels), 64, key=random.key(1))
    x, y = next(iter(from_dataset))
    print(f"Shape of X [N, H, W]: {tuple(x.shape)}\nShape of y: {tuple(y.shape)} {y.dtype}")
    assert x.shape == (64, 28, 28)
    assert y.shape == (64,)
    assert y.dtype == torch.int64
    for (x, y), (other_x, other_y) in zip(from_dataset, from_arrays, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
    first, again = (batch[1].tolist() for batch in (next(from_arrays.epoch(0)), next(from_arrays.epoch(0))))
    assert first == again  # an epoch is a function of the key and its number
    assert first != next(from_arrays.epoch(1))[1].tolist()


def loss_fn(params, state, batch, key):
    x, y = batch
    logits, state = NET.apply(params, state, x, key=key, train=True)  # in the note: model.train()
    return losses.cross_entropy(logits, y), (state, {})


def metric_fn(params, state, batch):
    x, y, _ = batch  # the last is the mask of the padded batch
    logits = NET(params, x, state=state)  # in the note: model.eval() and torch.no_grad()
    loss = losses.cross_entropy(logits, y, reduction="none")
    return {"loss": loss, "accuracy": logits.argmax(1) == y}


def train_loop_and_test_loop(out: Path, compile: bool) -> train.TrainState:
    """In the note: two loops over batches. Here: `train.fit` and `train.evaluate` around one compiled step."""
    training, testing = CustomNumberDataset(random.key(0)), CustomNumberDataset(random.key(2), 200)
    batches = data.Loader((training.data, training.labels), 64, key=random.key(1))
    test = data.Loader((testing.data, testing.labels), 64, remainder="pad")

    optimizer = optim.adam(1e-3)
    params, state = NET.init(random.key(3), training.data[:1])
    step = train.make_step(loss_fn, optimizer, compile=compile)
    eval_step = train.make_eval(metric_fn, compile=False)
    board = train.TensorBoard(out / "tensorboard")
    train_state, history = train.fit(
        step,
        train.TrainState.create(params, optimizer, random.key(4), state=state),
        batches,
        epochs=5,
        eval=lambda train_state: train.evaluate(eval_step, train_state, test),
        callbacks=[train.Progress(), board],
        log_every=5,
    )
    assert len(history.rows) == len(history["eval_loss"]) == len(history["eval_accuracy"]) == 5
    assert history["loss"][-1] < history["loss"][0] / 2  # the labels are random: there is nothing to learn but by heart
    assert 0 <= history["eval_accuracy"][-1] < 0.3

    # evaluate is exact: the mean over the 200 images, the last batch of 8 counted as 8.
    logits = NET(train_state.params, testing.data)
    result = train.evaluate(eval_step, train_state, test)
    assert result["accuracy"] == (logits.argmax(1) == testing.labels).double().mean()
    assert abs(result["loss"] - F.cross_entropy(logits, testing.labels)) < 1e-5
    return train_state


def train_and_eval_modes() -> None:
    """In the note: `model.train()` and `model.eval()` switch a flag in the model. Here the call says it, with a key."""
    net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm())
    x = random.normal(random.key(0), (8, 4)) + 3
    params, state = net.init(random.key(1), x)
    y, new_state = net.apply(params, state, x, key=random.key(2), train=True)
    again, _ = net.apply(params, state, x, key=random.key(2), train=True)
    other, _ = net.apply(params, state, x, key=random.key(3), train=True)
    assert torch.equal(y, again)  # the same key drops the same values
    assert not torch.equal(y, other)
    # Running statistics come back in a new state; the old one is as it was.
    assert new_state["1"]["running_mean"].abs().min() > 0
    assert state["1"]["running_mean"].abs().max() == 0
    evaluated = net(params, x, state=state)
    assert torch.allclose(evaluated, x, rtol=1e-4)  # nothing is dropped, and the statistics are still 0 and 1


def saving_and_loading(train_state: train.TrainState, out: Path) -> None:
    """`.safetensors` for trees, with nothing in it that could run; `.pth` and `state_dict` where torch reads it."""
    params, x = train_state.params, random.normal(random.key(0), (3, 28, 28))
    interop.save_safetensors(params, out / "workflow.safetensors")
    loaded = interop.load_safetensors(out / "workflow.safetensors")
    assert torch.equal(NET(loaded, x), NET(params, x))

    # An nn.Module loads what was trained here,
    interop.save_pth(interop.to_state_dict(params), out / "model_weights.pth")
    layers = [torch.nn.Linear(784, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512), torch.nn.ReLU()]
    model = torch.nn.Sequential(torch.nn.Flatten(), *layers, torch.nn.Linear(512, 10))
    model.load_state_dict(torch.load(out / "model_weights.pth", weights_only=True))
    model.eval()
    torch.testing.assert_close(model(x).detach(), NET(params, x))
    # and what it saves comes back, into parameters of the right names and shapes or not at all.
    torch.save(model.state_dict(), out / "model_weights.pth")
    like, _ = NET.init(random.key(0, device="meta"), x)
    loaded, _ = interop.from_state_dict(interop.load_pth(out / "model_weights.pth"), like)
    assert torch.equal(NET(loaded, x), NET(params, x))


def tensorboard_curves(out: Path) -> None:
    """In the note: `writer.add_scalar` in the loop. Here: the callback `train.TensorBoard`, read back by its reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    print(f"TensorBoard has {tags}")
    assert {"step/loss", "epoch/loss", "epoch/eval_loss", "epoch/eval_accuracy"} <= set(tags)
    assert {event.step for event in events.Scalars("epoch/loss")} == {15, 30, 45, 60, 75}


def shapes_that_do_not_fit() -> None:
    """In the note: print every shape. Here the error names the layer, its parameter, and both shapes."""
    params, _ = NET.init(random.key(0), torch.zeros(1, 28, 28))
    message = ""
    try:
        NET(params, torch.zeros(3, 32, 32))
    except ValueError as error:
        message = str(error)
    print(f"ValueError: {message}")
    assert "layer '1'" in message
    assert "(512, 784)" in message
    assert "(512, 1024)" in message
    # The note's cures are torch's.
    assert torch.zeros(3, 32, 32).unsqueeze(0).shape == (1, 3, 32, 32)
    assert torch.zeros(2, 6).reshape(3, -1).shape == (3, 4)


def image_transforms() -> None:
    """Transforms of single images stay torchvision's, in the `Dataset`; what is random works on batches, by a key."""
    from fnn.data import torchvision

    torchvision()  # makes the CUDA build of torchvision import beside a CPU build of torch
    from PIL import Image
    from torchvision.transforms import v2

    transform = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    class Photographs(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            pixels = np.full((300, 400, 3), 60 * index, dtype=np.uint8)
            return transform(Image.fromarray(pixels)), index

    images, labels = next(iter(data.Loader(Photographs(), 4)))
    assert images.shape == (4, 3, 224, 224)
    assert labels.tolist() == [0, 1, 2, 3]
    assert torch.allclose(images[3], torch.full((3, 224, 224), 180 / 255))
    augment = data.augment.compose(data.augment.flip(), data.augment.crop(padding=4))
    assert augment(random.key(0), images).shape == (4, 3, 224, 224)


def main(out: Path = Path("out/notes"), compile: bool = False) -> None:
    out.mkdir(parents=True, exist_ok=True)
    choosing_a_device()
    tensors()
    autograd()
    a_model()
    dataset_and_loader()
    train_state = train_loop_and_test_loop(out, compile)
    train_and_eval_modes()
    saving_and_loading(train_state, out)
    tensorboard_curves(out)
    shapes_that_do_not_fit()
    image_transforms()
    print(f"wrote workflow.safetensors, model_weights.pth and tensorboard to {out}")


if __name__ == "__main__" and fnn.distributed.is_main():  # the first of torchrun's processes does it all
    torch.set_num_threads(1)  # tensors this small gain nothing from more, and lose much where a core is busy
    tyro.cli(main, description=__doc__)
