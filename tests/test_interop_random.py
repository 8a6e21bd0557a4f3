"""What a converted module draws follows the key, by torch's distribution, or is refused."""

import re

import pytest
import torch
import torch.nn.functional as F

from fnn import interop, random

KEY = random.key(3)


class Draws(torch.nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return self.draw(x)


DRAWS = {
    "dropout": (lambda x: F.dropout(x, 0.25), 1.0),
    "dropout1d": (lambda x: F.dropout1d(x[:, :, None].expand(-1, -1, 2), 0.25), 1.0),
    "alpha": (lambda x: F.alpha_dropout(x - 1, 0.25, True), 0.0),
    "rand": (lambda x: torch.rand(len(x), 4), 0.5),
    "rand_like": (lambda x: torch.rand_like(x), 0.5),
    "randn": (lambda x: torch.randn((len(x), 4), dtype=x.dtype) + 1, 1.0),
    "randn_like": (lambda x: torch.randn_like(x) + 1, 1.0),
    "randint": (lambda x: torch.randint(1, 4, (len(x), 4)).to(x.dtype), 2.0),
    "randint_like": (lambda x: torch.randint_like(x, 3), 1.0),
    "randperm": (lambda x: torch.randperm(len(x)) / (len(x) - 1), 0.5),
    "normal": (lambda x: torch.normal(x, 1.0), 1.0),
    "normal2": (lambda x: torch.normal(2.0, 1.0, (len(x), 4)), 2.0),
    "bernoulli": (lambda x: torch.bernoulli(x * 0.3), 0.3),
    "bernoulli_p": (lambda x: x.bernoulli(0.3), 0.3),
    "bernoulli_": (lambda x: x.new_empty(len(x), 4).bernoulli_(0.3), 0.3),
    "uniform_": (lambda x: torch.empty_like(x).uniform_(1, 2), 1.5),
    "normal_": (lambda x: torch.zeros(len(x), 4).normal_(1, 2), 1.0),
    "exponential_": (lambda x: torch.empty_like(x).exponential_(2), 0.5),
    "gumbel": (lambda x: F.gumbel_softmax(x, hard=True), 0.25),
    "rrelu": (lambda x: F.rrelu(-x, 0.2, 0.4, training=True), -0.3),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5, is_causal=True), 1.0),
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_draw_follows_the_key_and_its_distribution(name):
    draw, mean = DRAWS[name]
    net, params, state = interop.from_module(Draws(draw))
    x = torch.ones(2000, 4, dtype=torch.float32)
    before = torch.get_rng_state()
    y, again, other = (net.apply(params, state, x, key=key, train=True)[0] for key in (KEY, KEY, random.key(5)))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(y, again)
    assert not torch.equal(y, other)
    theirs = draw(x)
    assert (y.shape, y.dtype) == (theirs.shape, theirs.dtype)
    assert abs(float(y.double().mean()) - mean) < 0.1
    assert abs(float(y.double().std()) - float(theirs.double().std())) < 0.1


def test_draws_that_no_key_replaces_are_refused():
    for draw in (torch.poisson, lambda x: torch.multinomial(x, 1), lambda x: F.fractional_max_pool2d(x[None], 2, 1)):
        net, params, state = interop.from_module(Draws(draw))
        with pytest.raises(TypeError, match="draws from torch's global generator"):
            net.apply(params, state, torch.ones(3, 3), key=KEY, train=True)


def test_a_draw_that_no_rule_knows_is_found():
    net, params, state = interop.from_module(Draws(lambda x: torch.ops.aten.rand_like(x)))
    with pytest.raises(TypeError, match=r"rand_like.* draws from torch's global generator"):
        net.apply(params, state, torch.ones(3), key=KEY, train=True)


def test_draws_that_the_compiler_hides_are_refused(fast_compile):
    class Hidden(torch.nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    net, params, state = interop.from_module(torch.nn.Sequential(torch.nn.Linear(2, 2), Hidden()))
    with pytest.raises(Exception, match=r"submodule '1' \(Hidden\) calls torch.randn_like"):
        torch.compile(lambda x: net.apply(params, state, x, key=KEY)[0], fullgraph=True)(torch.ones(1, 2))


def draw_aten(x):
    return torch.ops.aten.rand_like.default(x)


def make_draw():
    draw = torch.randn_like
    return lambda x: draw(x)


@pytest.mark.parametrize(
    "draw",
    [draw_aten, lambda x: torch.ops.aten.bernoulli(x), lambda x: draw_aten(x) + 1, make_draw()],
    ids=["overload", "operator", "function", "closure"],
)
def test_hidden_draws_are_found_in_the_code(draw):
    assert re.search("calls torch.*which the compiler takes", interop.from_module(Draws(draw)).net.unseen)
    assert interop.from_module(Draws(lambda x: torch.ops.aten.relu(x))).net.unseen == ""
