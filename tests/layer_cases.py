"""What is asked of every layer: torch.nn's values, derivatives and running statistics, under every transform."""

import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from fnn import random, tree

KEY = random.key(0)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def name(value):
    """A short name of a case."""
    return " ".join(repr(value).split())[:48]


def carried(module, layer, *xs):
    """The layer's params and state with the numbers of `module`, by name; the module in float64, its weights drawn."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(double(*parameter.shape))
    params, state = layer.init(KEY, *xs)
    theirs = dict(module.named_parameters())
    assert {n: p.shape for n, p in params.items()} == {n: p.shape for n, p in theirs.items()}
    return {n: theirs[n].detach().clone() for n in params}, {n: module.get_buffer(n).clone() for n in state}


def check_against_torch(layer, module, *shapes):
    """Values, gradients by inputs and parameters, and the state, in training twice and in evaluation."""
    xs = [double(*shape) for shape in shapes]
    params, state = carried(module, layer, *xs)
    for train in (True, True, False):
        module.train(train)
        wanted = [x.clone().requires_grad_() for x in xs] + list(module.parameters())
        theirs = module(*wanted[: len(xs)])
        cotangent = double(*theirs.shape)
        expected = torch.autograd.grad(theirs, wanted, cotangent)
        loss = lambda p, *xs: (layer.apply(p, state, *xs, train=train)[0] * cotangent).sum()
        by_params, *by_xs = grad(loss, argnums=tuple(range(1 + len(xs))))(params, *xs)
        ours, state = layer.apply(params, state, *xs, train=train)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close([*by_xs, *by_params.values()], list(expected), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state, {n: module.get_buffer(n) for n in state}, rtol=1e-10, atol=1e-10)


def check_transforms(layer, module, *shapes):
    """An ensemble, nested `vmap`, `vmap(grad)`, and derivatives up to the third against plain autograd of torch.nn."""
    xs = tuple(double(*shape) for shape in shapes)
    params, state = carried(module, layer, *xs)

    members = tree.map(lambda leaf: torch.stack([leaf, leaf * 2, leaf + 1]), (params, state, xs))
    train = lambda p, s, xs: layer.apply(p, s, *xs, train=True)
    batched = vmap(train)(*members)
    inner = lambda p, s, xs: (layer(p, *xs, state=s) ** 3).sum()
    gradients = vmap(grad(inner))(*members)
    for row in range(3):
        p, s, row_xs = tree.map(lambda leaf, row=row: leaf[row], members)
        check = lambda ours, single, row=row: torch.testing.assert_close(
            tree.map(lambda leaf: leaf[row], ours), single, rtol=1e-10, atol=1e-10
        )
        check(batched, train(p, s, row_xs))
        check(gradients, grad(inner)(p, s, row_xs))
    grid = tuple(torch.stack([torch.stack([x, x + 1]), torch.stack([-x, x * 2])]) for x in xs)
    nested = vmap(vmap(lambda *xs: layer(params, *xs, state=state)))(*grid)
    torch.testing.assert_close(nested[1, 0], layer(params, *[x[1, 0] for x in grid], state=state))

    flat, unravel = tree.ravel((params, xs))
    point = flat[: min(5, len(flat))]
    if len(flat) > 10:  # some of the parameters and some of the inputs
        point = torch.cat([flat[:4], flat[-4:]])

    def fill(v):
        return torch.cat([v[:4], flat[4:-4], v[4:]]) if len(flat) > 10 else torch.cat([v, flat[len(v) :]])

    def ours(v):
        p, xs = unravel(fill(v))
        return layer.apply(p, state, *xs, train=True)[0]

    def theirs(v):
        p, xs = unravel(fill(v))
        return functional_call(module.train(), {**p, **{n: b.clone() for n, b in module.named_buffers()}}, tuple(xs))

    direct, cubed = torch.autograd.functional.jacobian(theirs, point), lambda f: lambda v: f(v).pow(3).sum()
    for jacobian in (jacfwd, jacrev):
        torch.testing.assert_close(jacobian(ours)(point), direct, rtol=1e-9, atol=1e-9)
    expected = torch.autograd.functional.hessian(cubed(theirs), point)
    scale = 1 + expected.abs().max().item()
    for second in (hessian(cubed(ours)), jacrev(jacrev(cubed(ours))), jacfwd(jacfwd(cubed(ours)))):
        torch.testing.assert_close(second(point), expected, rtol=1e-8, atol=1e-9 * scale)
    direction = torch.ones_like(point)
    product = lambda v: jvp(grad(cubed(ours)), (v,), (direction,))[1]
    third = jvp(product, (point,), (direction,))[1]
    step = 1e-4 * direction
    difference = (product(point + step) - product(point - step)) / 2e-4
    torch.testing.assert_close(third, difference, rtol=1e-4, atol=1e-5 * (1 + difference.abs().max().item()))


def everything(layer, params, state, xs):
    """Each transform of one layer, for compiled against eager; floating inputs."""
    f = lambda p, *xs: layer.apply(p, state, *xs, train=True)[0]
    loss = lambda p, *xs: f(p, *xs).pow(3).mean()
    by_all = grad(loss, argnums=tuple(range(1 + len(xs))))
    by_x = lambda x: loss(params, x, *xs[1:])
    ones = tree.map(torch.ones_like, params)
    return {
        "state": layer.apply(params, state, *xs, train=True)[1],
        "evaluation": layer(params, *xs, state=state),
        "grad": by_all(params, *xs),
        "jvp": jvp(f, (params, *xs), (ones, *xs))[1],
        "hvp": jvp(by_all, (params, *xs), (ones, *xs))[1],
        "vmap(grad)": vmap(by_all, in_dims=(None, *[0] * len(xs)))(params, *[torch.stack([x, x * 2]) for x in xs]),
        "hessian": hessian(lambda v: by_x(torch.cat([v, xs[0].flatten()[3:]]).view_as(xs[0])))(xs[0].flatten()[:3]),
        "jacrev": jacrev(by_x)(xs[0]),
    }


def check_compiled(cases):
    """One graph with every transform of these layers equals eager. `torch.compile` is the caller's."""
    layers = [(layer, [double(*shape) for shape in shapes]) for layer, *shapes in cases]
    starts = [layer.init(KEY, *xs) for layer, xs in layers]
    draw = lambda leaf: double(*leaf.shape) if leaf.is_floating_point() and leaf.dim() else leaf
    starts = [(tree.map(draw, params), state) for params, state in starts]

    def run(starts):
        return [everything(layer, *start, xs) for (layer, xs), start in zip(layers, starts, strict=True)]

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(starts), run(starts), rtol=1e-9, atol=1e-9)
