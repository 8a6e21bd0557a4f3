"""Rules: which leaf of a tree is cut along which of its axes, over which axis of the mesh."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from fnn import tree
from fnn._ranks import DATA, MODEL
from fnn.distributed._axis import sharded_axis

Placement = Mapping[str, int]
"""Of a leaf, by the name of the mesh's axis: along which axis of its own the leaf is cut over that one."""

Rules = Mapping[str, Placement] | Callable[[Any, DeviceMesh], Mapping[str, Placement]]


def replicated(values: Any, mesh: DeviceMesh) -> Mapping[str, Placement]:
    """Every leaf whole on every process: data parallelism.

    Example:
        >>> from fnn import distributed
        >>> distributed.replicated({"weight": torch.ones(4, 8)}, distributed.init())
        {}
    """
    return {}


def fully_sharded(values: Any, mesh: DeviceMesh) -> Mapping[str, Placement]:
    """Every leaf cut over the mesh's data axis, along its longest axis that this length divides (ZeRO-3).

    Leaves without such an axis are whole on every process. Source: Rajbhandari et al., ZeRO, 2020.

    Example:
        >>> from fnn import distributed
        >>> distributed.fully_sharded({"weight": torch.ones(4, 8)}, distributed.init())
        {'weight': {'data': 1}}
    """
    return _over_data(values, mesh, {})


def tensor_parallel(model: str, *, fully_sharded: bool = False) -> Callable[[Any, DeviceMesh], Mapping[str, Placement]]:
    """Layers cut over the mesh's axis "model", in pairs: two products in a row need one sum over processes.

    model: "mlp" for `models.mlp` and other stacks of linear layers, as in `models.lenet5`: these are cut in pairs,
        outputs then inputs; "gpt" for `models.gpt`, where the MLPs of the blocks are, and the inputs of
        ``attn.c_proj``. Attention itself is not: ``attn.c_attn`` is whole, and every process computes all heads. What
        is left (convolutions, embeddings, norms, an odd linear layer) is whole too.
    fully_sharded: whether all leaves are cut over the axis "data" too, along another of their axes

    Raises `ValueError` for another model; when used, for a tree that is not that model's.
    Shoeybi et al., Megatron-LM, 2019, where heads of attention are cut as well.

    Example:
        >>> from fnn import distributed, models, random
        >>> params, _ = models.mlp((8, 8)).init(random.key(0), torch.zeros(1, 4))
        >>> mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "model"))
        >>> list(distributed.tensor_parallel("mlp")(params, mesh).items())[:2]
        [('1.weight', {'model': -2}), ('1.bias', {'model': -1})]
    """
    if model not in _MODELS:
        raise ValueError(f"tensor_parallel: model must be one of {', '.join(map(repr, _MODELS))}, got {model!r}")

    def rules(values: Any, mesh: DeviceMesh) -> Mapping[str, Placement]:
        cuts = _MODELS[model](values)
        return _over_data(values, mesh, cuts) if fully_sharded else cuts

    return rules


def _gpt(values: Any) -> dict[str, Placement]:
    """Axes are counted from the end, for the blocks' leaves may be stacked.

    Queries, keys and values are one leaf, of which a part would be neither; so it stays whole.
    """
    by_outputs, by_inputs = {MODEL: -1}, {MODEL: -2}  # weights are (in, out)
    return {
        "h.*.attn.c_proj.weight": by_inputs,
        "h.*.mlp.c_fc.*": by_outputs,
        "h.*.mlp.c_proj.weight": by_inputs,
    }


def _mlp(values: Any) -> dict[str, Placement]:
    weights = [path for path, leaf in tree.paths(values).items() if path.endswith("weight") and leaf.dim() == 2]
    layers = [path.removesuffix(".weight") for path in weights]
    cuts: dict[str, Placement] = {}
    for first, second in zip(layers[::2], layers[1::2], strict=False):  # weights are (out, in)
        cuts[f"{first}.weight"] = {MODEL: -2}
        if f"{first}.bias" in tree.paths(values):
            cuts[f"{first}.bias"] = {MODEL: -1}
        cuts[f"{second}.weight"] = {MODEL: -1}
    return cuts


_MODELS = {"gpt": _gpt, "mlp": _mlp}


def _over_data(values: Any, mesh: DeviceMesh, cuts: Mapping[str, Placement]) -> dict[str, Placement]:
    """These cuts, and each leaf cut over the data axis along the longest of its other axes."""
    names = mesh.mesh_dim_names or ()
    if DATA not in names:
        raise ValueError(f"fully_sharded: no axis of the mesh is called {DATA!r}, its axes are {list(names)}")
    chosen = matched(values, cuts)
    for path, leaf in tree.paths(values).items():
        taken = [axis % leaf.dim() for axis in chosen.get(path, {}).values()]
        free = [0 if axis in taken else size for axis, size in enumerate(leaf.shape)]
        axis = sharded_axis(free, mesh.size(names.index(DATA)), path)
        if axis is not None:
            chosen[path] = {DATA: axis, **chosen.get(path, {})}
    return chosen


def matched(values: Any, rules: Mapping[str, Placement]) -> dict[str, Placement]:
    """The placement of each leaf that a pattern matches, by path; the first that matches counts.

    Raises `ValueError` for a pattern that no path matches.
    """
    paths = list(tree.paths(values))
    for pattern in rules:
        if not fnmatch.filter(paths, pattern):
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
            raise ValueError(
                f"distributed.shard: no path of the tree matches {pattern!r}; nearest are {', '.join(map(repr, near))}"
            )
    found: dict[str, Placement] = {}
    for path in paths:
        for pattern, placement in rules.items():
            if fnmatch.fnmatchcase(path, pattern):
                found[path] = placement
                break
    return found
