"""Note 002, from regression to convolutional networks, in functional form.

    python examples/notes/regression_to_cnn.py --out out/notes
    python examples/notes/regression_to_cnn.py --root data        # the folder that holds MNIST/raw

Each function is one heading of the note. Writes three pictures of digits, own_layers.safetensors and a
folder of TensorBoard events to --out. The optimisation of Himmelblau's function is examples/himmelblau.py, and a
trainer to start a project with is examples/train_image.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

import fnn
from fnn import data, interop, losses, models, nn, optim, random, train, tree

# ---- 2. A simple regression problem


def handwritten_digits(out: Path, root: Path | None) -> None:
    """784-256-64-10, SGD with momentum, mean squared error of one-hot labels: the note's first program."""
    images = data.digits(size=28) if root is None else data.mnist(root, pad=0)
    training = (images.train[0][:1438], images.train[1][:1438])  # all of the digits, or as many of MNIST
    print(images)
    assert images.image_shape == (1, 28, 28)
    plot_image(images, training[1][:6], out / "digits_samples.png", training[0])

    net = models.mlp((256, 64))

    def loss_fn(params, state, batch, key):
        x, y = batch
        loss = losses.mse(net(params, x), F.one_hot(y, 10).float())
        return loss, (state, {})

    def metric_fn(params, state, batch):
        x, y, _ = batch
        return {"accuracy": net(params, x).argmax(1) == y}

    params, _ = net.init(random.key(0), training[0][:1])
    optimizer = optim.sgd(0.05, momentum=0.9)
    batches = data.Loader(training, 64, key=random.key(1))
    test = data.Loader(images.test, 64, remainder="pad")
    eval_step = train.make_eval(metric_fn, compile=False)
    train_state, history = train.fit(
        train.make_step(loss_fn, optimizer, compile=False),
        train.TrainState.create(params, optimizer, random.key(2)),
        batches,
        epochs=6,
        eval=lambda train_state: train.evaluate(eval_step, train_state, test),
        callbacks=[train.TensorBoard(out / "digits_tensorboard")],
    )
    accuracy = train.evaluate(eval_step, train_state, test)["accuracy"]
    print(f"test acc: {accuracy:.3f}")
    assert history["loss"][-1] < history["loss"][0] / 2
    assert accuracy > 0.85
    history.plot(out / "digits_curve.png")  # in the note: plot_curve, and Visdom
    plot_image(images, net(train_state.params, images.test[0][:6]).argmax(1), out / "digits_predictions.png")


def plot_image(images: data.ImageDataset, labels, path: Path, inputs=None) -> None:
    """The note's grid of six images with their labels, the standardisation undone."""
    inputs = images.test[0] if inputs is None else inputs
    figure = Figure(figsize=(6, 4), layout="constrained")
    for index, label in enumerate(labels.tolist()):
        axes = figure.add_subplot(2, 3, index + 1, title=f"label: {label}", xticks=[], yticks=[])
        axes.imshow(inputs[index, 0] * images.preprocessing["std"][0] + images.preprocessing["mean"][0], cmap="gray")
    figure.savefig(path, dpi=100)


# ---- 3. Tensors


def tensors_under_vmap() -> None:
    """The note's operations are torch's. `fnn.vmap` takes each to a batch without an index for it."""
    assert torch.full([], 7.0).dim() == 0
    assert torch.tensor([2.2, 3.3]).dtype == torch.float32
    assert torch.arange(0, 10, 3).tolist() == [0, 3, 6, 9]
    assert torch.linspace(0, 1, steps=3).tolist() == [0.0, 0.5, 1.0]

    a = random.normal(random.key(0), (4, 3, 6, 6))
    assert a[:2, 1:, :, :].shape == (2, 2, 6, 6)
    assert a[:, :, 0:6:2, 0:6:2].shape == (4, 3, 3, 3)
    assert a[..., :2].shape == (4, 3, 6, 2)
    assert a.index_select(0, torch.tensor([0, 2])).shape == (2, 3, 6, 6)
    assert torch.take(torch.tensor([[4, 3, 5], [6, 7, 8]]), torch.tensor([0, 2, 5])).tolist() == [4, 5, 8]
    assert a.unsqueeze(0).shape == (1, 4, 3, 6, 6)
    assert torch.zeros(1, 32, 1, 1).squeeze().shape == (32,)
    assert torch.zeros(1, 32, 1, 1).expand(4, 32, 14, 14).shape == (4, 32, 14, 14)
    assert torch.zeros(1, 32, 1, 1).repeat(4, 32, 1, 1).shape == (4, 1024, 1, 1)
    assert a.permute(0, 2, 3, 1).shape == (4, 6, 6, 3)

    one_image = {  # each a function of one image (3, 6, 6)
        "index": lambda x: x[1, ..., ::2],
        "reshape": lambda x: x.reshape(3, 36),
        "transpose": lambda x: x.transpose(0, 2).contiguous().reshape(6, 18),
        "broadcast": lambda x: x - x.mean((1, 2), keepdim=True),
        "cat": lambda x: torch.cat([x, x.flip(0)], dim=0),
        "stack": lambda x: torch.stack([x, x], dim=0),
        "split": lambda x: torch.split(x, [1, 2], dim=0)[1],
        "chunk": lambda x: x.chunk(3, dim=0)[0],
        "matmul": lambda x: x @ x.mT,
        "math": lambda x: x.exp().log() + x.pow(2).sqrt() + x.square().add(1).rsqrt() + x.clamp(-1, 1),
        "rounding": lambda x: x.floor() + x.ceil() + x.trunc() + x.frac(),
        "norms": lambda x: torch.stack([x.norm(1), x.norm(2), x.norm(2, dim=1).sum()]),
        "statistics": lambda x: torch.stack([x.min(), x.max(), x.mean(), x.prod(), x.argmax().float()]),
        "topk": lambda x: x.topk(3, dim=1, largest=False).values,
        "kthvalue": lambda x: x.kthvalue(2, dim=1).values,
        "compare": lambda x: torch.eq(x, x.round()) | (x > 0.5),
        "where": lambda x: torch.where(x > 0.5, x, 0.0),
        "gather": lambda x: torch.gather(x, 1, x.topk(2, dim=1).indices),
    }
    for name, f in one_image.items():
        batched, unbatched = fnn.vmap(f)(a), torch.stack([f(x) for x in a])
        torch.testing.assert_close(batched, unbatched, msg=name)
    # What has a size that depends on values, such as masked_select, has no batched form.
    assert torch.masked_select(a, a.ge(0.5)).shape == ((a >= 0.5).sum(),)

    assert torch.where(torch.tensor([[0.6, 0.7], [0.8, 0.4]]) > 0.5, 0, 1).tolist() == [[0, 0], [0, 1]]
    labels = (torch.arange(10) + 100).expand(4, 10)
    chosen = random.normal(random.key(1), (4, 10)).topk(3, dim=1).indices
    assert torch.equal(torch.gather(labels, 1, chosen), chosen + 100)


# ---- 4. Gradients, activations, the chain rule


def activations() -> None:
    """Sigmoid, tanh and ReLU, with the derivatives that the note writes down."""
    a = torch.linspace(-4, 4, 9)
    s, t = nn.sigmoid(a), nn.tanh(a)
    torch.testing.assert_close(fnn.vmap(fnn.grad(nn.sigmoid))(a), s * (1 - s))
    torch.testing.assert_close(fnn.vmap(fnn.grad(nn.tanh))(a), 1 - t**2)
    torch.testing.assert_close(t, 2 * nn.sigmoid(2 * a) - 1)
    assert torch.equal(fnn.vmap(fnn.grad(nn.relu))(a), (a > 0).float())


def mse_gradient() -> None:
    """In the note: `torch.autograd.grad(mse, [w])` at x = 1, w = 2, y = 1. Here the loss comes along."""

    def loss(w):
        x = torch.ones(1)
        return losses.mse(x * w, torch.ones(1))

    value, gradient = fnn.value_and_grad(loss)(torch.full([1], 2.0))
    print(f"mse {value}, gradient {gradient}")
    assert value == 1
    assert gradient.tolist() == [2.0]


def softmax_jacobian() -> None:
    """In the note: one row at a time, with `retain_graph`. Here all rows: diag(p) - p p^T."""
    a = random.uniform(random.key(0), (3,))
    p = nn.softmax(a)
    jacobian = fnn.jacobian(nn.softmax)(a)
    print(f"Jacobian of softmax:\n{jacobian}")
    torch.testing.assert_close(jacobian, torch.diag(p) - torch.outer(p, p))
    for row in (1, 2):
        torch.testing.assert_close(jacobian[row], fnn.grad(lambda a, row=row: nn.softmax(a)[row])(a))


def perceptron() -> None:
    """One output and K outputs: the mean over outputs gives 2 / K (O_k - t_k) O_k (1 - O_k) x_j."""
    x_key, w_key = random.split(random.key(0)).unbind()
    x = random.normal(x_key, (1, 10))
    for outputs in (1, 2):
        w = random.normal(w_key, (outputs, 10))
        t = torch.ones(1, outputs)
        gradient = fnn.grad(lambda w, t=t: losses.mse(nn.sigmoid(x @ w.mT), t))(w)
        o = nn.sigmoid(x @ w.mT)
        assert gradient.shape == (outputs, 10)
        torch.testing.assert_close(gradient, (2 / outputs * (o - t) * o * (1 - o)).mT * x)


def chain_rule() -> None:
    """x -> y1 -> y2: the product of two derivatives is the derivative of the composition, backwards and forwards."""
    x, w1, b1, w2, b2 = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]).unbind()

    def y1(w1):
        return x * w1 + b1

    def y2(y1):
        return y1 * w2 + b2

    dy2_dy1 = fnn.grad(y2)(y1(w1))
    dy1_dw1 = fnn.grad(y1)(w1)
    dy2_dw1 = fnn.grad(lambda w1: y2(y1(w1)))(w1)
    assert dy2_dy1 * dy1_dw1 == 2
    assert dy2_dw1 == 2
    _, forwards = fnn.jvp(lambda w1: y2(y1(w1)), w1, torch.ones(()))
    assert forwards == 2


def logistic_regression() -> None:
    """Three layers by hand: the parameters are a list of dicts, the network is a function of them."""

    def forward(params, x):
        for layer in params:
            x = nn.relu(x @ layer["w"].mT + layer["b"])  # the note has a ReLU after the last layer, too
        return x

    keys = random.split(random.key(0), 3)
    sizes = [(200, 784), (200, 200), (10, 200)]
    params = [
        {"w": random.normal(key, size) * (2 / size[1]) ** 0.5, "b": torch.zeros(size[0])}
        for key, size in zip(keys, sizes, strict=True)
    ]
    x = random.normal(random.key(1), (32, 784))
    y = random.randint(random.key(2), (32,), 0, 10).long()

    # As the note has it.
    w1, b1, w2, b2, w3, b3 = (leaf.clone().requires_grad_() for leaf in tree.leaves(params))
    torch_optimizer = torch.optim.SGD([w1, b1, w2, b2, w3, b3], lr=0.05)
    torch_losses = []
    for _ in range(10):
        hidden = F.relu(F.relu(x @ w1.t() + b1) @ w2.t() + b2)
        loss = F.cross_entropy(F.relu(hidden @ w3.t() + b3), y)
        torch_optimizer.zero_grad()
        loss.backward()
        torch_optimizer.step()
        torch_losses.append(loss.item())

    optimizer = optim.sgd(0.05)
    opt_state = optimizer.init(params)
    for torch_loss in torch_losses:
        loss, grads = fnn.value_and_grad(lambda params: losses.cross_entropy(forward(params, x), y))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optim.apply_updates(params, updates)
        assert abs(loss - torch_loss) < 1e-5
    assert tree.allclose(params, [{"w": w1, "b": b1}, {"w": w2, "b": b2}, {"w": w3, "b": b3}], rtol=1e-4, atol=1e-6)
    print(f"cross entropy {torch_losses[0]:.4f} -> {loss:.4f}, as torch has it")


# ---- 5. GPU, 6. curves


def to_device(device: str = "auto") -> None:
    """In the note: `net.to(device)`. Here a tree moves, and the function runs where its arguments lie."""
    target = train.device(device)
    net = nn.Linear(2)
    params, _ = net.init(random.key(0), torch.zeros(1, 3))
    moved = tree.map(lambda leaf: leaf.to(target), params)
    y = net(moved, torch.ones(1, 3, device=target))
    assert y.device.type == target.type
    torch.testing.assert_close(y.cpu(), net(params, torch.ones(1, 3)))


def curves(out: Path) -> None:
    """In the note: Visdom, which is no longer maintained. Here: TensorBoard's files, and a PNG."""
    events = list((out / "digits_tensorboard").glob("events.out.tfevents.*"))
    assert events
    assert (out / "digits_curve.png").read_bytes().startswith(b"\x89PNG")


# ---- 7. Overfitting


def splits() -> None:
    """In the note: `random_split(train_db, [50000, 10000])`, and k-fold cross validation in words."""
    examples = {"x": random.normal(random.key(0), (60, 4)), "index": torch.arange(60)}
    training, validation = data.split(examples, (5 / 6, 1 / 6), key=random.key(1))
    assert (len(training["x"]), len(validation["x"])) == (50, 10)
    assert sorted([*training["index"].tolist(), *validation["index"].tolist()]) == list(range(60))

    folds = data.KFold(examples, 5, key=random.key(2))
    held_out = []
    for training, validation in folds:
        assert (len(training["index"]), len(validation["index"])) == (48, 12)
        assert not set(training["index"].tolist()) & set(validation["index"].tolist())
        held_out += validation["index"].tolist()
    assert sorted(held_out) == list(range(60))  # every example validates once
    again = data.KFold(examples, 5, key=random.key(2))
    assert torch.equal(folds[0][1]["index"], again[0][1]["index"])


def regularization() -> None:
    """L1 and L2 are terms of the loss. As weight decay, L2 is an argument of the optimizer: the same gradient."""
    params, _ = nn.Linear(2).init(random.key(0), torch.zeros(1, 3))
    assert losses.l1_penalty(params) == sum(leaf.abs().sum() for leaf in tree.leaves(params))
    assert losses.l2_penalty(params) == sum(leaf.square().sum() for leaf in tree.leaves(params))

    def loss(params):
        return losses.mse(nn.Linear(2)(params, torch.ones(4, 3)), torch.zeros(4, 2))

    by_loss = optim.sgd(0.1)
    by_decay = optim.sgd(0.1, weight_decay=0.01)
    grads = fnn.grad(lambda params: loss(params) + 0.01 / 2 * losses.l2_penalty(params))(params)
    ours, _ = by_loss.update(grads, by_loss.init(params), params)
    decayed, _ = by_decay.update(fnn.grad(loss)(params), by_decay.init(params), params)
    assert tree.allclose(ours, decayed, atol=1e-7)


def momentum_and_learning_rate_decay() -> None:
    """SGD with momentum and weight decay, and a rate that falls on a plateau: step for step what torch does."""
    target = random.normal(random.key(0), (5,), torch.float64)
    params = torch.zeros(5, dtype=torch.float64)
    optimizer = optim.reduce_on_plateau(
        optim.sgd(0.4, momentum=0.9, weight_decay=1e-3), factor=0.5, patience=2, threshold=0.1
    )
    opt_state = optimizer.init(params)

    p = params.clone().requires_grad_()
    torch_optimizer = torch.optim.SGD([p], lr=0.4, momentum=0.9, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        torch_optimizer, "min", factor=0.5, patience=2, threshold=0.1
    )
    rates = []
    for _ in range(40):
        value, grads = fnn.value_and_grad(lambda p: (p - target).square().sum())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=value)
        params = optim.apply_updates(params, updates)

        torch_optimizer.zero_grad()
        loss = (p - target).square().sum()
        loss.backward()
        torch_optimizer.step()
        scheduler.step(loss.item())
        rates.append(float(optim.get(opt_state, "lr")))
        torch.testing.assert_close(params, p.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(rates[-1], torch_optimizer.param_groups[0]["lr"], rtol=1e-10, atol=0.0)
    print(f"learning rate on the plateau: {rates[0]} -> {rates[-1]}")
    assert rates[-1] < rates[0]


def early_stopping() -> None:
    """The run ends when validation no longer improves, and goes back to where it was best."""
    net = nn.Linear(1)
    x_key, noise_key = random.split(random.key(0)).unbind()
    x = random.normal(x_key, (16, 12))
    y = x[:, :1] + 2 * random.normal(noise_key, (16, 1))  # hardly more examples than weights, and noise
    training, validation = data.split((x, y), (0.75, 0.25))

    def loss_fn(params, state, batch, key):
        x, y = batch
        return losses.mse(net(params, x), y), (state, {})

    optimizer = optim.sgd(0.05)
    params, _ = net.init(random.key(1), x)
    stopping = train.EarlyStopping("eval_loss", patience=3)
    train_state, history = train.fit(
        train.make_step(loss_fn, optimizer, compile=False),
        train.TrainState.create(params, optimizer, random.key(2)),
        data.Loader(training, 12),
        epochs=300,
        eval=lambda ts: {"loss": float(losses.mse(net(ts.params, validation[0]), validation[1]))},
        callbacks=[stopping],
    )
    values = history["eval_loss"]
    print(f"stopped after {len(values)} epochs: {history.stopped}")
    assert len(values) < 300
    assert stopping.best_value == min(values)
    assert len(values) == stopping.best_epoch + 3
    assert int(train_state.step) == stopping.best_epoch  # one step an epoch: the state is that of the best


def dropout() -> None:
    """The note's network: dropped by a key in training, whole in evaluation, the mean preserved."""
    net = nn.Sequential(
        nn.Linear(200), nn.Dropout(0.5), nn.relu, nn.Linear(200), nn.Dropout(0.5), nn.relu, nn.Linear(10)
    )
    params, state = net.init(random.key(0), torch.zeros(1, 784))
    x = random.normal(random.key(1), (4, 784))
    without = nn.Sequential(*[child for _, child in net.children if not isinstance(child, nn.Dropout)])
    kept = {"0": params["0"], "2": params["3"], "4": params["6"]}
    assert torch.equal(net(params, x), without(kept, x))
    trained, _ = net.apply(params, state, x, key=random.key(2), train=True)
    assert not torch.equal(trained, net(params, x))

    dropped, _ = nn.Dropout(0.5).apply({}, {}, torch.ones(100_000), key=random.key(3), train=True)
    assert set(dropped.tolist()) == {0.0, 2.0}
    assert abs(dropped.mean() - 1) < 0.02


def augmentation() -> None:
    """Flip, rotate, scale, crop and noise: functions of a key and a batch, so the same key gives the same batch."""
    images = random.uniform(random.key(0), (8, 3, 16, 16))
    augment = data.augment
    change = augment.compose(
        augment.flip(), augment.rotate(10.0), augment.scale(0.9, 1.1), augment.crop(2), augment.noise(0.05)
    )
    changed = change(random.key(1), images)
    assert changed.shape == images.shape
    assert torch.equal(changed, change(random.key(1), images))
    assert not torch.equal(changed, change(random.key(2), images))


# ---- 8. Convolutional networks


def convolution_pooling_and_batch_norm() -> None:
    """The note's shapes, and torch's own layers with the same weights."""
    x = random.uniform(random.key(0), (1, 1, 28, 28))
    for stride, padding, size in ((1, 0, 26), (1, 1, 28), (2, 1, 14)):
        layer = nn.Conv2d(3, 3, stride=stride, padding=padding)
        params, _ = layer.init(random.key(1), x)
        torch_layer = torch.nn.Conv2d(1, 3, kernel_size=3, stride=stride, padding=padding)
        torch_layer.load_state_dict(params)
        y = layer(params, x)
        assert y.shape == (1, 3, size, size)
        assert params["weight"].shape == (3, 1, 3, 3)
        assert params["bias"].shape == (3,)
        torch.testing.assert_close(y, torch_layer(x).detach())

    x = random.normal(random.key(2), (4, 16, 14, 14))
    assert nn.MaxPool2d(2, stride=2)({}, x).shape == (4, 16, 7, 7)
    torch.testing.assert_close(nn.MaxPool2d(2, stride=2)({}, x), F.max_pool2d(x, 2, stride=2))
    torch.testing.assert_close(nn.AvgPool2d(2, stride=2)({}, x), F.avg_pool2d(x, 2, stride=2))
    assert torch.equal(nn.relu(x), F.relu(x))

    norm, torch_norm = nn.BatchNorm(), torch.nn.BatchNorm2d(16)
    params, state = norm.init(random.key(3), x)
    y, state = norm.apply(params, state, x, train=True)
    torch.testing.assert_close(y, torch_norm(x).detach())
    torch.testing.assert_close(state["running_mean"], torch_norm.running_mean)
    torch.testing.assert_close(state["running_var"], torch_norm.running_var)
    torch.testing.assert_close(norm(params, x, state=state), torch_norm.eval()(x).detach())


def classic_networks() -> None:
    """LeNet-5, VGG, GoogLeNet and ResNet, counted on a meta key: shapes without memory."""
    image = torch.zeros(1, 3, 224, 224)
    counts = {
        "lenet5": (models.lenet5(), torch.zeros(1, 1, 32, 32), 61_706),
        "vgg16": (models.vgg16(), image, 138_357_544),
        "googlenet": (models.googlenet(aux_logits=False), image, 6_624_904),
        "resnet18": (models.resnet18(), image, 11_689_512),
    }
    for name, (net, example, expected) in counts.items():
        params, _ = net.init(random.key(0, device="meta"), example)
        print(f"{name:>10}: {tree.size(params):>11,} parameters")
        assert tree.size(params) == expected  # those of torchvision


# ---- 9. nn.Module


@dataclass(frozen=True)
class MyFlatten(nn.Layer):
    """The note's own Flatten: a layer without parameters needs `apply` only."""

    uses_key = False

    def apply(self, params, state, x, *, key=None, train=False):
        return x.reshape(x.shape[0], -1), state


@dataclass(frozen=True)
class MyLinear(nn.Layer):
    """The note's own Linear. The class holds configuration; the weights are what `init` returns."""

    features: int
    uses_key = False

    def init(self, key, x):
        weight = random.normal(key, (self.features, x.shape[-1])) * x.shape[-1] ** -0.5
        return {"w": weight, "b": torch.zeros(self.features, device=key.device)}, {}

    def apply(self, params, state, x, *, key=None, train=False):
        return x @ params["w"].mT + params["b"], state


def layers_of_ones_own(out: Path) -> None:
    """parameters, modules, save and load, with layers written by hand."""
    net = nn.Sequential(nn.Conv2d(4, 3), nn.relu, MyFlatten(), MyLinear(10))
    x = random.normal(random.key(0), (2, 1, 8, 8))
    params, state = net.init(random.key(1), x)
    y = net(params, x)
    assert y.shape == (2, 10)
    # in the note: net.parameters(), named_parameters() and modules()
    assert list(tree.paths(params)) == ["0.weight", "0.bias", "3.w", "3.b"]
    assert [name for name, _ in net.children] == ["0", "1", "2", "3"]
    assert isinstance(net.children[3][1], MyLinear)
    assert [row.parameters for row in fnn.summary(net, x).rows] == [40, 0, 0, 1450]
    # in the note: torch.save and load
    interop.save_safetensors({"params": params, "state": state}, out / "own_layers.safetensors")
    loaded = interop.load_safetensors(out / "own_layers.safetensors")
    assert torch.equal(net(loaded["params"], x), y)
    # a layer of one's own goes through every transform
    gradient = fnn.grad(lambda params: net(params, x).square().sum())(params)
    assert {path: leaf.shape for path, leaf in tree.paths(gradient).items()} == {
        path: leaf.shape for path, leaf in tree.paths(params).items()
    }
    torch.testing.assert_close(fnn.vmap(lambda image: net(params, image[None])[0])(x), y)


def main(out: Path = Path("out/notes"), root: Path | None = None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    handwritten_digits(out, root)
    tensors_under_vmap()
    activations()
    mse_gradient()
    softmax_jacobian()
    perceptron()
    chain_rule()
    logistic_regression()
    to_device()
    curves(out)
    splits()
    regularization()
    momentum_and_learning_rate_decay()
    early_stopping()
    dropout()
    augmentation()
    convolution_pooling_and_batch_norm()
    classic_networks()
    layers_of_ones_own(out)
    print(f"wrote pictures and curves to {out}")


if __name__ == "__main__" and fnn.distributed.is_main():  # the first of torchrun's processes does it all
    torch.set_num_threads(1)  # tensors this small gain nothing from more, and lose much where a core is busy
    tyro.cli(main, description=__doc__)
