"""Record derivatives of four small networks in float64, for tests/test_derivative_models.py.

Written with jax.grad, jacrev, hessian and plain sums only. Run by `make golden` in the environment of the peers; writes
derivatives.npz beside itself. A long last axis is recorded as its product with `probe`, a random matrix, from which no
wrong entry can hide; everything has a leading axis of parameter sets.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import models
import numpy as np

jax.config.update("jax_enable_x64", True)

LONGEST = 40  # of a last axis that is recorded whole, where the array has several axes


def linear(p, name, x):
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def conv(p, name, x, stride=1, padding=0):
    y = jax.lax.conv_general_dilated(x[None], p[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2)[0]
    return y + p[f"{name}.bias"][:, None, None] if f"{name}.bias" in p else y


def max_pool(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2), (1, 2, 2), "VALID")


def batch_norm(p, s, name, x):
    scale = p[f"{name}.weight"] / jnp.sqrt(s[f"{name}.running_var"] + 1e-5)
    return (x - s[f"{name}.running_mean"][:, None, None]) * scale[:, None, None] + p[f"{name}.bias"][:, None, None]


def layer_norm(p, name, x):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x):
    return x * jax.scipy.stats.norm.cdf(x)


def mlp(p, s, x):
    return linear(p, "4", jnp.tanh(linear(p, "2", jnp.tanh(linear(p, "0", x)))))


def lenet(p, s, x):
    x = jnp.maximum(max_pool(conv(p, "conv1", x)), 0)
    x = jax.nn.sigmoid(max_pool(conv(p, "conv2", x)))
    return linear(p, "fc2", jnp.tanh(linear(p, "fc1", x.reshape(-1))))


def resnet(p, s, x):
    def block(name, x, stride):
        y = gelu(batch_norm(p, s, f"{name}.norm1", conv(p, f"{name}.conv1", x, stride, 1)))
        y = batch_norm(p, s, f"{name}.norm2", conv(p, f"{name}.conv2", y, 1, 1))
        return gelu(y + (conv(p, f"{name}.down", x, stride) if f"{name}.down.weight" in p else x))

    x = gelu(batch_norm(p, s, "norm", conv(p, "stem", x, 1, 1)))
    return linear(p, "head", block("block2", block("block1", x, 1), 2).mean((1, 2)))


def attention(p, s, x):
    def block(name, x):
        q, k, v = jnp.moveaxis(linear(p, f"{name}.qkv", layer_norm(p, f"{name}.norm1", x)).reshape(3, 3, 2, 2), 1, 0)
        scores = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k) / jnp.sqrt(2.0), -1)
        x = x + linear(p, f"{name}.proj", jnp.einsum("hts,shd->thd", scores, v).reshape(3, 4))
        return x + linear(p, f"{name}.down", gelu(linear(p, f"{name}.up", layer_norm(p, f"{name}.norm2", x))))

    return linear(p, "head", block("block2", block("block1", x)).mean(0))


def derivatives(name, f, params, given):
    """Every derivative object of one parameter set. f(vector, x) -> (classes,) for one example x."""
    x, x2, labels, v, u, w = (jnp.asarray(given[key]) for key in ("x", "x2", "labels", "v", "u", "w"))
    batch, inputs = len(x), x[0].size

    def logits(p, xs):
        return jax.vmap(f, (None, 0))(p, xs)

    def loss_of(output, label):
        return jax.scipy.special.logsumexp(output) - output[label]

    def loss(p, one, label):
        return loss_of(f(p, one), label)

    def mean_loss(p):
        return jax.vmap(loss, (None, 0, 0))(p, x, labels).mean()

    def first(one):
        return f(params, one.reshape(x[0].shape))[0]

    def laplacian(g):
        return lambda one: jnp.trace(jax.hessian(g)(one))

    flat = x.reshape(batch, inputs)
    found = {"logits": logits(params, x), "loss": mean_loss(params), "grad": jax.grad(mean_loss)(params)}
    found["jvp"] = jax.jvp(logits, (params, x), (v, u))[1]
    found["vjp_params"], found["vjp_x"] = jax.vjp(logits, params, x)[1](w)
    jacobian = jax.jacrev(logits)(params, x)
    found["jacobian_params"] = jacobian
    found["jacobian_x"] = jax.vmap(jax.jacrev(f, 1), (None, 0))(params, x).reshape(batch, -1, inputs)
    hessian = jax.hessian(mean_loss)(params)
    found |= {"hessian": hessian, "hvp": hessian @ v, "diagonal": jnp.diag(hessian), "trace": jnp.trace(hessian)}
    found["eigenvalues"] = jnp.linalg.eigvalsh(hessian)[-3:]
    output_hessian = jax.vmap(jax.hessian(loss_of))(logits(params, x), labels)
    ggn = jnp.einsum("bip,bij,bjq->pq", jacobian, output_hessian, jacobian) / batch
    found |= {"ggn": ggn, "gnvp": ggn @ v}
    grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, labels)
    norms = jnp.linalg.norm(grads, axis=1)
    found |= {"per_sample_grad": grads, "per_sample_grad_norm": norms}
    found["clipped_grad"] = (grads * jnp.minimum(1, given["bound"] / norms)[:, None]).sum(0)
    found["empirical_fisher"] = grads.T @ grads / batch
    found["ntk"] = jnp.einsum("aip,bjp->abij", jacobian, jax.jacrev(logits)(params, x2))
    # The Fisher matrix as an expectation over the model's own labels, not as the GGN that it equals.
    scores = jax.vmap(jax.vmap(jax.grad(loss), (None, None, 0)), (None, 0, None))(params, x, jnp.arange(models.CLASSES))
    found["fisher"] = jnp.einsum("bc,bcp,bcq->pq", jax.nn.softmax(logits(params, x)), scores, scores) / batch
    hessian_x = jax.vmap(jax.hessian(first))(flat)
    found |= {"hessian_x": hessian_x, "laplacian": jnp.trace(hessian_x, axis1=1, axis2=2)}
    found["diagonal_x"] = jnp.diagonal(hessian_x, axis1=1, axis2=2)
    found["divergence"] = jax.vmap(lambda one: jnp.trace(jax.jacrev(lambda z: z * first(z))(one)))(flat)
    if name == "mlp":
        found["bilaplacian"] = jax.vmap(laplacian(laplacian(first)))(flat)
    return found


def main():
    networks = {"mlp": mlp, "lenet": lenet, "resnet": resnet, "attention": attention}
    probe = np.random.default_rng(9).normal(size=(max(map(models.size, networks)), 2))
    recorded = {"probe": probe, "jax_version": np.array(jax.__version__)}
    for name, network in networks.items():
        given = models.arrays(name)
        state = models.by_path(models.STATE.get(name, {}), jnp.asarray(given["state"].reshape(-1)))

        def f(vector, x, name=name, network=network, state=state):
            return network(models.by_path(models.PARAMS[name], vector), state, x)

        of_params = jax.jit(lambda params, name=name, f=f, given=given: derivatives(name, f, params, given))
        members = [of_params(jnp.asarray(params)) for params in given["params"]]
        recorded |= {f"{name}/given/{key}": value for key, value in given.items()}
        for key in members[0]:
            value = np.stack([np.asarray(member[key]) for member in members])
            if value.ndim > 2 and value.shape[-1] > LONGEST:
                value = value @ probe[: value.shape[-1]]
            recorded[f"{name}/{key}"] = value
    np.savez_compressed(Path(__file__).with_name("derivatives.npz"), **recorded)


if __name__ == "__main__":
    main()
