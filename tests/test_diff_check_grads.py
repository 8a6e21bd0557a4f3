"""check_grads passes what is right and names what is wrong."""

import pytest
import torch

import fnn
from fnn import check_grads, diff

POINT = torch.tensor([0.3, -0.8, 1.4])


class Sine(torch.autograd.Function):
    """The sine, with rules that tests replace by wrong ones."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, t):
        return t * ctx.saved_tensors[0].cos()


class WrongReverse(Sine):
    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos() * (1 + 1e-4)


class WrongForward(Sine):
    @staticmethod
    def jvp(ctx, t):
        return -t * ctx.saved_tensors[0].cos()


class WrongSecond(Sine):
    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos().detach()


class NotANumber(Sine):
    @staticmethod
    def backward(ctx, g):
        return g * torch.nan


def through(function):
    return lambda p, k: {"out": function.apply(p["w"]) * k}


def test_right_derivatives_pass():
    params = {"w": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), "b": torch.ones(2)}

    def f(p, x, labels):
        return {"h": torch.tanh(x @ p["w"].T + p["b"]), "labels": labels}

    check_grads(f, (params, POINT, torch.arange(2)))
    check_grads(torch.exp, POINT, order=3)
    check_grads(lambda z: z**2 * z.conj(), torch.tensor([1 + 2j, 0.5 - 1j]))
    check_grads(lambda x: fnn.ops.linear(x, x.outer(x)), POINT)
    check_grads(through(Sine), ({"w": POINT}, 2), order=2, modes="rev")


@pytest.mark.parametrize(
    ("function", "modes", "words"),
    [
        (WrongReverse, ("fwd", "rev"), "order 1, mode rev: the derivative of output out .* to argument 0.w is .*error"),
        (WrongForward, ("fwd", "rev"), "order 1, mode fwd: the derivative of output out .* 3 of 3 numbers are wrong"),
        (WrongSecond, ("rev",), "order 2, mode rev over rev: the derivative of gradient for argument 0.w"),
        (WrongSecond, ("fwd", "rev"), "order 2"),
        (NotANumber, ("rev",), "is nan"),
    ],
)
def test_wrong_rules_are_found(function, modes, words):
    with pytest.raises(AssertionError, match=words):
        check_grads(through(function), ({"w": POINT}, 2), modes=modes)


def test_only_the_wrong_argument_is_named():
    with pytest.raises(AssertionError, match="respect to argument 1 is"):
        check_grads(lambda x, y: x.sin() + WrongForward.apply(y), (POINT, POINT), order=1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: check_grads(torch.sin, POINT, modes=("forward",)), "modes must be"),
        (lambda: check_grads(torch.sin, POINT, modes=()), "modes must be"),
        (lambda: check_grads(torch.sin, POINT, order=0), "order must be"),
        (lambda: check_grads(torch.sin, torch.arange(3)), "no argument is a floating-point tensor"),
    ],
)
def test_bad_options(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_every_transform_here_passes():
    check_grads(lambda x: diff.jacobian(torch.sin)(x), POINT, order=1)
    check_grads(lambda x: diff.hvp(lambda x: (x**4).sum(), x, x), POINT, order=1)
