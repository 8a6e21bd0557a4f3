"""Note 003: autograd, a pretrained network, update rules and an image classifier, in functional form.

    python examples/notes/autograd_and_classifier.py --out out/notes
    python examples/notes/autograd_and_classifier.py --root data     # the folder that holds cifar-10-batches-bin

Each function is one heading of the note. Without --root the classifier learns a small generated set, written to --out
in the files' own format. The full trainer is `python examples/train_image.py --data cifar10 --root data`.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

import fnn
from fnn import data, interop, losses, models, nn, optim, random, train, tree


def tensors_and_numpy() -> None:
    """`from_numpy` shares memory with the array, as in the note; `.to` moves and converts."""
    a = np.ones(5)
    b = torch.from_numpy(a)
    np.add(a, 1, out=a)
    assert a.tolist() == b.tolist() == [2.0] * 5
    assert b.dtype == torch.float64
    device = train.device()
    x = random.uniform(random.key(0, device), (5, 3))
    z = x + torch.ones_like(x, device=device)
    assert z.to("cpu", torch.double).dtype == torch.float64


def one_step_of_resnet18() -> None:
    """The note's forward pass, `backward()` and `optim.step()` of torchvision's resnet18, beside two functional forms.

    The weights are random here: the pretrained ones, `resnet18(weights=ResNet18_Weights.DEFAULT)`, are a download, and
    go in the same way.
    """
    from fnn.data import torchvision

    torchvision()  # makes the CUDA build of torchvision import beside a CPU build of torch
    from torchvision.models import resnet18

    torch.manual_seed(0)  # torchvision's modules draw from torch's generator
    model = resnet18()
    x_key, label_key = random.split(random.key(0)).unbind()
    x, labels = random.uniform(x_key, (1, 3, 64, 64)), random.uniform(label_key, (1, 1000))

    # The module itself, as a pure function.
    wrapped, module_params, module_state = interop.from_module(model)
    # fnn's own network, with the module's weights by name.
    net = models.resnet18()
    like = net.init(random.key(0, device="meta"), x)
    params, state = interop.from_state_dict(model.state_dict(), *like)

    prediction = model(x)
    loss = (prediction - labels).sum()
    loss.backward()
    torch_optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    torch_optimizer.step()
    trained = {name: leaf.detach() for name, leaf in model.state_dict().items()}

    optimizer = optim.sgd(1e-2, momentum=0.9)
    for layer, before, buffers in ((wrapped, module_params, module_state), (net, params, state)):

        def loss_fn(params, layer=layer, buffers=buffers):
            y, new_state = layer.apply(params, buffers, x, train=True)
            return (y - labels).sum(), (y, new_state)

        (_, (y, new_state)), grads = fnn.value_and_grad(loss_fn, has_aux=True)(before)
        updates, _ = optimizer.update(grads, optimizer.init(before), before)
        after = optim.apply_updates(before, updates)
        print(f"{type(layer).__name__}: largest difference of the output {(y - prediction).abs().max():.1e}")
        torch.testing.assert_close(y, prediction.detach(), rtol=1e-4, atol=1e-4)
        for path, leaf in {**tree.paths(after), **tree.paths(new_state)}.items():
            torch.testing.assert_close(leaf, trained[path], rtol=1e-4, atol=1e-4, msg=path)


def differentiation() -> None:
    """In the note: `Q.backward(gradient=external_grad)`. Here: the pullback of Q, given the external gradient."""
    a, b = torch.tensor([2.0, 3.0]), torch.tensor([6.0, 4.0])
    _, pullback = fnn.vjp(lambda a, b: 3 * a**3 - b**2, a, b)
    grad_a, grad_b = pullback(torch.tensor([1.0, 1.0]))
    print(f"dQ/da = {grad_a.tolist()}, dQ/db = {grad_b.tolist()}")
    assert grad_a.tolist() == (9 * a**2).tolist() == [36.0, 81.0]
    assert grad_b.tolist() == (-2 * b).tolist() == [-12.0, -8.0]


def freezing() -> None:
    """In the note: what has `requires_grad=False` is not trained. Here the optimizer is told which leaves those are."""
    net = nn.Sequential({"body": nn.Linear(8), "act": nn.relu, "head": nn.Linear(2)})
    x, y = random.normal(random.key(0), (16, 4)), torch.ones(16, 2)
    params, _ = net.init(random.key(1), x)

    def loss_fn(params, state, batch, key):
        return losses.mse(net(params, batch[0]), batch[1]), (state, {})

    optimizer = optim.freeze(optim.adamw(0.1, weight_decay=0.5), "body.*")
    step = train.make_step(loss_fn, optimizer, compile=False)
    train_state = train.TrainState.create(params, optimizer, random.key(2))
    for _ in range(5):
        train_state, _ = step(train_state, (x, y))
    for path, leaf in tree.paths(train_state.params).items():
        assert torch.equal(leaf, tree.paths(params)[path]) == path.startswith("body.")  # bit for bit, or trained
    assert not any("body" in path for path in tree.paths(train_state.opt_state))  # no memory for what is frozen

    # With plain gradients: split the tree, and differentiate one part.
    head, body = tree.partition(params, "head.*")
    grads = fnn.grad(lambda head: losses.mse(net(tree.combine(head, body), x), y))(head)
    assert list(tree.paths(grads)) == ["head.weight", "head.bias"]


def commented_lenet(m, x):
    """x (N, 1, 32, 32) -> logits (N, 10): the note's forward pass, line by line."""
    c1 = nn.relu(m.conv1(x))  # (N, 6, 28, 28)
    s2 = m.pool(c1)  # (N, 6, 14, 14), no parameters
    c3 = nn.relu(m.conv2(s2))  # (N, 16, 10, 10)
    s4 = m.pool(c3)  # (N, 16, 5, 5)
    f5 = nn.relu(m.fc1(s4.flatten(1)))  # (N, 400) -> (N, 120)
    f6 = nn.relu(m.fc2(f5))  # (N, 84)
    return m.fc3(f6)  # (N, 10)


NET = nn.Block(
    commented_lenet,
    conv1=nn.Conv2d(6, 5),
    conv2=nn.Conv2d(16, 5),
    pool=nn.MaxPool2d(2),
    fc1=nn.Linear(120),
    fc2=nn.Linear(84),
    fc3=nn.Linear(10),
)


def define_the_network() -> None:
    """In the note: `__init__` and `forward`. Here: a function over named layers; sizes of inputs are inferred."""
    x = random.normal(random.key(0), (2, 1, 32, 32))
    params, _ = NET.init(random.key(1), x)
    print(NET)
    assert NET(params, x).shape == (2, 10)
    assert params["fc1"]["weight"].shape == (120, 400)
    assert tree.size(params) == 61_706
    torch.testing.assert_close(NET(params, x), models.lenet5()(params, x))  # the same names: the same parameters


def loss_and_the_simplest_update() -> None:
    """In the note: `f.data.sub_(f.grad.data * learning_rate)`. Here: p - lr * g, which is what `optim.sgd` does."""
    x, target = random.normal(random.key(0), (1, 1, 32, 32)), random.normal(random.key(1), (1, 10))
    params, _ = NET.init(random.key(2), x)
    loss, grads = fnn.value_and_grad(lambda params: losses.mse(NET(params, x), target))(params)
    torch.testing.assert_close(loss, F.mse_loss(NET(params, x), target))
    lr = 0.01
    by_hand = tree.map(lambda p, g: p - lr * g, params, grads)

    optimizer = optim.sgd(lr)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert tree.allclose(by_hand, optim.apply_updates(params, updates), atol=1e-7)
    after = losses.mse(NET(by_hand, x), target)
    print(f"loss {loss:.4f}, after one step {after:.4f}")
    assert after < loss


def update_rules() -> None:
    """SGD, Nesterov, Adam, RMSProp: 100 steps beside `torch.optim`."""
    target = torch.linspace(-1, 1, 6, dtype=torch.float64)
    rules = {
        "SGD": (optim.sgd(0.02), torch.optim.SGD, {"lr": 0.02}),
        "Nesterov": (
            optim.sgd(0.02, momentum=0.9, nesterov=True),
            torch.optim.SGD,
            {"lr": 0.02, "momentum": 0.9, "nesterov": True},
        ),
        "Adam": (optim.adam(0.02), torch.optim.Adam, {"lr": 0.02}),
        "RMSProp": (optim.rmsprop(0.02), torch.optim.RMSprop, {"lr": 0.02}),
    }

    def loss(p):
        return ((p - target) ** 4 + (p - target) ** 2).sum()

    for name, (optimizer, torch_class, settings) in rules.items():
        params = torch.zeros(6, dtype=torch.float64)
        opt_state = optimizer.init(params)
        p = params.clone().requires_grad_()
        torch_optimizer = torch_class([p], **settings)
        for _ in range(100):
            updates, opt_state = optimizer.update(fnn.grad(loss)(params), opt_state, params)
            params = optim.apply_updates(params, updates)
            torch_optimizer.zero_grad()
            loss(p).backward()
            torch_optimizer.step()
        print(f"{name:>8}: loss {loss(torch.zeros(6)):.3f} -> {loss(params):.1e}")
        torch.testing.assert_close(params, p.detach(), rtol=1e-10, atol=1e-10)
        assert loss(params) < 0.1 * loss(torch.zeros(6))


def generate_cifar10(root: Path) -> None:
    """A small set in CIFAR-10's binary format: six files of records, a label and three planes of 32 x 32 pixels."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True, exist_ok=True)
    class_key, key = random.split(random.key(0)).unbind()
    patterns = random.uniform(class_key, (10, 3072))
    for index, name in enumerate((*[f"data_batch_{number}.bin" for number in range(1, 6)], "test_batch.bin")):
        label_key, noise_key = random.split(random.fold_in(key, index)).unbind()
        labels = random.randint(label_key, (60,), 0, 10).long()
        pixels = 255 * (0.5 * patterns[labels] + 0.5 * random.uniform(noise_key, (60, 3072)))
        records = torch.cat([labels[:, None], pixels.long()], 1)
        (folder / name).write_bytes(records.to(torch.uint8).numpy().tobytes())


def training_a_classifier(out: Path, root: Path | None) -> None:
    """The note's five steps."""
    # 1. Load and normalize the training and test images.
    if root is None:
        generate_cifar10(out)
    images = data.cifar10(root or out)
    print(images)
    training = (images.train[0][:2000], images.train[1][:2000])
    assert images.image_shape == (3, 32, 32)
    assert images.classes[:3] == ("airplane", "automobile", "bird")
    assert images.train[0].mean((0, 2, 3)).abs().max() < 1e-3
    # 2. Define a convolutional network.
    params, state = NET.init(random.key(1), training[0][:1])

    # 3. Define a loss function and an optimizer.
    def loss_fn(params, state, batch, key):
        x, labels = batch
        return losses.cross_entropy(NET(params, x), labels), (state, {})

    optimizer = optim.adam(3e-3)
    # 4. Train the network on the training data.
    train_state, history = train.fit(
        train.make_step(loss_fn, optimizer, compile=False),
        train.TrainState.create(params, optimizer, random.key(2), state=state),
        data.Loader(training, 50, key=random.key(3)),
        epochs=6,
    )

    # 5. Test the network on the test data.
    def metric_fn(params, state, batch):
        x, labels, _ = batch
        return {"accuracy": NET(params, x).argmax(1) == labels}

    test = data.Loader(images.test, 50, remainder="pad")
    accuracy = train.evaluate(train.make_eval(metric_fn, compile=False), train_state, test)["accuracy"]
    print(f"loss {history['loss'][0]:.3f} -> {history['loss'][-1]:.3f}, test accuracy {accuracy:.3f}")
    assert history["loss"][-1] < history["loss"][0]
    assert accuracy > (0.9 if root is None else 0.2)  # real photographs take longer than this


def main(out: Path = Path("out/notes"), root: Path | None = None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors_and_numpy()
    one_step_of_resnet18()
    differentiation()
    freezing()
    define_the_network()
    loss_and_the_simplest_update()
    update_rules()
    training_a_classifier(out, root)


if __name__ == "__main__" and fnn.distributed.is_main():  # the first of torchrun's processes does it all
    torch.set_num_threads(1)  # tensors this small gain nothing from more, and lose much where a core is busy
    tyro.cli(main, description=__doc__)
