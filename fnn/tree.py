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
    """`{path: leaf}` in leaf order, for example ``{"0.weight": ..., "0.bias": ...}``."""
    found, _ = pytree.tree_flatten_with_path(tree)
    return {_path_name(keys): leaf for keys, leaf in found}


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
    wanted = leaves(expected)
    for (path, leaf), want in zip(paths(actual).items(), wanted, strict=True):
        where = f"{name}: leaf {path!r}" if path else name
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{where} is {type(leaf).__name__}, expected a tensor of shape {tuple(want.shape)}")
        if leaf.shape != want.shape:
            raise ValueError(f"{where} has shape {tuple(leaf.shape)}, expected {tuple(want.shape)}")
        if leaf.dtype != want.dtype:
            raise ValueError(f"{where} has dtype {leaf.dtype}, expected {want.dtype}")


def size(tree: Tree) -> int:
    """Number of elements over all leaves."""
    return sum(leaf.numel() for leaf in leaves(tree))


def zeros_like(tree: Tree) -> Tree:
    """A tree of zeros of the same structure, shapes, dtypes and devices."""
    return map(torch.zeros_like, tree)


def abstract(tree: Tree) -> Tree:
    """The same tree on the meta device: shapes and dtypes without data. Leaves that are no tensors stay."""
    return map(
        lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if isinstance(leaf, Tensor) else leaf,
        tree,
    )


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
    """Undo `partition`: take each leaf from the tree that has it. Raises `ValueError` where both have one."""
    return _combine(a, b, "")


def _combine(a: Tree, b: Tree, path: str) -> Tree:
    if type(a) is tuple and not a:
        return b
    if type(b) is tuple and not b:
        return a
    child = f"{path}." if path else ""
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return type(a)((k, _combine(a[k], b[k], f"{child}{k}")) for k in a)
    if isinstance(a, tuple | list) and type(a) is type(b) and len(a) == len(b):
        items = [_combine(x, y, f"{child}{n}") for (n, x), y in zip(_children(a).items(), b, strict=True)]
        return type(a)(*items) if hasattr(a, "_fields") else type(a)(items)
    what = "both trees have a leaf" if isinstance(a, Tensor) and isinstance(b, Tensor) else "the trees differ"
    raise ValueError(f"combine: {what} at {path!r}; expected two halves made by partition")


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
        node = self.tree
        for name in self._names():
            node = _children(node).get(name, _ABSENT)
            if node is _ABSENT:
                known = list(paths(self.tree))
                near = difflib.get_close_matches(self.path, known, n=3, cutoff=0.3) or known[:5]
                raise KeyError(f"no path {self.path!r} in the tree; nearest are {_quoted(near)}")
        return node

    def set(self, value: Any) -> Tree:
        return self.apply(lambda _: value)

    def apply(self, f: Callable[[Any], Any]) -> Tree:
        return _replace(self.tree, self._names(), f)

    def _names(self) -> list[str]:
        return self.path.split(".") if self.path else []


_ABSENT = object()


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


def _replace(node: Tree, names: list[str], f: Callable[[Any], Any]) -> Tree:
    if not names:
        return f(node)
    values = [_replace(v, names[1:], f) if n == names[0] else v for n, v in _children(node).items()]
    if isinstance(node, dict):
        return type(node)(zip(node, values, strict=True))
    return type(node)(*values) if hasattr(node, "_fields") else type(node)(values)


def _children(node: Tree) -> dict[str, Any]:
    """The parts of one container by name; nothing for a leaf."""
    if isinstance(node, dict):
        return {str(k): v for k, v in node.items()}
    if isinstance(node, tuple | list):
        return {str(n): v for n, v in zip(getattr(node, "_fields", range(len(node))), node, strict=True)}
    return {}


def _path_name(keys: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def _quoted(names: Any, limit: int = 6) -> str:
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown or "nothing"
