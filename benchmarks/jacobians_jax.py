"""The JAX side of `jacobians.py`, run by the Python that has JAX: `python jacobians_jax.py CASE [FORMULA]`.

Every sensible formula of a case is written as one writes it in JAX, and jitted; the fastest counts. XLA multiplies by
a matrix twice as fast as by a transposed one on some processors, so each formula runs with weights that lie as torch
has them, (out, in), and as Flax has them, (in, out). The sparse case is asdex's where it is installed.
"""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jacobian_cases import CASES, DIFFUSION, REACTION, inputs
from jacobian_child import serve
from jax import grad, jacfwd, jacrev, jvp, vjp, vmap
from jax.flatten_util import ravel_pytree


class Torch(NamedTuple):
    stored: jax.Array
    bias: jax.Array

    @property
    def weight(self):
        return self.stored


class Flax(NamedTuple):
    stored: jax.Array
    bias: jax.Array

    @property
    def weight(self):
        return self.stored.T


def net(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer.weight.T + layer.bias)
    return x @ params[-1].weight.T + params[-1].bias


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]


def mean_loss(params, x, y):
    return cross_entropy(net(params, x), y).mean()


def tapped(params, shifts, x):
    """The network with a shift added to each pre-activation, and the inputs of its layers."""
    taken = []
    for i, (layer, shift) in enumerate(zip(params, shifts, strict=True)):
        taken.append(x)
        x = x @ layer.weight.T + layer.bias + shift
        x = jnp.tanh(x) if i < len(params) - 1 else x
    return x, taken


def input_jacobians():
    def by_hand(params, x):
        w1, w2, w3 = (layer.weight for layer in params)
        h1 = jnp.tanh(x @ w1.T + params[0].bias)
        h2 = jnp.tanh(h1 @ w2.T + params[1].bias)
        rows = (w3 * (1 - h2 * h2)[:, None, :]) @ w2
        return (rows * (1 - h1 * h1)[:, None, :]) @ w1

    return {
        "vmap(jacrev)": lambda params, x: vmap(jacrev(net, 1), (None, 0))(params, x),
        "vmap(jacfwd)": lambda params, x: vmap(jacfwd(net, 1), (None, 0))(params, x),
        "by hand": by_hand,
    }


def parameter_jacobians():
    def by_hand(params, x):
        h = jnp.tanh(x @ params[0].weight.T + params[0].bias)
        back = params[1].weight * (1 - h * h)[:, None, :]
        eye = jnp.eye(back.shape[1])
        return [
            (back[..., None] * x[:, None, None, :], back),
            (eye[:, :, None] * h[:, None, None, :], jnp.broadcast_to(eye, (len(x), *eye.shape))),
        ]

    return {"vmap(jacrev)": lambda params, x: vmap(jacrev(net), (None, 0))(params, x), "by hand": by_hand}


def hessians():
    def flat(transform):
        def of(params, x, y):
            vector, unravel = ravel_pytree(params)
            return transform(lambda vector: mean_loss(unravel(vector), x, y))(vector)

        return of

    return {
        "jacfwd(jacrev)": flat(lambda f: jacfwd(jacrev(f))),
        "jacrev(jacrev)": flat(lambda f: jacrev(jacrev(f))),
    }


def hessian_vector_products():
    def forward(params, x, y, vector):
        return jvp(lambda p: grad(mean_loss)(p, x, y), (params,), (vector,))[1]

    def reverse(params, x, y, vector):
        return vjp(lambda p: grad(mean_loss)(p, x, y), params)[1](vector)

    return {"jvp(grad)": forward, "vjp(grad)": reverse}


def gradient_norms():
    def naive(params, x, y):
        def loss(params, x, y):
            return cross_entropy(net(params, x[None]), y[None])[0]

        grads = vmap(grad(loss), (None, 0, 0))(params, x, y)
        return jnp.sqrt(sum((g.reshape(len(x), -1) ** 2).sum(1) for g in jax.tree.leaves(grads)))

    def ghost(params, x, y):
        def loss(shifts):
            logits, taken = tapped(params, shifts, x)
            return cross_entropy(logits, y).sum(), taken

        shifts = [jnp.zeros((len(x), len(layer.bias))) for layer in params]
        deltas, taken = grad(loss, has_aux=True)(shifts)
        return jnp.sqrt(
            sum((d * d).sum(1) * ((h * h).sum(1) + 1) for d, h in zip(deltas, taken, strict=True))
        )  # fmt: skip

    return {"vmap(grad)": naive, "ghost norms": ghost}


def tangent_kernels():
    def contraction(params, x1, x2):
        one, two = (jax.tree.leaves(vmap(jacrev(net), (None, 0))(params, x)) for x in (x1, x2))
        n, m, outputs = len(x1), len(x2), one[0].shape[1]
        total = sum(
            a.reshape(n * outputs, -1) @ b.reshape(m * outputs, -1).T for a, b in zip(one, two, strict=True)
        )  # fmt: skip
        return total.reshape(n, outputs, m, outputs).transpose(0, 2, 1, 3)

    def products(params, x1, x2):
        def pair(a, b):
            back = vjp(lambda p: net(p, b), params)[1]
            rows = jnp.eye(len(params[-1].bias))
            return vmap(lambda e: jvp(lambda p: net(p, a), (params,), back(e))[1], out_axes=1)(rows)

        return vmap(vmap(pair, (None, 0)), (0, None))(x1, x2)

    def structured(params, x1, x2):
        def capture(x):
            shifts = [jnp.zeros_like(layer.bias) for layer in params]
            return vmap(jacrev(lambda s, x: tapped(params, s, x), has_aux=True), (None, 0))(shifts, x)

        (d1, h1), (d2, h2) = capture(x1), capture(x2)
        n, m, outputs = len(x1), len(x2), d1[0].shape[1]
        total = 0
        for i in range(len(params)):
            rows = d1[i].reshape(n * outputs, -1) @ d2[i].reshape(m * outputs, -1).T
            total = total + rows.reshape(n, outputs, m, outputs) * (h1[i] @ h2[i].T + 1)[:, None, :, None]
        return total.transpose(0, 2, 1, 3)

    return {"contraction": contraction, "vector products": products, "structured": structured}


def laplacians():
    def trace(params, x):
        return vmap(lambda x: jnp.trace(jax.hessian(lambda x: net(params, x)[0])(x)))(x)

    def products(params, x):
        def one(x):
            gradient = grad(lambda x: net(params, x)[0])
            return vmap(lambda e: jvp(gradient, (x,), (e,))[1] @ e)(jnp.eye(len(x))).sum()

        return vmap(one)(x)

    def forward(params, x):
        first, *rest = params
        h, rows, curved = x @ first.weight.T + first.bias, first.weight.T, None
        for layer in rest:
            t = jnp.tanh(h)
            slope = 1 - t * t
            bend = -2 * t * slope * (rows * rows).sum(-2)
            curved = (bend if curved is None else slope * curved + bend) @ layer.weight.T
            h, rows = t @ layer.weight.T + layer.bias, (rows * slope[:, None, :]) @ layer.weight.T
        return curved[:, 0]

    return {"trace of vmap(hessian)": trace, "jvp(grad) along each axis": products, "forward Laplacian": forward}


def brusselator(y):
    side = CASES["sparse"].sizes[0]
    u, v = y.reshape(2, side, side)

    def diffused(w):
        return DIFFUSION * (sum(jnp.roll(w, step, axis) for step in (-1, 1) for axis in (0, 1)) - 4 * w)

    du = 1 + u * u * v - (REACTION + 1) * u + diffused(u)
    dv = REACTION * u - u * u * v + diffused(v)
    return jnp.concatenate([du.reshape(-1), dv.reshape(-1)])


def sparse_jacobians():
    formulas = {"jacrev": jacrev(brusselator), "jacfwd": jacfwd(brusselator)}
    try:
        import asdex
    except ModuleNotFoundError:
        return formulas
    colored = asdex.jacobian_coloring(brusselator, jnp.zeros(2 * CASES["sparse"].sizes[0] ** 2))
    jacobian = asdex.jacobian_from_coloring(brusselator, colored)
    return {**formulas, "asdex": lambda y: jacobian(y).data}


FORMULAS = {
    "a": input_jacobians,
    "b": parameter_jacobians,
    "c": hessians,
    "d": hessian_vector_products,
    "e": gradient_norms,
    "f": tangent_kernels,
    "g": laplacians,
    "sparse": sparse_jacobians,
}


def leaves(result) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result)]


def laid_out(arguments, how: type):
    """The arguments with each (weight, bias) as a `Torch` or a `Flax` layer."""
    return tuple(
        [how(jnp.asarray(w if how is Torch else w.T.copy()), jnp.asarray(b)) for w, b in argument]
        if isinstance(argument, list)
        else jnp.asarray(argument)
        for argument in arguments
    )


def main() -> None:
    case, *only = sys.argv[1:]
    jax.config.update("jax_enable_x64", case == "sparse")
    calls = {}
    for how in (Torch,) if case == "sparse" else (Torch, Flax):
        arguments = laid_out(inputs(case), how)
        for name, formula in FORMULAS[case]().items():
            jitted = jax.jit(formula)
            name = f"{name}, weights as in Flax" if how is Flax else name
            if not only or name in only:
                calls[name] = lambda jitted=jitted, arguments=arguments: jax.block_until_ready(jitted(*arguments))
    serve(calls, leaves, jax.__version__)


if __name__ == "__main__":
    main()
