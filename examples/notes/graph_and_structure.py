"""Note 004: the graph, tensor operations, einsum, parameters and modules, in functional form.

    python examples/notes/graph_and_structure.py --out out/notes

Each function is one heading of the note. Writes a folder with a TensorBoard graph to --out.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

import fnn
from fnn import data, losses, nn, ops, optim, random, train, tree

# ---- 4. The dynamic graph


def graph_that_is_not_kept() -> None:
    """In the note: `backward()` frees the graph, unless `retain_graph`. A function can be differentiated again."""
    w, b = torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0]])
    x_key, y_key = random.split(random.key(0)).unbind()
    X, Y = random.normal(x_key, (10, 2)), random.normal(y_key, (10, 1))

    def loss(w, b):
        Y_hat = X @ w.t() + b
        return torch.mean(torch.pow(Y_hat - Y, 2))

    gradient = fnn.grad(loss, argnums=(0, 1))
    first, second = gradient(w, b), gradient(w, b)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    value, pullback = fnn.vjp(loss, w, b)  # this one keeps what it needs as long as it lives, and may be called again
    for _ in range(2):
        torch.testing.assert_close(pullback(torch.ones_like(value)), first)
    print(f"loss {value:.4f}, gradient of w {first[0].tolist()}")


@fnn.custom_vjp
def my_relu(x):
    return x.clamp(min=0)


my_relu.defvjp(
    lambda x: (x.clamp(min=0), x),  # the output, and what the backward pass needs: save_for_backward
    lambda x, g: (torch.where(x < 0, 0, g),),  # the gradient of each input
)


def a_function_with_its_own_backward() -> None:
    """In the note: `class MyReLU(torch.autograd.Function)`. Here: `fnn.custom_vjp`, good under every transform."""
    w, b = torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0]])
    X, Y = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), torch.tensor([[2.0, 3.0]])

    def loss(w, b):
        Y_hat = my_relu(X @ w.t() + b)
        return torch.mean(torch.pow(Y_hat - Y, 2))

    gradient = fnn.grad(loss, argnums=(0, 1))
    for name, f in {"eager": gradient, "compiled": torch.compile(gradient, fullgraph=True)}.items():
        w_grad, b_grad = f(w, b)
        print(f"{name}: w.grad {w_grad.tolist()}, b.grad {b_grad.tolist()}")
        assert w_grad.tolist() == [[4.5, 4.5]]
        assert b_grad.tolist() == [[4.5]]
    x = torch.tensor([-1.0, 2.0])
    assert fnn.vmap(fnn.grad(my_relu))(x).tolist() == [0.0, 1.0]
    assert fnn.jacobian(my_relu)(x).tolist() == [[0.0, 0.0], [0.0, 1.0]]


def gradients_of_what_lies_between() -> None:
    """In the note: `retain_grad` and `register_hook` for what is no leaf. Here: name it, `fnn.tap(value, name)`."""

    def f(x):
        y1 = fnn.tap(x + 1, "y1")
        y2 = fnn.tap(2 * x, "y2")
        return fnn.tap((y1 - y2) ** 2, "loss")

    x = torch.tensor(3.0)
    values, grads = fnn.tap_grads(f)(x)
    print(f"values {values}\ngradients {grads}, of x {fnn.grad(f)(x)}")
    assert {name: value.item() for name, value in values.items()} == {"y1": 4.0, "y2": 6.0, "loss": 4.0}
    assert {name: grad.item() for name, grad in grads.items()} == {"y1": -4.0, "y2": 4.0, "loss": 1.0}
    assert fnn.grad(f)(x) == 4  # what y1 and y2 hand on, added up: nothing to zero by hand, for nothing is kept


def graph_in_tensorboard(out: Path) -> None:
    """In the note: `writer.add_graph(net)`. Here the graph is that of the whole step, by layer."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    net = nn.Block(lambda m, x: m.linear(x), linear=nn.Linear(1))
    x = random.uniform(random.key(0), (10, 2))
    params, _ = net.init(random.key(1), x)
    optimizer = optim.sgd(0.1)
    folder = out / "graph_tensorboard"
    train.fit(
        train.make_step(lambda p, s, batch, key: (net(p, batch).square().mean(), (s, {})), optimizer, compile=False),
        train.TrainState.create(params, optimizer, random.key(2)),
        data.Loader(x, 10),
        epochs=1,
        callbacks=[train.TensorBoard(folder, graph=True)],
    )
    events = EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["graph"]
    names = {node.name for node in events.Graph().node}
    print(f"the graph has {len(names)} nodes")
    assert {"train_state/params/linear/weight", "train_state/params/linear/bias"} <= names
    assert any(name.startswith("Block/linear/") for name in names)


# ---- 5.1 The low level: tensors


def creation() -> None:
    """torch's own, with the numbers that the note printed from `torch.manual_seed(0)`; here one would pass a key."""
    assert torch.tensor([1, 2, 3], dtype=torch.float).tolist() == [1.0, 2.0, 3.0]
    assert torch.arange(1, 10, step=2).tolist() == [1, 3, 5, 7, 9]
    expected = [0.0, 0.6978, 1.3956, 2.0933, 2.7911, 3.4889, 4.1867, 4.8844, 5.5822, 6.28]
    torch.testing.assert_close(torch.linspace(0.0, 2 * 3.14, 10), torch.tensor(expected), atol=1e-4, rtol=0.0)
    ones = torch.ones((3, 3), dtype=torch.int)
    assert torch.full_like(ones, 5, dtype=torch.float).tolist() == [[5.0] * 3] * 3  # zeros_like, then fill_
    generator = torch.Generator().manual_seed(0)
    expected = [4.9626, 7.6822, 0.8848, 1.3203, 3.0742]
    drawn = 10 * torch.rand(5, generator=generator)
    torch.testing.assert_close(drawn, torch.tensor(expected), atol=1e-4, rtol=0.0)
    assert torch.equal(torch.diag(torch.ones(3)), torch.eye(3, 3))
    # By keys: a uniform number in [0, 10), one of mean 2 and deviation 5, an order of 20.
    keys = random.split(random.key(0), 3)
    assert random.uniform(keys[0], (5,), minval=0.0, maxval=10.0).max() < 10
    assert abs((2 + 5 * random.normal(keys[1], (10_000,))).std() - 5) < 0.2
    assert sorted(random.permutation(keys[2], 20).tolist()) == list(range(20))


def slicing() -> None:
    """The note's table of 25 numbers, and the scores of 4 classes, 5 students and 7 subjects."""
    t = torch.floor(10 * torch.rand([5, 5], generator=torch.Generator().manual_seed(0))).int()
    assert t[0].tolist() == [4, 7, 0, 1, 3]
    assert t[1, 3] == t[1][3] == 4
    assert t[1:4, :4:2].tolist() == [[6, 8], [3, 0], [5, 8]]
    # In the note: x.data[1, :] = ... Here a new tensor, and the old one stays.
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.index_fill(x, 0, torch.tensor([1]), 0.0).tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert x.tolist() == [[1.0, 2.0], [3.0, 4.0]]

    scores = random.randint(random.key(0), (4, 5, 7), 0, 100)
    students, subjects = torch.tensor([0, 2, 4]), torch.tensor([1, 3, 6])
    q = scores.index_select(1, students).index_select(2, subjects)
    assert torch.equal(q, scores[:, students][:, :, subjects])
    places = torch.tensor([0, 2 * 5 * 7 + 3 * 7 + 1, 3 * 5 * 7 + 4 * 7 + 6])
    assert torch.take(scores, places).tolist() == [scores[0, 0, 0], scores[2, 3, 1], scores[3, 4, 6]]
    assert torch.masked_select(scores, scores >= 80).min() >= 80
    passed = fnn.vmap(lambda one: torch.where(one > 60, 1, 0))(scores)  # for one class, and so for all
    assert torch.equal(passed, (scores > 60).long())
    assert torch.index_fill(scores, 1, students, 100)[:, students].min() == 100
    assert torch.masked_fill(scores, scores < 60, 60).min() == 60


def dimensions() -> None:
    """reshape, squeeze, transpose, cat, stack and split, with the note's results."""
    a = torch.arange(18).reshape(1, 3, 3, 2)
    assert torch.equal(a.view(3, 6).reshape(1, 3, 3, 2), a)
    assert torch.squeeze(torch.tensor([[1.0, 2.0]])).tolist() == [1.0, 2.0]
    assert torch.unsqueeze(torch.tensor([1.0, 2.0]), 0).shape == (1, 2)
    images = torch.zeros(2, 8, 6, 4)  # batch, height, width, channel
    assert images.permute(0, 3, 1, 2).shape == (2, 4, 8, 6)
    assert fnn.vmap(lambda image: image.permute(2, 0, 1))(images).shape == (2, 4, 8, 6)
    assert torch.tensor([[1, 2, 3], [4, 5, 6]]).t().tolist() == [[1, 4], [2, 5], [3, 6]]

    a, b, c = torch.arange(1.0, 13.0).reshape(3, 2, 2)
    abc = torch.cat([a, b, c], dim=0)
    assert abc.shape == (6, 2)
    assert torch.stack([a, b, c], dim=0).shape == (3, 2, 2)
    assert torch.cat([a, b, c], dim=1).tolist() == [[1, 2, 5, 6, 9, 10], [3, 4, 7, 8, 11, 12]]
    assert torch.stack([a, b, c], dim=1)[0].tolist() == [[1, 2], [5, 6], [9, 10]]
    assert all(torch.equal(x, y) for x, y in zip(torch.split(abc, 2), (a, b, c), strict=True))
    assert [len(part) for part in torch.split(abc, [4, 1, 1])] == [4, 1, 1]


def scalar_vector_and_matrix_operations() -> None:
    """The values that the note printed; the functions are torch's, and work under `vmap` and `grad`."""
    a, b = torch.tensor([[1.0, 2.0], [-3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    assert (a + b).tolist() == [[6.0, 8.0], [4.0, 12.0]]
    assert (a % 3).tolist() == [[1.0, 2.0], [0.0, 1.0]]
    assert torch.div(a, b, rounding_mode="floor").tolist() == [[0.0, 0.0], [-1.0, 0.0]]
    assert ((a >= 2) & (a <= 3)).tolist() == [[False, True], [False, False]]
    assert torch.sqrt(a).isnan().tolist() == [[False, False], [True, False]]
    x = torch.tensor([2.6, -2.7])
    rounded = [f(x).tolist() for f in (torch.round, torch.floor, torch.ceil, torch.trunc)]
    assert rounded == [[3.0, -3.0], [2.0, -3.0], [3.0, -2.0], [2.0, -2.0]]
    torch.testing.assert_close(torch.fmod(x, 2), torch.tensor([0.6, -0.7]))
    torch.testing.assert_close(torch.remainder(x, 2), torch.tensor([0.6, 1.3]))
    x = torch.tensor([0.9, -0.8, 100.0, -20.0, 0.7])
    torch.testing.assert_close(x.clamp(-1, 1), torch.tensor([0.9, -0.8, 1.0, -1.0, 0.7]))

    a = torch.arange(1.0, 10.0).view(3, 3)
    statistics = torch.stack([a.sum(), a.mean(), a.prod(), a.std(), a.var(), a.median()])
    expected = torch.tensor([45.0, 5.0, 362880.0, 2.7386, 7.5, 5.0])
    torch.testing.assert_close(statistics, expected, atol=1e-4, rtol=0.0)
    n = torch.arange(1, 10)
    assert torch.cumsum(n, 0).tolist() == [1, 3, 6, 10, 15, 21, 28, 36, 45]
    assert torch.cumprod(n, 0).tolist() == [1, 2, 6, 24, 120, 720, 5040, 40320, 362880]
    assert torch.cummax(n, 0).indices.tolist() == list(range(9))
    s = torch.tensor([[9.0, 7.0, 8.0], [1.0, 3.0, 2.0], [5.0, 6.0, 4.0]])
    assert fnn.vmap(lambda row: row.topk(2).values)(s).tolist() == [[9.0, 8.0], [3.0, 2.0], [6.0, 5.0]]
    assert fnn.vmap(lambda row: row.sort().indices)(s).tolist() == [[1, 2, 0], [0, 2, 1], [2, 0, 1]]

    m = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert ops.matmul(m, 2 * torch.eye(2)).tolist() == [[2.0, 4.0], [6.0, 8.0]]
    assert fnn.vmap(ops.matmul)(torch.ones(5, 5, 6), torch.ones(5, 6, 4)).shape == (5, 5, 4)
    torch.testing.assert_close(torch.inverse(m), torch.tensor([[-2.0, 1.0], [1.5, -0.5]]))
    assert torch.trace(m) == 5
    torch.testing.assert_close(torch.linalg.norm(m), torch.tensor(5.4772), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(torch.det(m), torch.tensor(-2.0))
    torch.testing.assert_close(fnn.grad(torch.det)(m), torch.det(m) * torch.inverse(m).mT)  # Jacobi's formula
    eigenvalues = torch.linalg.eig(torch.tensor([[1.0, 2.0], [-5.0, 4.0]])).eigenvalues
    expected = torch.tensor([2.5 + 2.7839j, 2.5 - 2.7839j])
    torch.testing.assert_close(eigenvalues, expected, atol=1e-4, rtol=0.0)
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    u, s, vh = torch.linalg.svd(a)
    torch.testing.assert_close(s, torch.tensor([9.5255, 0.5143]), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(u @ F.pad(torch.diag(s), (0, 0, 0, 1)) @ vh, a)
    torch.testing.assert_close(fnn.vmap(torch.linalg.svdvals)(torch.stack([a, 2 * a])), torch.stack([s, 2 * s]))


def einsum() -> None:
    """The eight forms, a bilinear layer, and attention by scaled dot products."""
    keys = iter(random.split(random.key(0), 16).unbind())

    def draw(*shape):
        return random.normal(next(keys), shape)

    A, B, V, W = draw(5, 4), draw(4, 6), draw(10), draw(5)
    square, three, other = draw(5, 5), draw(3, 4, 5), draw(4, 3, 6)
    pairs = {
        "transpose": (torch.einsum("ijk->ikj", three), three.permute(0, 2, 1)),
        "diagonal": (torch.einsum("ii->i", square), square.diagonal()),
        "sum": (torch.einsum("ij->i", A), A.sum(1)),
        "Hadamard product": (torch.einsum("ij,ij->ij", square, square), square * square),
        "inner product": (torch.einsum("i,i->", V, V), V @ V),
        "outer product": (torch.einsum("i,j->ij", V, W), torch.outer(V, W)),
        "matrix product": (torch.einsum("ik,kj->ij", A, B), ops.matmul(A, B)),
        "contraction": (torch.einsum("ijk,jih->kh", three, other), torch.tensordot(three, other, ([0, 1], [1, 0]))),
    }
    for name, (by_einsum, plain) in pairs.items():
        torch.testing.assert_close(by_einsum, plain, msg=name)

    Q, K = draw(8, 10), draw(8, 10)
    bilinear = nn.Bilinear(5)
    params, _ = bilinear.init(next(keys), Q, K)
    by_einsum = torch.einsum("bq,oqk,bk->bo", Q, params["weight"], K) + params["bias"]
    assert by_einsum.shape == (8, 5)
    torch.testing.assert_close(bilinear(params, Q, K), by_einsum)
    one = fnn.vmap(lambda q, k: torch.stack([q @ w @ k for w in params["weight"]]) + params["bias"])  # without a batch
    torch.testing.assert_close(one(Q, K), by_einsum)

    K = draw(8, 6, 10)
    weights = torch.softmax(torch.einsum("in,ijn->ij", Q, K) / K.shape[-1], -1)
    ours = fnn.vmap(lambda q, k: ops.softmax(ops.matmul(k, q[:, None])[:, 0] / k.shape[-1]))(Q, K)
    torch.testing.assert_close(ours, weights)

    # The whole of it, with projections and two heads, is a layer; torch's own, with its weights by name, agrees.
    x = draw(8, 6, 10)
    attention, torch_attention = nn.MultiHeadAttention(2), torch.nn.MultiheadAttention(10, 2, batch_first=True)
    params, _ = attention.init(next(keys), x)
    torch_attention.load_state_dict(tree.paths(params))
    torch.testing.assert_close(attention(params, x), torch_attention(x, x, x)[0].detach())
    print(f"{len(pairs)} forms of einsum, {bilinear} and {attention} agree")


def broadcasting() -> None:
    """torch's rules; for one row at a time, `vmap` says which axis is meant."""
    a, b = torch.tensor([1, 2, 3]), torch.tensor([[0, 0, 0], [1, 1, 1], [2, 2, 2]])
    expected = [[1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert (b + a).tolist() == expected
    assert torch.cat([a[None]] * 3).add(b).tolist() == expected
    assert [x.tolist() for x in torch.broadcast_tensors(a, b)] == [[[1, 2, 3]] * 3, b.tolist()]
    assert fnn.vmap(torch.add, in_dims=(None, 0))(a, b).tolist() == expected


# ---- 5.1 Parameters and modules


def parameters() -> None:
    """In the note: Parameter, ParameterList, ParameterDict. Here: dicts and lists, with the same names."""
    keys = random.split(random.key(0), 5).unbind()
    params = {
        "w": random.normal(keys[0], (2, 2)),
        "params_list": [random.uniform(keys[i], (8, i)) for i in (1, 2)],
        "params_dict": {"a": random.uniform(keys[3], (2, 2)), "b": torch.zeros(2)},
    }
    shapes = {path: tuple(leaf.shape) for path, leaf in tree.paths(params).items()}
    print(f"number of parameters = {len(shapes)}: {shapes}")
    assert shapes == {
        "w": (2, 2),
        "params_list.0": (8, 1),
        "params_list.1": (8, 2),
        "params_dict.a": (2, 2),
        "params_dict.b": (2,),
    }
    module = torch.nn.Module()  # as the note has it
    module.w = torch.nn.Parameter(torch.randn(2, 2))
    module.params_list = torch.nn.ParameterList([torch.rand(8, i) for i in (1, 2)])
    module.params_dict = torch.nn.ParameterDict({"a": torch.rand(2, 2), "b": torch.zeros(2)})
    assert shapes == {name: tuple(leaf.shape) for name, leaf in module.named_parameters()}
    # All of them have gradients, for they are an argument.
    gradient = fnn.grad(lambda params: sum(leaf.sum() for leaf in tree.leaves(params)))(params)
    assert all(torch.equal(leaf, torch.ones_like(leaf)) for leaf in tree.leaves(gradient))


NET = nn.Block(
    lambda m, x: m.dense(m.conv(m.embedding(x).transpose(1, 2))),
    embedding=nn.Embedding(10_000, 3, padding_idx=1),
    conv=nn.Sequential(
        {
            "conv_1": nn.Conv1d(16, 5),
            "pool_1": nn.MaxPool1d(2),
            "relu_1": nn.relu,
            "conv_2": nn.Conv1d(128, 2),
            "pool_2": nn.MaxPool1d(2),
            "relu_2": nn.relu,
        }
    ),
    dense=nn.Sequential({"flatten": nn.Flatten(), "linear": nn.Linear(1)}),
)

TABLE = """\
--------------------------------------------------------------------------
Layer (type)                            Output Shape              Param #
==========================================================================
Embedding-1                             [-1, 200, 3]               30,000
Conv1d-2                               [-1, 16, 196]                  256
MaxPool1d-3                             [-1, 16, 98]                    0
ReLU-4                                  [-1, 16, 98]                    0
Conv1d-5                               [-1, 128, 97]                4,224
MaxPool1d-6                            [-1, 128, 48]                    0
ReLU-7                                 [-1, 128, 48]                    0
Flatten-8                                 [-1, 6144]                    0
Linear-9                                     [-1, 1]                6,145
==========================================================================
Total params: 40,625
Trainable params: 10,625
Non-trainable params: 30,000
--------------------------------------------------------------------------
Input size (MB): 0.000763
Forward/backward pass size (MB): 0.287788
Params size (MB): 0.154972
Estimated Total Size (MB): 0.443523
--------------------------------------------------------------------------"""


def modules_and_summary() -> None:
    """In the note: children, named_children, modules, and torchkeras's summary with the embedding frozen."""
    print(NET)
    assert [name for name, _ in NET.children] == ["embedding", "conv", "dense"]
    assert [name for name, _ in dict(NET.children)["conv"].children][:2] == ["conv_1", "pool_1"]

    def modules(layer):
        return [layer, *[inner for _, child in getattr(layer, "children", ()) for inner in modules(child)]]

    assert len(modules(NET)) == 12
    ids = torch.zeros(1, 200, dtype=torch.int64)
    params, _ = NET.init(random.key(0), ids)
    assert list(tree.paths(params)) == [
        "embedding.weight", "conv.conv_1.weight", "conv.conv_1.bias", "conv.conv_2.weight", "conv.conv_2.bias",
        "dense.linear.weight", "dense.linear.bias",
    ]  # fmt: skip
    summary = fnn.summary(NET, ids, frozen="embedding.*")
    print(summary)
    assert str(summary) == TABLE


def freezing_the_embedding() -> None:
    """In the note: `embedding.requires_grad_(False)`. Here: `optim.freeze`; not even weight decay moves it."""
    ids = random.randint(random.key(0), (4, 200), 0, 10_000).long()
    params, _ = NET.init(random.key(1), ids)
    trainable, frozen = tree.partition(params, lambda path, leaf: not path.startswith("embedding."))
    assert (tree.size(trainable), tree.size(frozen)) == (10_625, 30_000)

    def loss_fn(params, state, batch, key):
        return losses.mse(NET(params, batch), torch.ones(4, 1)), (state, {})

    optimizer = optim.freeze(optim.adamw(1e-2, weight_decay=0.1), "embedding.*")
    step = train.make_step(loss_fn, optimizer, compile=False)
    train_state = train.TrainState.create(params, optimizer, random.key(2))
    for _ in range(3):
        train_state, metrics = step(train_state, ids)
    assert torch.equal(train_state.params["embedding"]["weight"], params["embedding"]["weight"])
    assert not torch.equal(train_state.params["dense"]["linear"]["weight"], params["dense"]["linear"]["weight"])
    print(f"loss {metrics['loss']:.4f}, the embedding as it was")


# ---- 5.2 The middle level: data


class Squares(torch.utils.data.Dataset):
    """A data set is a length and a function from an index to an example."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index**2


def dataset_and_workers() -> None:
    """`DataLoader`'s worker processes read ahead; the order is the key's, whatever their number."""
    alone, helped = (data.Loader(Squares(), 5, key=random.key(0), workers=workers) for workers in (0, 2))
    orders = [[y.tolist() for _, y in loader.epoch(3)] for loader in (alone, helped)]
    print(f"batches of epoch 3, by two processes: {orders[1][:2]} ...")
    assert orders[0] == orders[1]
    assert len(orders[0]) == 4
    x, y = next(iter(alone))
    assert torch.equal(x[:, 0] ** 2, y.float())


def main(out: Path = Path("out/notes")) -> None:
    out.mkdir(parents=True, exist_ok=True)
    graph_that_is_not_kept()
    a_function_with_its_own_backward()
    gradients_of_what_lies_between()
    graph_in_tensorboard(out)
    creation()
    slicing()
    dimensions()
    scalar_vector_and_matrix_operations()
    einsum()
    broadcasting()
    parameters()
    modules_and_summary()
    freezing_the_embedding()
    dataset_and_workers()


if __name__ == "__main__" and fnn.distributed.is_main():  # the first of torchrun's processes does it all
    tyro.cli(main, description=__doc__)
