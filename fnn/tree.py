"""Pytrees: nested dicts, lists, tuples and NamedTuples whose leaves are tensors.

Leaf order is insertion order, as in torch (JAX sorts dict keys). A *path* is the keys from the root
joined by dots, as in a ``state_dict``: ``"0.weight"``. Where a function drops leaves, as `partition`
does, the empty tuple ``()`` stands in their place: it is a pytree without leaves, so gradients,
optimizers and `vmap` pass over it, and the order of the other leaves stays what it was.

Flattening is torch's own (`torch.utils._pytree`, which Dynamo traces); it is imported here only.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any
Where = str | Callable[[str, Any], bool] | Tree

register_node = pytree.register_pytree_node
GetAttrKey = pytree.GetAttrKey


def flatten(tree: Tree) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves in insertion order, and the structure that `unflatten` needs."""
    return pytree.tree_flatten(tree)


def unflatten(structure: pytree.TreeSpec, leaves: Any) -> Tree:
    """The inverse of `flatten`: `unflatten(structure, leaves)`, arguments in JAX's order."""
    return pytree.tree_unflatten(leaves, structure)


def leaves(tree: Tree) -> list[Any]:
    """All leaves, in insertion order."""
    return pytree.tree_leaves(tree)


def paths(tree: Tree) -> dict[str, Any]:
    """`{path: leaf}` in leaf order, for example ``{"0.weight": ..., "0.bias": ...}``.

    Raises `ValueError` where two leaves have one path, as in ``{1: x, "1": y}``.
    """
    found, _ = pytree.tree_flatten_with_path(tree)
    named = {_path_name(keys): leaf for keys, leaf in found}
    if len(named) != len(found):
        names = [_path_name(keys) for keys, _ in found]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two leaves of the tree have the path {double!r}; rename one of their keys")
    return named


def map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `f` to corresponding leaves of trees of one structure.

    Raises `ValueError` naming the first path at which the structures differ.
    """
    # While tracing, structures are compared by torch's own map, for which Dynamo has a fast path: comparing them here
    # as well would double the time to trace an optimizer.
    if not torch.compiler.is_compiling():
        for other in rest:
            if (found := difference(tree, other)) is not None:
                raise ValueError(f"trees of different structure: {found}")
    return pytree.tree_map(f, tree, *rest)


def difference(expected: Tree, actual: Tree) -> str | None:
    """The first difference in structure between two trees, in words, or `None` where there is none."""
    _, expected_structure = flatten(expected)
    _, actual_structure = flatten(actual)
    if expected_structure == actual_structure:
        return None
    want, have = list(paths(expected)), list(paths(actual))
    if missing := [path for path in want if path not in have]:
        return f"missing {_quoted(missing)}"
    if extra := [path for path in have if path not in want]:
        return f"unexpected {_quoted(extra)}"
    if want != have:
        return f"the same leaves in another order: expected {_quoted(want)}, got {_quoted(have)}"
    return f"the same paths in other containers: expected {expected_structure}, got {actual_structure}"


def check_like(expected: Tree, actual: Tree, name: str) -> None:
    """Raise `ValueError` unless `actual` has the structure, shapes and dtypes of `expected`.

    `name` names the checked tree in the message, `expected` may hold meta tensors.
    """
    if (found := difference(expected, actual)) is not None:
        raise ValueError(f"{name}: {found}")
    for index, (want, leaf) in enumerate(zip(leaves(expected), leaves(actual), strict=True)):
        if isinstance(leaf, Tensor) and leaf.shape == want.shape and leaf.dtype == want.dtype:
            continue
        path = list(paths(actual))[index]
        where = f"{name}: leaf {path!r}" if path else name
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{where} is {type(leaf).__name__}, expected a tensor of shape {tuple(want.shape)}")
        if leaf.shape != want.shape:
            raise ValueError(f"{where} has shape {tuple(leaf.shape)}, expected {tuple(want.shape)}")
        raise ValueError(f"{where} has dtype {leaf.dtype}, expected {want.dtype}")


def size(tree: Tree) -> int:
    """Number of elements over all leaves."""
    return sum(leaf.numel() for leaf in leaves(tree))


def zeros_like(tree: Tree) -> Tree:
    """A tree of zeros of the same structure, shapes, dtypes and devices."""
    return map(torch.zeros_like, tree)


def allclose(a: Tree, b: Tree, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """Whether all corresponding leaves are close. Raises `ValueError` where structure, shape or dtype differ."""
    check_like(a, b, "allclose")
    return all(torch.allclose(x, y, rtol, atol) for x, y in zip(leaves(a), leaves(b), strict=True))


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """All leaves as one vector, and the function that turns such a vector back into the tree.

    Leaves are taken in insertion order. Floating leaves of several widths are widened to the widest, and
    the inverse restores each leaf's own dtype exactly. Integer and floating leaves together would lose
    digits, so that raises `TypeError`; `partition` them first.

    Example:
        >>> vector, unravel = ravel({"weight": torch.ones(2, 3), "bias": torch.zeros(3)})
        >>> vector.shape, unravel(vector)["bias"].shape
        (torch.Size([9]), torch.Size([3]))
    """
    flat, structure = flatten(tree)
    if not flat:
        return torch.zeros(0), lambda vector: unflatten(structure, [])
    kinds: dict[tuple[bool, bool], str] = {}
    for path, leaf in paths(tree).items():
        kinds.setdefault((leaf.is_floating_point(), leaf.is_complex()), f"{path!r} ({leaf.dtype})")
    if len(kinds) > 1:
        raise TypeError(f"ravel: cannot mix number kinds without loss: {', '.join(kinds.values())}; partition first")
    dtype = flat[0].dtype
    for leaf in flat[1:]:
        dtype = torch.promote_types(dtype, leaf.dtype)
    shapes = [leaf.shape for leaf in flat]
    dtypes = [leaf.dtype for leaf in flat]
    sizes = [leaf.numel() for leaf in flat]

    def unravel(vector: Tensor) -> Tree:
        if vector.shape != (sum(sizes),):
            raise ValueError(f"unravel: expected a vector of shape ({sum(sizes)},), got {tuple(vector.shape)}")
        parts = torch.split(vector, sizes)
        restored = [p.reshape(s).to(d) for p, s, d in zip(parts, shapes, dtypes, strict=True)]
        return unflatten(structure, restored)

    return torch.cat([leaf.reshape(-1).to(dtype) for leaf in flat]), unravel


def mask(tree: Tree, where: Where) -> Tree:
    """A tree of bools of the structure of `tree`: which leaves `where` chooses.

    `where` is a path pattern (``"*.bias"``, where ``*`` is any text), a predicate
    `(path, leaf) -> bool`, or such a mask.
    Raises `ValueError` for a pattern that matches nothing, and for a mask of another structure.
    """
    flat, structure = flatten(tree)
    if isinstance(where, str):
        chosen = [_matches(path, where) for path in paths(tree)]
        if not any(chosen):
            raise ValueError(f"no path matches {where!r}; paths are {_quoted(paths(tree))}")
    elif callable(where):
        chosen = [bool(where(path, leaf)) for path, leaf in paths(tree).items()]
    else:
        if (found := difference(tree, where)) is not None:
            raise ValueError(f"mask: {found}")
        chosen = [bool(leaf) for leaf in leaves(where)]
    return unflatten(structure, chosen if flat else [])


def partition(tree: Tree, where: Where) -> tuple[Tree, Tree]:
    """Split into (the leaves that `where` chooses, all others); `combine` puts them together again.

    Both trees keep the containers of `tree`, with ``()`` in the place of a leaf that went to the other side.
    `where` as in `mask`.

    Example:
        >>> biases, rest = partition({"weight": torch.ones(2), "bias": torch.zeros(2)}, "bias")
        >>> biases
        {'weight': (), 'bias': tensor([0., 0.])}
    """
    flat, structure = flatten(tree)
    chosen = leaves(mask(tree, where))
    yes = [leaf if c else () for leaf, c in zip(flat, chosen, strict=True)]
    no = [() if c else leaf for leaf, c in zip(flat, chosen, strict=True)]
    return unflatten(structure, yes), unflatten(structure, no)


def combine(a: Tree, b: Tree) -> Tree:
    """Undo `partition`: take each leaf from the tree that has it.

    Raises `ValueError` where both have one, and for trees that are not two halves of one.
    """
    ours, structure = pytree.tree_flatten(a, is_leaf=_is_absent)
    theirs, other_structure = pytree.tree_flatten(b, is_leaf=_is_absent)
    if structure != other_structure:
        raise ValueError(
            f"combine: expected two halves made by partition, but the trees differ: {structure}, {other_structure}"
        )
    for index, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        if not _is_absent(x) and not _is_absent(y):
            keys, _ = pytree.tree_flatten_with_path(a, is_leaf=_is_absent)[0][index]
            raise ValueError(
                f"combine: both trees have a leaf at {_path_name(keys)!r}; expected two halves made by partition"
            )
    return unflatten(structure, [y if _is_absent(x) else x for x, y in zip(ours, theirs, strict=True)])


def _is_absent(node: Any) -> bool:
    return type(node) is tuple and len(node) == 0


def select(tree: Tree, pattern: str) -> dict[str, Any]:
    """`{path: leaf}` of the leaves whose path matches a pattern such as ``"*.weight"``.

    Raises `ValueError` where nothing matches.
    """
    chosen = leaves(mask(tree, pattern))
    return {path: leaf for (path, leaf), c in zip(paths(tree).items(), chosen, strict=True) if c}


def at(tree: Tree, path: str) -> At:
    """One place of a tree, a leaf or a subtree, to read or to replace in a copy.

    Example:
        >>> params = {"0": {"weight": torch.ones(2)}}
        >>> at(params, "0.weight").set(torch.zeros(2))
        {'0': {'weight': tensor([0., 0.])}}

    Raises `KeyError` naming the nearest paths where `path` does not exist.
    """
    return At(tree, path)


class At:
    """What `at` returns: `.get()`, `.set(value)`, `.apply(f)`. The tree itself is never changed."""

    def __init__(self, tree: Tree, path: str):
        self.tree = tree
        self.path = path
        self.get()  # a wrong path fails here, not at the first use

    def get(self) -> Any:
        """The leaf or subtree at the path."""
        found: list[Any] = []
        _replace(self.tree, self.path, lambda node: found.append(node) or node)
        if not found:
            known = list(paths(self.tree))
            near = difflib.get_close_matches(self.path, known, n=3, cutoff=0.3) or known[:5]
            raise KeyError(f"no path {self.path!r} in the tree; nearest are {_quoted(near)}")
        return found[0]

    def set(self, value: Any) -> Tree:
        """The tree with `value` at the path."""
        return self.apply(lambda _: value)

    def apply(self, f: Callable[[Any], Any]) -> Tree:
        """The tree with `f` of what is at the path in its place."""
        return _replace(self.tree, self.path, f)


def _replace(node: Tree, path: str, f: Callable[[Any], Any]) -> Tree:
    """`node` with what lies at `path` put through `f`; `node` itself where there is nothing."""
    if not path:
        return f(node)
    children, structure = pytree.tree_flatten(node, is_leaf=lambda child: child is not node)
    named, _ = pytree.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    for index, (keys, child) in enumerate(named):
        name = _path_name(keys)
        if keys and (path == name or path.startswith(f"{name}.")):
            children[index] = _replace(child, path[len(name) + 1 :], f)
            return unflatten(structure, children)
    return node


def _matches(path: str, pattern: str) -> bool:
    """Whether `pattern`, in which ``*`` stands for any text, matches all of `path` (Dynamo cannot trace fnmatch)."""
    first, *parts = pattern.split("*")
    if not parts:
        return path == pattern
    if not path.startswith(first):
        return False
    position, last = len(first), parts.pop()
    for part in parts:
        found = path.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    return len(path) - len(last) >= position and path.endswith(last)


def _path_name(keys: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def _quoted(names: Any, limit: int = 6) -> str:
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown or "nothing"
