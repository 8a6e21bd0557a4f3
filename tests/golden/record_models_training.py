"""Record the loss curves of an MLP and a small GPT trained with Flax and Optax, for tests/test_models_training.py.

Run by `make golden` in the environment of the peers; writes models_training.npz beside itself. Weights and data come
from a seed by `jax.random` and `jax.nn.initializers`. The keys are those that the containers of `fnn.nn` hand out:
child i of a container gets `fold_in(key, i)`, and a linear layer draws its weight with the first half of that key. Its
weights are (out, in), so JAX is told in_axis=1, out_axis=0, and Flax gets the transpose.
"""

from pathlib import Path

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.random import fold_in, split

STEPS = 50
EXAMPLES, FEATURES, HIDDEN, CLASSES, BATCH = 128, 8, (32, 16), 5, 32
VOCAB, CONTEXT, LAYERS, HEADS, WIDTH, SEQUENCES = 17, 16, 2, 4, 32, 8


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in HIDDEN:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(CLASSES)(x)


def mlp_params(key):
    start, params, arriving = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0), {}, FEATURES
    for index, width in enumerate((*HIDDEN, CLASSES)):
        # The children are flatten, linear, relu, linear, relu, linear.
        weight = start(split(fold_in(key, 2 * index + 1))[0], (width, arriving), jnp.float32)
        params[f"Dense_{index}"] = {"kernel": weight.T, "bias": jnp.zeros(width)}
        arriving = width
    return {"params": params}


def mlp_batches(key):
    """A linear teacher's classes, in batches drawn with replacement."""
    x = jax.random.normal(fold_in(key, 0), (EXAMPLES, FEATURES))
    labels = (x @ jax.random.normal(fold_in(key, 1), (FEATURES, CLASSES))).argmax(-1)
    for step in range(STEPS):
        rows = jax.random.randint(fold_in(key, 2 + step), (BATCH,), 0, EXAMPLES)
        yield x[rows], labels[rows]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        h = nn.LayerNorm(epsilon=1e-5, name="ln_1")(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attn")(h, h, mask=mask)
        h = nn.LayerNorm(epsilon=1e-5, name="ln_2")(x)
        h = nn.gelu(nn.Dense(4 * WIDTH, name="c_fc")(h), approximate=True)
        return x + nn.Dense(WIDTH, name="c_proj")(h)


class GPT(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        wte, wpe = nn.Embed(VOCAB, WIDTH, name="wte"), nn.Embed(CONTEXT, WIDTH, name="wpe")
        x = wte(tokens) + wpe(jnp.arange(tokens.shape[-1]))
        for index in range(LAYERS):
            x = Block(name=f"h_{index}")(x, nn.make_causal_mask(tokens))
        return wte.attend(nn.LayerNorm(epsilon=1e-5, name="ln_f")(x))


def gpt_params(key):
    normal, residual = jax.nn.initializers.normal(0.02), jax.nn.initializers.normal(0.02 * (2 * LAYERS) ** -0.5)

    def norm():
        return {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}

    def dense(start, key, arriving, leaving):
        return {"kernel": start(key, (arriving, leaving), jnp.float32), "bias": jnp.zeros(leaving)}

    def block(key):
        attention, mlp = fold_in(key, 1), fold_in(key, 3)
        merged = normal(fold_in(attention, 0), (WIDTH, 3 * WIDTH), jnp.float32)
        heads = (HEADS, WIDTH // HEADS)
        attn = {
            name: {"kernel": kernel.reshape(WIDTH, *heads), "bias": jnp.zeros(heads)}
            for name, kernel in zip(("query", "key", "value"), jnp.split(merged, 3, 1), strict=True)
        }
        out = dense(residual, fold_in(attention, 1), WIDTH, WIDTH)
        attn["out"] = {**out, "kernel": out["kernel"].reshape(*heads, WIDTH)}
        return {
            "ln_1": norm(),
            "attn": attn,
            "ln_2": norm(),
            "c_fc": dense(normal, fold_in(mlp, 0), WIDTH, 4 * WIDTH),
            "c_proj": dense(residual, fold_in(mlp, 2), 4 * WIDTH, WIDTH),
        }

    params = {
        "wte": {"embedding": normal(fold_in(key, 0), (VOCAB, WIDTH), jnp.float32)},
        "wpe": {"embedding": normal(fold_in(fold_in(key, 1), 0), (CONTEXT, WIDTH), jnp.float32)},
        **{f"h_{index}": block(fold_in(fold_in(key, 3), index)) for index in range(LAYERS)},
        "ln_f": norm(),
    }
    return {"params": params}


def gpt_batches(key):
    """Arithmetic sequences modulo the vocabulary: tokens and the ones that follow."""
    for step in range(STEPS):
        first = jax.random.randint(fold_in(key, 2 * step), (SEQUENCES, 1), 0, VOCAB)
        stride = jax.random.randint(fold_in(key, 2 * step + 1), (SEQUENCES, 1), 1, 4)
        tokens = (first + stride * jnp.arange(CONTEXT + 1)) % VOCAB
        yield tokens[:, :-1], tokens[:, 1:]


def gpt_optimizer():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, STEPS, 1e-3)
    decays = lambda params: jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key in ("kernel", "embedding"), params)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=decays))


def curve(model, params, optimizer, batches):
    """The loss of each step, before its update."""
    made = model.init(jax.random.PRNGKey(0), next(batches())[0])
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)

    @jax.jit
    def step(params, state, x, labels):
        def loss_fn(params):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for x, labels in batches():
        params, state, loss = step(params, state, x, labels)
        losses.append(loss)
    return np.asarray(losses)


def main():
    model_key, data_key = jax.random.PRNGKey(42), jax.random.PRNGKey(7)
    recorded = {
        "mlp": curve(MLP(), mlp_params(model_key), optax.sgd(0.1, momentum=0.9), lambda: mlp_batches(data_key)),
        "gpt": curve(GPT(), gpt_params(model_key), gpt_optimizer(), lambda: gpt_batches(data_key)),
        "versions": np.array([jax.__version__, flax.__version__, optax.__version__]),
    }
    print({name: losses[[0, 10, -1]] for name, losses in recorded.items() if name != "versions"})
    np.savez_compressed(Path(__file__).with_name("models_training.npz"), **recorded)


if __name__ == "__main__":
    main()
