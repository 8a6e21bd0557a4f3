"""models.gpt: GPT-2's names, and its numbers from blocks of torch.nn."""

import pytest
import torch
import torch.nn.functional as F

from fnn import losses, models, optim, random, train, tree

KEY = random.key(0)
VOCAB, CONTEXT, LAYERS, HEADS, WIDTH = 13, 8, 2, 2, 6
NET = models.gpt(VOCAB, CONTEXT, LAYERS, HEADS, WIDTH)
TOKENS = torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))

BLOCK = {
    "ln_1.weight": ("norm1.weight", (6,)),
    "ln_1.bias": ("norm1.bias", (6,)),
    "attn.c_attn.weight": ("self_attn.in_proj_weight", (6, 18)),
    "attn.c_attn.bias": ("self_attn.in_proj_bias", (18,)),
    "attn.c_proj.weight": ("self_attn.out_proj.weight", (6, 6)),
    "attn.c_proj.bias": ("self_attn.out_proj.bias", (6,)),
    "ln_2.weight": ("norm2.weight", (6,)),
    "ln_2.bias": ("norm2.bias", (6,)),
    "mlp.c_fc.weight": ("linear1.weight", (6, 24)),
    "mlp.c_fc.bias": ("linear1.bias", (24,)),
    "mlp.c_proj.weight": ("linear2.weight", (24, 6)),
    "mlp.c_proj.bias": ("linear2.bias", (6,)),
}
"""Of each leaf of a GPT-2 block, in Hugging Face's order, torch's name and the shape."""


class Oracle(torch.nn.Module):
    """GPT-2 from torch's own transformer blocks, whose weights are (out, in)."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = torch.nn.Embedding(VOCAB, WIDTH), torch.nn.Embedding(CONTEXT, WIDTH)
        gelu = torch.nn.GELU(approximate="tanh")
        make = torch.nn.TransformerEncoderLayer
        self.h = torch.nn.ModuleList(
            [make(WIDTH, HEADS, 4 * WIDTH, 0.0, gelu, batch_first=True, norm_first=True) for _ in range(LAYERS)]
        )
        self.ln_f = torch.nn.LayerNorm(WIDTH)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
        for block in self.h:
            x = block(x, src_mask=mask, is_causal=True)
        return F.linear(self.ln_f(x), self.wte.weight)

    def load(self, params):
        """Take the weights of `models.gpt`; returns the torch parameter of each path, as it lies there."""
        named, mine = dict(self.named_parameters()), {}
        for path in tree.paths(params):
            root, _, rest = path.partition(".")
            if root == "h":
                index, _, rest = rest.partition(".")
                mine[path] = named[f"h.{index}.{BLOCK[rest][0]}"]
            else:
                mine[path] = named[path]
            transposed = ".attn." in path or ".mlp." in path
            mine[path] = mine[path], (lambda leaf: leaf.mT if leaf.dim() == 2 else leaf) if transposed else torch.clone
        with torch.no_grad():
            for path, leaf in tree.paths(params).items():
                parameter, layout = mine[path]
                parameter.copy_(layout(leaf))
        return mine


def test_names_and_shapes_are_gpt2s():
    params, state = NET.init(KEY, TOKENS)
    blocks = {f"h.{i}.{name}": shape for i in range(LAYERS) for name, (_, shape) in BLOCK.items()}
    expected = {"wte.weight": (13, 6), "wpe.weight": (8, 6), **blocks, "ln_f.weight": (6,), "ln_f.bias": (6,)}
    assert [(path, tuple(leaf.shape)) for path, leaf in tree.paths(params).items()] == list(expected.items())
    assert state == {}


@pytest.mark.slow
def test_small_gpt2_has_124_million_parameters_and_starts_as_it_does():
    params, _ = models.gpt().init(random.key(0, device="meta"), torch.zeros(1, 1, dtype=torch.long))
    assert tree.size(params) == 124_439_808
    params, _ = models.gpt(64, 16, 2, 2, 32).init(KEY, torch.zeros(1, 1, dtype=torch.long))
    for path, leaf in tree.paths(params).items():
        if leaf.dim() == 2:
            assert float(leaf.std()) == pytest.approx(0.01 if path.endswith("c_proj.weight") else 0.02, rel=0.12)
        else:
            assert torch.equal(leaf, torch.full_like(leaf, "ln_" in path and path.endswith("weight")))


@pytest.mark.parametrize("stacked", [False, True])
def test_forward_and_three_steps_equal_torchs(stacked):
    params = tree.map(lambda leaf: leaf.double() + 0.1 * torch.randn_like(leaf.double()), NET.init(KEY, TOKENS)[0])
    oracle = Oracle().double()
    mine = oracle.load(params)
    net = NET
    if stacked:
        net = models.gpt(VOCAB, CONTEXT, LAYERS, HEADS, WIDTH, stacked=True)
        blocks = tree.map(lambda *leaves: torch.stack(leaves), *params["h"].values())
        params = {**params, "h": {"*": blocks}}
    torch.testing.assert_close(net(params, TOKENS), oracle.eval()(TOKENS).detach(), rtol=1e-10, atol=1e-10)

    def loss_fn(params, state, batch, key):
        logits, state = net.apply(params, state, batch[:, :-1], key=key, train=True)
        return losses.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), (state, {})

    optimizer, theirs = optim.sgd(0.5, momentum=0.9), torch.optim.SGD(oracle.train().parameters(), 0.5, momentum=0.9)
    step = train.make_step(loss_fn, optimizer, compile=False)
    train_state = train.TrainState.create(params, optimizer, KEY)
    for _ in range(3):
        train_state, metrics = step(train_state, TOKENS)
        loss = F.cross_entropy(oracle(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-10, atol=1e-10)
    after = tree.paths(train_state.params)
    for path, (parameter, layout) in mine.items():
        leaf = after.get(path)
        if leaf is None:
            _, index, rest = path.split(".", 2)
            leaf = after[f"h.*.{rest}"][int(index)]
        torch.testing.assert_close(layout(leaf), parameter.detach(), rtol=1e-10, atol=1e-10)


def test_a_logit_sees_no_later_token():
    params, _ = NET.init(KEY, TOKENS)
    changed = TOKENS.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB
    before, after = NET(params, TOKENS), NET(params, changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_a_sequence_alone_and_vmap_over_keys():
    params, _ = NET.init(KEY, TOKENS)
    torch.testing.assert_close(NET(params, TOKENS[0]), NET(params, TOKENS)[0])
    net = models.gpt(VOCAB, CONTEXT, LAYERS, HEADS, WIDTH, dropout=0.5)
    with pytest.raises(ValueError, match="Dropout needs a key"):
        net.apply(params, {}, TOKENS, train=True)
    drawn = torch.vmap(lambda key: net.apply(params, {}, TOKENS, key=key, train=True)[0])(random.split(KEY, 3))
    single = net.apply(params, {}, TOKENS, key=random.split(KEY, 3)[1], train=True)[0]
    torch.testing.assert_close(drawn[1], single)
    assert not torch.allclose(drawn[0], drawn[1])
    torch.testing.assert_close(net(params, TOKENS), NET(params, TOKENS))


def test_forward_and_reverse_derivatives_agree():
    params = tree.map(torch.Tensor.double, NET.init(KEY, TOKENS)[0])
    tangent = tree.map(torch.randn_like, params)
    forward = lambda params: NET(params, TOKENS)
    logits, along = torch.func.jvp(forward, (params,), (tangent,))
    weights = torch.randn_like(logits)
    (gradient,) = torch.func.vjp(forward, params)[1](weights)
    products = tree.map(lambda g, t: (g * t).sum(), gradient, tangent)
    torch.testing.assert_close((along * weights).sum(), sum(tree.leaves(products)), rtol=1e-10, atol=1e-10)


def test_gpts_errors():
    params, _ = NET.init(KEY, TOKENS)
    with pytest.raises(ValueError, match=r"gpt: heads=4 must divide width=6"):
        models.gpt(VOCAB, CONTEXT, LAYERS, 4, WIDTH)
    with pytest.raises(ValueError, match=r"T at most context=8, got \(1, 9\)"):
        NET(params, torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(IndexError, match=r"'wte'.* ids must be in \[0, 13\)"):
        NET(params, torch.full((1, 2), VOCAB))
    with pytest.raises(TypeError, match="ids must be integers"):
        NET(params, torch.zeros(1, 2))
    other = models.gpt(VOCAB, CONTEXT, LAYERS, HEADS, 8).init(KEY, TOKENS)[0]
    with pytest.raises(ValueError, match="'wte'.* has shape"):
        NET(other, TOKENS)
