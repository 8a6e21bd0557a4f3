"""The JAX side of `train_step.py`, run by the Python that has JAX: `python train_step_jax.py MODEL BATCH BF16 WEIGHTS`.

Flax modules and Optax's Adam, one jitted step with its state donated; images lie as Flax has them, channels last.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from train_step_cases import CLASSES, EPSILON, GPT, LEARNING_RATE, Side, batch, serve

DTYPE = jnp.bfloat16 if "bf16" in sys.argv else jnp.float32


def dense(width: int, name: str) -> nn.Dense:
    return nn.Dense(width, name=name, dtype=DTYPE)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(dense(512, "1")(x))
        x = nn.relu(dense(512, "3")(x))
        return dense(CLASSES, "5")(x)


class LeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name, channels in (("conv1", 6), ("conv2", 16)):
            x = nn.relu(nn.Conv(channels, (5, 5), padding="VALID", name=name, dtype=DTYPE)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(dense(120, "fc1")(x))
        x = nn.relu(dense(84, "fc2")(x))
        return dense(CLASSES, "fc3")(x)


class ResNet18(nn.Module):
    @nn.compact
    def __call__(self, x):
        def conv(x, channels, size, stride, name):
            padding = [(size // 2, size // 2)] * 2
            return nn.Conv(channels, (size, size), stride, padding, use_bias=False, name=name, dtype=DTYPE)(x)

        def norm(x, name):
            return nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, name=name, dtype=DTYPE)(x)

        x = nn.relu(norm(conv(x, 64, 7, 2, "conv1"), "bn1"))
        x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for stage in range(4):
            for block in range(2):
                path, channels = f"layer{stage + 1}.{block}", 64 * 2**stage
                stride = 2 if stage and not block else 1
                h = nn.relu(norm(conv(x, channels, 3, stride, f"{path}.conv1"), f"{path}.bn1"))
                h = norm(conv(h, channels, 3, 1, f"{path}.conv2"), f"{path}.bn2")
                if stride == 2:
                    x = norm(conv(x, channels, 1, 2, f"{path}.downsample.0"), f"{path}.downsample.1")
                x = nn.relu(h + x)
        return dense(CLASSES, "fc")(x.mean((1, 2)))


class FlaxGPT(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        def norm(x, name):
            return nn.LayerNorm(epsilon=1e-5, name=name, dtype=DTYPE)(x)

        sizes = GPT()
        table = nn.Embed(sizes.vocab_size, sizes.width, name="wte", dtype=DTYPE)
        positions = nn.Embed(sizes.context, sizes.width, name="wpe", dtype=DTYPE)
        x = table(tokens) + positions(jnp.arange(tokens.shape[1]))
        for index in range(sizes.layers):
            path = f"h.{index}"
            qkv = dense(3 * sizes.width, f"{path}.attn.c_attn")(norm(x, f"{path}.ln_1"))
            heads = [part.reshape(*x.shape[:2], sizes.heads, -1) for part in jnp.split(qkv, 3, -1)]
            y = jax.nn.dot_product_attention(*heads, is_causal=True).reshape(x.shape)
            x = x + dense(sizes.width, f"{path}.attn.c_proj")(y)
            h = nn.gelu(dense(4 * sizes.width, f"{path}.mlp.c_fc")(norm(x, f"{path}.ln_2")), approximate=True)
            x = x + dense(sizes.width, f"{path}.mlp.c_proj")(h)
        return table.attend(norm(x, "ln_f"))


MODELS = {"mlp": MLP, "lenet": LeNet, "resnet18": ResNet18, "gpt": FlaxGPT}


def from_torch(name: str, leaf: str, stored: dict[str, np.ndarray]) -> np.ndarray:
    """The value of a Flax leaf, from PyTorch's arrays: (out, in) to (in, out), (out, in, h, w) to (h, w, in, out)."""
    torch_names = {"bias": "bias", "mean": "running_mean", "var": "running_var"}
    value = stored[f"{name}.{torch_names.get(leaf, 'weight')}"]
    if leaf != "kernel" or ".c_" in name:  # GPT-2's are (in, out)
        return value
    if name == "fc1":  # of channels-last images
        value = value.reshape(-1, 16, 5, 5).transpose(0, 2, 3, 1).reshape(value.shape)
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def make(model: str, size: int, weights: str) -> Side:
    net, stored = MODELS[model](), dict(np.load(weights))
    x, y = batch(model, size)
    x = jnp.asarray(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x)
    y = jnp.asarray(y)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)

    def filled(collection):
        leaves = variables.get(collection, {})
        return {
            name: {leaf: jnp.asarray(from_torch(name, leaf, stored)) for leaf in of_name}
            for name, of_name in leaves.items()
        }

    optimizer = optax.adam(LEARNING_RATE, eps=EPSILON)
    params, statistics = filled("params"), filled("batch_stats")

    def loss_fn(params, statistics, x, y):
        logits, changed = net.apply({"params": params, "batch_stats": statistics}, x, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y)
        return losses.mean(), changed.get("batch_stats", statistics)

    def step(state, x, y):
        params, statistics, opt_state = state
        (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, statistics, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), statistics, opt_state), loss

    jitted = jax.jit(step, donate_argnums=0)
    current = {"state": (params, statistics, optimizer.init(params)), "loss": jnp.zeros(())}

    def one() -> None:
        current["state"], current["loss"] = jitted(current["state"], x, y)

    def finish() -> float:
        jax.block_until_ready(current)
        return float(current["loss"])

    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(current["state"]))
    device = jax.devices()[0]
    if device.platform == "cpu":
        return Side(one, finish, state_bytes)
    return Side(one, finish, state_bytes, lambda: device.memory_stats()["peak_bytes_in_use"] / 2**20)


if __name__ == "__main__":
    serve(make(sys.argv[1], int(sys.argv[2]), sys.argv[4]), jax.__version__)
