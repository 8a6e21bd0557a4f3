"""BatchNorm over the batch of all processes against BatchNorm over the whole batch in one."""

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.func import grad, jvp, vmap

from fnn import _ranks, nn, ops, random, tree
from fnn.ops import _synchronised

N = 2
LAYERS = {
    "image": (nn.BatchNorm(), (6, 3, 2, 2)),
    "average": (nn.BatchNorm(momentum=None), (4, 3)),
    "plain": (nn.BatchNorm(0.1, affine=False), (8, 2, 3)),
}


def _group():
    return dist.group.WORLD.group_name, dist.get_world_size()


def _case(name, dtype=torch.float64):
    """A layer, its params and state, which are not those of the start, the whole batch and a cotangent."""
    layer, shape = LAYERS[name]
    x = random.normal(random.key(1), shape, dtype) * 2 + 1
    params, state = layer.init(random.key(0), x)
    params = tree.map(lambda leaf: leaf + torch.arange(len(leaf)), params)
    _, state = layer.apply(params, state, x.exp(), train=True)
    return layer, params, state, x, random.normal(random.key(2), shape, dtype)


def _everything(layer, params, state, x, weight):
    """Value, state, gradients, a Hessian-vector product and the gradient of the gradient's norm, of one loss."""

    def loss(params, x):
        y, new = layer.apply(params, state, x, train=True)
        return (y.sin() * weight).sum(), (y, new)

    by_x = lambda x: grad(loss, 1, has_aux=True)(params, x)[0]
    grads, (y, new) = grad(loss, (0, 1), has_aux=True)(params, x)
    return {
        "state": new,
        "params": grads[0],
        "y": y,
        "x": grads[1],
        "hvp": jvp(by_x, (x,), (x,))[1],
        "norm": grad(lambda x: by_x(x).square().sum())(x),
        "members": vmap(lambda scale: grad(lambda x: loss(params, x * scale)[0])(x))(torch.tensor([1.0, 3.0])),
    }


def _synchronised_part(name, backend, sizes):
    layer, params, state, x, weight = _case(name)
    x, weight = (values.split(sizes)[_ranks.rank()] for values in (x, weight))

    def every(x, weight):
        with ops.synchronised(*_group()):
            return _everything(layer, params, state, x, weight)

    return (torch.compile(every, fullgraph=True, backend=backend) if backend else every)(x, weight)


@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_whole_batch_in_one_process(name, backend):
    layer, params, state, x, weight = _case(name)
    for sizes in ([len(x) // 2] * 2, [1, len(x) - 1]):
        expected = _everything(layer, params, state, x, weight)
        parts = ranks.run(N, _synchronised_part, name, backend, sizes)
        close = lambda found, key: torch.testing.assert_close(found, expected[key], rtol=1e-10, atol=1e-10)
        for part in parts:
            close(part["state"], "state")
        close(tree.map(lambda *leaves: sum(leaves), *(part["params"] for part in parts)), "params")
        for key in ("y", "x", "hvp", "norm"):
            close(torch.cat([part[key] for part in parts]), key)
        close(torch.cat([part["members"] for part in parts], 1), "members")
        if backend:
            break


def _far_from_zero():
    layer, params, state, x, _ = _case("image", torch.float32)
    with ops.synchronised(*_group()):
        y, _ = layer.apply(params, state, x.chunk(N)[_ranks.rank()] + 1000, train=True)
    return y


def test_no_digits_are_lost_far_from_zero():
    layer, params, state, x, _ = _case("image", torch.float32)
    x = x + 1000
    exact, _ = layer.apply(*tree.map(torch.Tensor.double, (params, state, x)), train=True)
    theirs = (layer.apply(params, state, x, train=True)[0] - exact).abs().max()
    ours = (torch.cat(ranks.run(N, _far_from_zero)) - exact).abs().max()
    assert ours < 4 * theirs + 1e-4


def _one_value_each():
    x = torch.tensor([[1.0], [3.0]])[_ranks.rank()][None]
    params, state = nn.BatchNorm().init(random.key(0), x)
    with ops.synchronised(*_group()):
        return nn.BatchNorm().apply(params, state, x, train=True)


def test_one_value_a_process_is_enough():
    (low, state), (high, _) = ranks.run(N, _one_value_each)
    torch.testing.assert_close(torch.cat([low, high]), torch.tensor([[-1.0], [1.0]]))
    torch.testing.assert_close(state, {"running_mean": torch.tensor([0.2]), "running_var": torch.tensor([1.1])})


def test_evaluation_needs_no_other_process():
    layer, params, state, x, _ = _case("image")
    with ops.synchronised("nowhere", 2):
        y, same = layer.apply(params, state, x)
    assert torch.equal(y, layer(params, x, state=state))
    assert same is state


def test_one_process_alone_is_as_without():
    layer, params, state, x, _ = _case("image", torch.float32)
    with ops.synchronised("alone", 1):
        found = layer.apply(params, state, x, train=True)
    torch.testing.assert_close(found, layer.apply(params, state, x, train=True), rtol=0, atol=0)


def test_the_setting_ends_with_its_block():
    with pytest.raises(RuntimeError, match="inside"), ops.synchronised("a", 2):
        with ops.synchronised("b", 3):
            assert _synchronised.processes() == 3
        assert (_synchronised.setting.group, _synchronised.processes()) == ("a", 2)
        raise RuntimeError("inside")
    assert _synchronised.processes() == 1
