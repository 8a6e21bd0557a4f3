"""Our side of `jacobians.py` and that of plain torch.func: `python jacobians_torch.py CASE SIDE [FORMULA]`.

A side is "ours" or "torch", then perhaps "compiled" and "warm", which calls `fnn.tune_cpu` first. Ours has one formula
a case, the call of the library; torch.func's are those that its users write, and the fastest counts.
"""

import sys

import torch
import torch.nn.functional as F
from jacobian_cases import CASES, DIFFUSION, REACTION, inputs
from jacobian_child import serve
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import fnn


def net(params, x, linear=fnn.ops.linear):
    for weight, bias in params[:-1]:
        x = torch.tanh(linear(x, weight, bias))
    return linear(x, *params[-1])


def mean_loss(params, x, y):
    return fnn.losses.cross_entropy(net(params, x), y)


def brusselator(y):
    side = CASES["sparse"].sizes[0]
    u, v = y.reshape(2, side, side)

    def diffused(w):
        around = w.roll(1, 0) + w.roll(-1, 0) + w.roll(1, 1) + w.roll(-1, 1)
        return DIFFUSION * (around - 4 * w)

    du = 1 + u * u * v - (REACTION + 1) * u + diffused(u)
    dv = REACTION * u - u * u * v + diffused(v)
    return torch.cat([du.reshape(-1), dv.reshape(-1)])


def ours(case: str, arguments: tuple) -> dict:
    if case == "sparse":
        prepared = fnn.sparse_jacobian(brusselator).prepare(*arguments)
        return {"sparse_jacobian": prepared.values}
    return {
        "a": {"jacobian": lambda params, x: fnn.jacobian(lambda x: net(params, x), batched=True)(x)},
        "b": {"jacobian": lambda params, x: fnn.vmap(fnn.jacobian(net), (None, 0))(params, x)},
        "c": {"hessian": lambda params, x, y: fnn.hessian(mean_loss, flat=True)(params, x, y)},
        "d": {"hvp": lambda params, x, y, v: fnn.hvp(lambda params: mean_loss(params, x, y), params, v)},
        "e": {"per_sample_grad_norm": lambda params, x, y: fnn.per_sample_grad_norm(mean_loss)(params, x, y)},
        "f": {"ntk": lambda params, x1, x2: fnn.ntk(net, params, x1, x2)},
        "g": {"laplacian": lambda params, x: fnn.vmap(fnn.laplacian(lambda x: net(params, x)[0]))(x)},
    }[case]


def plain(params, x):
    return net(params, x, F.linear)


def plain_loss(params, x, y):
    return F.cross_entropy(plain(params, x), y)


def gradient_norms(params, x, y):
    grads = vmap(grad(plain_loss), (None, 0, 0))(params, x, y)
    return sum(g.reshape(len(x), -1).square().sum(1) for g in tree_leaves(grads)).sqrt()


def tangent_kernel(params, x1, x2):
    one, two = (tree_leaves(vmap(jacrev(plain), (None, 0))(params, x)) for x in (x1, x2))
    n, m, outputs = len(x1), len(x2), one[0].shape[1]
    total = sum(a.reshape(n * outputs, -1) @ b.reshape(m * outputs, -1).T for a, b in zip(one, two, strict=True))
    return total.reshape(n, outputs, m, outputs).transpose(1, 2)


def flat_hessian(transform):
    def of(params, x, y):
        vector, unravel = fnn.tree.ravel(params)
        return transform(lambda vector: plain_loss(unravel(vector), x, y))(vector)

    return of


def laplacian_by_products(params, x):
    def one(x):
        gradient = grad(lambda x: plain(params, x)[0])
        along = vmap(lambda e: jvp(gradient, (x,), (e,))[1] @ e)
        return along(torch.eye(len(x))).sum()

    return vmap(one)(x)


def torch_func(case: str) -> dict:
    return {
        "a": {
            "vmap(jacrev)": lambda params, x: vmap(jacrev(plain, 1), (None, 0))(params, x),
            "vmap(jacfwd)": lambda params, x: vmap(jacfwd(plain, 1), (None, 0))(params, x),
        },
        "b": {"vmap(jacrev)": lambda params, x: vmap(jacrev(plain), (None, 0))(params, x)},
        "c": {
            "jacfwd(jacrev)": flat_hessian(lambda f: jacfwd(jacrev(f))),
            "jacrev(jacrev)": flat_hessian(lambda f: jacrev(jacrev(f))),
        },
        "d": {
            "jvp(grad)": lambda params, x, y, v: jvp(lambda p: grad(plain_loss)(p, x, y), (params,), (v,))[1],
            "vjp(grad)": lambda params, x, y, v: vjp(lambda p: grad(plain_loss)(p, x, y), params)[1](v)[0],
        },
        "e": {"vmap(grad)": gradient_norms},
        "f": {"contraction": tangent_kernel},
        "g": {
            "trace of vmap(hessian)": lambda params, x: vmap(
                lambda x: hessian(lambda x: plain(params, x)[0])(x).trace()
            )(x),
            "jvp(grad) along each axis": laplacian_by_products,
        },
        "sparse": {"jacrev": jacrev(brusselator), "jacfwd": jacfwd(brusselator)},
    }[case]


def main() -> None:
    case, side, *only = sys.argv[1:]
    if "warm" in side:
        assert fnn.tune_cpu()
    arguments = tree_map(torch.from_numpy, inputs(case))
    calls = {}
    for name, formula in (ours(case, arguments) if "ours" in side else torch_func(case)).items():
        call = torch.compile(formula, fullgraph=True, dynamic=False) if "compiled" in side else formula
        if not only or name in only:
            calls[name] = lambda call=call: call(*arguments)
    with torch.no_grad():
        serve(calls, lambda result: [x.numpy() for x in tree_leaves(result)], torch.__version__)


if __name__ == "__main__":
    main()
