"""The networks of tests/golden/models.py written with fnn.nn, with their recorded parameters and data, in float64."""

from pathlib import Path

import numpy as np
import torch

import fnn
from fnn import nn, tree

GOLDEN = Path(__file__).parent / "golden"
DERIVATIVES = dict(np.load(GOLDEN / "derivatives.npz"))
CURVATURE = dict(np.load(GOLDEN / "curvature.npz"))
PROBE = torch.from_numpy(DERIVATIVES["probe"])
NAMES = ("mlp", "lenet", "resnet", "attention")


def _attend(m, x):
    q, k, v = m.qkv(m.norm1(x)).unflatten(-1, (3, 2, 2)).movedim(-3, 0).transpose(-2, -3)
    heads = fnn.ops.softmax(q @ k.mT / 2**0.5) @ v
    x = x + m.proj(heads.transpose(-2, -3).flatten(-2))
    return x + m.down(nn.gelu(m.up(m.norm2(x))))


def _transformer_block():
    return nn.Block(
        _attend,
        norm1=nn.LayerNorm(),
        qkv=nn.Linear(12, bias=False),
        proj=nn.Linear(4, bias=False),
        norm2=nn.LayerNorm(),
        up=nn.Linear(3),
        down=nn.Linear(4, bias=False),
    )


def _residual_block(stride):
    def f(m, x):
        y = m.norm2(m.conv2(nn.gelu(m.norm1(m.conv1(x)))))
        return nn.gelu(y + (m.down(x) if stride > 1 else x))

    layers = {
        "conv1": nn.Conv2d(2, 3, stride, 1, bias=False),
        "norm1": nn.BatchNorm(),
        "conv2": nn.Conv2d(2, 3, 1, 1, bias=False),
        "norm2": nn.BatchNorm(),
    }
    return nn.Block(f, **layers, **({"down": nn.Conv2d(2, 1, stride, bias=False)} if stride > 1 else {}))


NETS = {
    "mlp": nn.Sequential(nn.Linear(4), nn.tanh, nn.Linear(4), nn.tanh, nn.Linear(3)),
    "lenet": nn.Sequential(
        {
            "conv1": nn.Conv2d(2, 3),
            "pool1": nn.MaxPool2d(2),
            "relu": nn.relu,
            "conv2": nn.Conv2d(3, 2),
            "pool2": nn.MaxPool2d(2),
            "sigmoid": nn.sigmoid,
            "flatten": nn.Flatten(),
            "fc1": nn.Linear(4),
            "tanh": nn.tanh,
            "fc2": nn.Linear(3),
        }
    ),
    "resnet": nn.Block(
        lambda m, x: m.head(m.block2(m.block1(nn.gelu(m.norm(m.stem(x))))).mean((-1, -2))),
        stem=nn.Conv2d(2, 3, 1, 1, bias=False),
        norm=nn.BatchNorm(),
        block1=_residual_block(1),
        block2=_residual_block(2),
        head=nn.Linear(3),
    ),
    "attention": nn.Block(
        lambda m, x: m.head(m.block2(m.block1(x)).mean(-2)),
        block1=_transformer_block(),
        block2=_transformer_block(),
        head=nn.Linear(3),
    ),
}


class Model:
    """One network: `f(params, x)` and `loss(params, x, label)` of ONE example, and what they are evaluated at."""

    def __init__(self, name):
        self.name, self.net = name, NETS[name]
        given = {key: DERIVATIVES[f"{name}/given/{key}"] for key in ("x", "x2", "labels", "u", "w", "v", "params")}
        given = {key: torch.from_numpy(value) for key, value in given.items()}
        self.x, self.x2, self.labels, self.u, self.w = (given[key] for key in ("x", "x2", "labels", "u", "w"))
        self.bound = float(DERIVATIVES[f"{name}/given/bound"])
        params, state = self.net.init(fnn.random.key(0), self.x)
        self.state = self._filled(state, torch.from_numpy(DERIVATIVES[f"{name}/given/state"]).reshape(-1))
        self.members = [self._filled(params, vector) for vector in given["params"]]
        self.v = self._filled(params, given["v"])

    @staticmethod
    def _filled(like, vector):
        leaves, structure = tree.flatten(like)
        parts = vector.split([leaf.numel() for leaf in leaves])
        return tree.unflatten(structure, [p.reshape(x.shape).clone() for p, x in zip(parts, leaves, strict=True)])

    def f(self, params, x):
        return self.net(params, x[None], state=self.state)[0]

    def batched(self, params, x):
        return self.net(params, x, state=self.state)

    def loss(self, params, x, label):
        return fnn.losses.cross_entropy(self.f(params, x)[None], label[None])

    def loss_of_logits(self, logits):
        return fnn.losses.cross_entropy(logits, self.labels)

    def mean_loss(self, params):
        return self.loss_of_logits(self.batched(params, self.x))

    def first(self, params):
        """The first logit as a function of one flat input."""
        return lambda x: self.f(params, x.reshape(self.x.shape[1:]))[0]

    def field(self, params):
        """A vector field: a flat input times its first logit."""
        return lambda x: x * self.first(params)(x)

    @property
    def flat_x(self):
        return self.x.flatten(1)


def vector(values, lead=0):
    """The leaves of a tree side by side, behind `lead` axes that they have in common."""
    return torch.cat([leaf.flatten(lead) for leaf in tree.leaves(values)], dim=-1)


def check(got, expected, rtol=1e-10):
    """`got` is `expected`, which may be recorded as a product with PROBE; errors relative to the largest entry."""
    expected = torch.as_tensor(expected)
    if got.shape != expected.shape:
        got = got @ PROBE[: got.shape[-1]]
    assert got.shape == expected.shape, (got.shape, expected.shape)
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < rtol, f"relative error {error:.1e}"
