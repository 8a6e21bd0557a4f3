"""`fsdp`: a layer whose parameters are parted among processes, gathered where they are used and freed after that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh

from fnn import _ranks, nn, tree
from fnn.distributed._shards import as_shard, gathered, parted
from fnn.distributed._unit import Around, CastShards, Stack, Unit
from fnn.nn._layer import Function, Layer, Params, State, as_layer, layer
from fnn.nn._wrapper import Wrapper
from fnn.ops import ShardedLeaf


def fsdp(layer: Layer | Callable[..., Any], mesh: DeviceMesh) -> Layer:
    """`layer` with each parameter parted among the processes of `mesh`'s data axis, whole only while it is in use.

    Paths, shapes and numbers of the parameters are those of `layer`. Its units are gathered one at a time, used, freed,
    and in the backward pass gathered and computed again: a process needs memory for its share of the parameters,
    gradients and optimizer state, for one whole unit, and for the inputs of the units. Communication is 1.5 times that
    of data parallel training.

    A unit is a copy of an `nn.Repeat`, or a child of an `nn.Sequential`; a child that is itself a Sequential, or that
    holds a Repeat, is searched for units instead, as is every other layer made of layers. Parameters that are in no
    unit, such as the embeddings of `models.gpt`, are gathered for the whole step. So a stack of layers belongs in an
    `nn.Repeat`: a Block of 24 layers is one unit inside of a Sequential, and none by itself. `nn.Remat` around units
    is left out; `nn.Cast` acts before gathering, so that messages are in its dtype, and the sum of their gradients is.

    `init` parts each unit before it makes the next one; every process calls it, with the same key. A parameter is a
    `DTensor`, parted along the longest axis that the number of processes divides, or a plain tensor where there is
    none. In training, `train.make_step(loss_fn, optimizer, mesh=mesh)` hands the layer its shards. Outside of
    transforms it takes DTensors, and anywhere plain tensors, with which it is `layer` itself.

    Raises `TypeError` or `ValueError` for another mesh than `distributed.init` makes, for keys that differ between
    processes, and for a DTensor inside a transform.

    Example:
        >>> from fnn import distributed, nn, random
        >>> net = distributed.fsdp(nn.Sequential(nn.Linear(8), nn.relu, nn.Linear(2)), distributed.init())
        >>> params, _ = net.init(random.key(0), torch.zeros(1, 4))
        >>> net(params, torch.zeros(3, 4)).shape
        torch.Size([3, 2])

    Rajbhandari et al., ZeRO, 2020; Zhang et al., SimpleFSDP, 2024.
    """
    _ranks.data_axis("fsdp", mesh)
    return _whole_net(as_layer(layer, "layer"), mesh if mesh.ndim == 1 else mesh[_ranks.DATA])


def _whole_net(layer: Layer, mesh: DeviceMesh) -> Layer:
    if isinstance(layer, nn.Cast):
        return CastShards(layer.around(_whole_net(layer.inner, mesh)))
    return _Net(_with_units(layer, mesh), mesh)


def _with_units(layer: Layer, mesh: DeviceMesh) -> Layer:
    """The same layer, in which units gather their own parameters."""
    if isinstance(layer, nn.Repeat):
        # Copies are one layer: made one unit, they are one function to the compiler.
        units = {id(child): _unit(child, mesh) for _, child in layer.children}
        repeat = layer.with_children(tuple((name, units[id(child)]) for name, child in layer.children))
        return Stack(repeat) if layer.stacked else repeat
    if isinstance(layer, nn.Container):
        within = isinstance(layer, nn.Sequential)
        found = [(name, child, within and not _searched(child)) for name, child in layer.children]
        return layer.with_children(
            tuple((name, _unit(child, mesh) if unit else _with_units(child, mesh)) for name, child, unit in found)
        )
    if isinstance(layer, Wrapper):
        inner = _with_units(layer.inner, mesh)
        if isinstance(layer, nn.Remat) and _has_units(inner):
            return inner
        return CastShards(layer.around(inner)) if isinstance(layer, nn.Cast) else layer.around(inner)
    return layer


def _searched(layer: Layer) -> bool:
    """Whether a child of a Sequential is no unit, but made of units."""
    while isinstance(layer, Wrapper):
        layer = layer.inner
    return isinstance(layer, nn.Sequential) or _holds(layer, nn.Repeat)


def _has_units(layer: Layer) -> bool:
    return _holds(layer, (Unit, Stack))


def _holds(layer: Layer, kinds: Any) -> bool:
    if isinstance(layer, kinds):
        return True
    if isinstance(layer, Wrapper):
        return _holds(layer.inner, kinds)
    return any([_holds(child, kinds) for _, child in layer.children]) if isinstance(layer, nn.Container) else False


def _unit(layer: Layer, mesh: DeviceMesh) -> Layer:
    while isinstance(layer, nn.Remat):
        layer = layer.inner
    return layer if isinstance(layer, Function) else Unit(layer, mesh)


@layer
class _Net(Around):
    """The whole of it: sees to the parameters that are in no unit."""

    inner: Layer
    mesh: DeviceMesh

    def init(self, key: Tensor, *xs: Any, **inputs: Any) -> tuple[Params, State]:
        if not key.is_meta and not isinstance(key, FakeTensor):
            _ranks.check_same("fsdp: init", {"key": key.tolist()}, "every process needs the same key")
        params, state = self.inner.init(key, *xs, **inputs)
        return parted(params, self.mesh), state

    def apply(
        self, params: Params, state: State, *xs: Any, key: Tensor | None = None, train: bool = False, **inputs: Any
    ) -> tuple[Any, State]:
        leaves, structure = tree.flatten(tree.map(as_shard, params))
        free = [i for i, outside in enumerate(_outside_of_units(self.inner, params)) if outside]
        shards = [i for i in free if isinstance(leaves[i], ShardedLeaf)]
        for i, whole in zip(shards, gathered([leaves[i] for i in shards]), strict=True):
            leaves[i] = whole
        params = tree.unflatten(structure, leaves)
        return self.inner.apply(params, state, *xs, key=key, train=train, **inputs)

    def __repr__(self) -> str:
        return f"fsdp({self.inner!r})"


def _outside_of_units(layer: Layer, params: Params) -> list[bool]:
    """For each leaf whether it belongs to no unit."""
    if isinstance(layer, Wrapper) and not isinstance(layer, (Unit, Stack)):
        return _outside_of_units(layer.inner, params)
    if isinstance(layer, nn.Container) and isinstance(params, dict):
        children = dict(layer.children)
        found: list[bool] = []
        for name, part in params.items():
            # An entry that no child has is an error, which `apply` will name.
            found += _outside_of_units(children[name], part) if name in children else [False] * len(tree.leaves(part))
        return found
    return [not isinstance(layer, (Unit, Stack))] * len(tree.leaves(params))
