"""Note 000, first steps: tensors, autograd, the Jacobian and the smallest network, in functional form.

    python examples/notes/first_steps.py

Each function is one heading of the note. Where the note marks tensors with `requires_grad`, calls `backward()` and
reads `.grad`, a function is written down once, and a transform of it (`fnn.grad`, `fnn.vjp`, `fnn.jacobian`) computes
the derivative. Nothing is recorded on a tensor, so nothing has to be zeroed, detached or kept.
"""

import torch
import torch.nn.functional as F
import tyro

import fnn
from fnn import losses, models, optim, random, train, tree


def making_tensors() -> None:
    """`torch.rand` and `torch.randn` draw from a hidden generator. Here what is random takes a key."""
    key = random.key(0)
    uniform = random.uniform(key, (5, 3))  # torch.rand(5, 3)
    normal = random.normal(key, (5, 3))  # torch.randn(5, 3)
    assert uniform.shape == torch.rand(5, 3).shape
    assert uniform.dtype == normal.dtype == torch.float32
    assert 0 <= uniform.min() <= uniform.max() < 1
    assert torch.equal(uniform, random.uniform(key, (5, 3)))  # the same key, the same values
    first, second = random.split(key).unbind()  # a key for each use
    assert not torch.equal(random.normal(first, (5, 3)), random.normal(second, (5, 3)))

    # What is not random is torch itself.
    assert torch.empty(5, 3).shape == (5, 3)
    assert torch.zeros(5, 3, dtype=torch.long).dtype == torch.int64
    assert torch.tensor([5.5, 3]).tolist() == [5.5, 3.0]
    ones = torch.tensor([5.5, 3]).new_ones(5, 3, dtype=torch.double)
    assert ones.dtype == torch.float64
    like = random.normal(key, ones.shape, torch.float32)  # torch.randn_like(ones, dtype=torch.float)
    assert like.shape == ones.shape
    assert like.dtype == torch.float32
    print(f"uniform numbers from key(0), the same on every machine and in JAX:\n{uniform[:2]}")


def changing_shapes() -> None:
    """`view` is torch's own."""
    x = random.normal(random.key(0), (4, 4))
    assert x.view(16).shape == (16,)
    assert x.view(-1, 8).shape == (2, 8)


def backward_of_a_scalar() -> None:
    """In the note: `x.requires_grad`, `out.backward()`, `x.grad`. Here: `fnn.grad(f)(x)`."""

    def f(x):
        y = x + 2
        z = y * 3 * 3
        return z.mean()

    x = torch.ones(2, 2)
    gradient = fnn.grad(f)(x)
    print(f"gradient of mean((x + 2) * 3 * 3):\n{gradient}")
    assert gradient.tolist() == [[2.25, 2.25], [2.25, 2.25]]
    # `grad_fn` is the note's record of what to differentiate. Here the record is f, and tensors carry none.
    assert (x + 2).grad_fn is None
    assert x.grad is None


def backward_of_a_vector() -> None:
    """In the note: `y.backward(v)`. Here: `fnn.vjp(f, x)` gives y, and a function of v that gives v J."""
    x = torch.tensor([2.0, 3.0])
    y, pullback = fnn.vjp(lambda x: x * 2 * 2, x)
    (gradient,) = pullback(torch.tensor([1.0, 0.5]))
    print(f"v J for y = x * 2 * 2 and v = [1, 0.5]: {gradient}")
    assert y.tolist() == [8.0, 12.0]
    assert gradient.tolist() == [4.0, 2.0]


def stopping_the_gradient() -> None:
    """In the note: `with torch.no_grad()`. Here one says what a derivative is taken of, in one of three ways."""
    x = torch.tensor([2.0, 2.0])
    # An argument that is not asked for is a constant.
    gradient = fnn.grad(lambda x, y: (x * y).sum())(x, x * 2)
    assert gradient.tolist() == [4.0, 4.0]
    # A part of a tree is taken out, and gradients are of the rest; () stands where there is none.
    params = {"body": torch.ones(2), "head": torch.ones(2)}
    head, body = tree.partition(params, "head")
    gradient = fnn.grad(lambda head: sum(leaf.sum() for leaf in tree.leaves(tree.combine(head, body))))(head)
    assert gradient["body"] == ()
    assert gradient["head"].tolist() == [1.0, 1.0]
    # Inside a function, detach stops the derivative.
    gradient = fnn.grad(lambda x: (x + (x * 2).detach()).sum())(x)
    print(f"gradient of sum(x + stop(2 x)): {gradient}")
    assert gradient.tolist() == [1.0, 1.0]
    assert fnn.grad(lambda x: (x * 2).detach().sum())(x).tolist() == [0.0, 0.0]


def jacobian_matrix() -> None:
    """The note's y = [x1^2, x2^2]: its Jacobian, and v J by one call that never builds the Jacobian."""
    x, v = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 0.5])
    jacobian = fnn.jacobian(torch.square)(x)
    print(f"Jacobian of [x1^2, x2^2] at {x.tolist()}:\n{jacobian}")
    assert torch.equal(jacobian, torch.diag(2 * x))
    _, pullback = fnn.vjp(torch.square, x)
    assert torch.equal(pullback(v)[0], 2 * v * x)
    assert torch.equal(pullback(v)[0], v @ jacobian)


class Net(torch.nn.Module):
    """The note's network, for comparison."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 6, 5)
        self.conv2 = torch.nn.Conv2d(6, 16, 5)
        self.fc1 = torch.nn.Linear(16 * 5 * 5, 120)
        self.fc2 = torch.nn.Linear(120, 84)
        self.fc3 = torch.nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.flatten(1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def the_smallest_network() -> None:
    """1-6-16-(16*5*5)-120-84-10, mean squared error, SGD, five epochs of random data, beside the note's own loop."""
    net, optimizer = models.lenet5(), optim.sgd(0.01)
    init_key, data_key, step_key = random.split(random.key(0), 3).unbind()
    params, state = net.init(init_key, torch.zeros(1, 1, 32, 32))

    module = Net()
    module.load_state_dict(tree.paths(params))  # leaves have torch's names and shapes
    torch_optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

    def loss_fn(params, state, batch, key):
        inputs, targets = batch
        outputs, state = net.apply(params, state, inputs, key=key, train=True)
        return losses.mse(outputs, targets), (state, {})

    # zero_grad, forward, loss, backward and step are one function of the state; compile=True would make it one graph.
    step = train.make_step(loss_fn, optimizer, compile=False)
    train_state = train.TrainState.create(params, optimizer, step_key, state=state)
    for epoch in range(5):
        input_key, target_key = random.split(random.fold_in(data_key, epoch)).unbind()
        inputs, targets = random.normal(input_key, (1, 1, 32, 32)), random.normal(target_key, (1, 10))
        train_state, metrics = step(train_state, (inputs, targets))

        torch_optimizer.zero_grad()
        loss = F.mse_loss(module(inputs), targets)
        loss.backward()
        torch_optimizer.step()
        print(f"Epoch {epoch + 1}, Loss: {metrics['loss']:.4f}, with nn.Module {loss:.4f}")
        assert abs(metrics["loss"] - loss) < 1e-5
    trained = {name: value.detach() for name, value in module.named_parameters()}
    assert all(torch.allclose(leaf, trained[path], atol=1e-5) for path, leaf in tree.paths(train_state.params).items())


def main() -> None:
    making_tensors()
    changing_shapes()
    backward_of_a_scalar()
    backward_of_a_vector()
    stopping_the_gradient()
    jacobian_matrix()
    the_smallest_network()


if __name__ == "__main__" and fnn.distributed.is_main():  # the first of torchrun's processes does it all
    tyro.cli(main, description=__doc__)
