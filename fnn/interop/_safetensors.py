"""Trees of tensors in safetensors files: written whole or not at all, and read back as the same tree.

A leaf is stored under its path, such as ``"0.weight"``. The format itself keeps neither order nor nesting,
so the tree's outline goes into the file's metadata as JSON: a leaf is ``null``, a container is
``{"dict": [[key, child], ...]}``, ``{"list": [child, ...]}`` or ``{"tuple": [child, ...]}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fnn import _ranks
from fnn._files import check_readable, independent, replace_file
from fnn._placement import check_same_leaves, whole
from fnn._ranks import everywhere
from fnn.interop._names import nest
from fnn.tree import pytree

Tree = Any
Outline = Any

OUTLINE = "fnn.tree"


def save_safetensors(tree: Tree, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a tree of tensors into one safetensors file, names joined by dots.

    tree: dicts, lists, tuples, NamedTuples and registered classes such as `TrainState`, nested in any way, empty
        ones too; the leaves are tensors of any shape, strides and device. Leaves that share memory are stored
        once each, and come back apart.
    path: the file. It is written under a temporary name beside it, flushed to disk, then renamed, so an
        interrupted save leaves the file that was there before as it was.
    metadata: strings by name for the file's header; `safetensors.safe_open(path, "pt").metadata()` reads them.

    `load_safetensors` says what comes back. Raises `TypeError` or `ValueError` that name the path for a leaf
    that is no tensor, holds no data or has a dtype the format lacks, for a key that is not a string or is empty,
    and for two leaves of one path, as of ``{"a.b": x, "a": {"b": y}}``; `OSError` that names the file where it
    cannot be written. ``save_safetensors(to_state_dict(params, state), path)`` writes torch's own names.

    In a run of several processes each of them has to call this, with the same tree. Rank 0 writes, and what it raises
    is raised on all. Leaves that are parted over processes (`DTensor`) are stored whole, gathered one after the other.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> save_safetensors({"1": {"weight": torch.ones(2)}, "0": (torch.zeros(()),)}, path)
        >>> load_safetensors(path)
        {'1': {'weight': tensor([1., 1.])}, '0': (tensor(0.),)}

    Source: https://github.com/huggingface/safetensors
    """
    who = "save_safetensors"
    leaves, header = everywhere(who, lambda: _flat(tree, metadata))
    check_same_leaves(who, leaves, "give every process the same tree")
    stored: dict[str, Tensor] = {}
    for name, leaf in leaves.items():
        gathered = whole(leaf.detach())
        if _ranks.rank() == 0:
            stored[name] = gathered.cpu().resolve_conj().resolve_neg().contiguous()
    _ranks.on_main(who, lambda: _write(stored, header, path))


def load_safetensors(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Tree:
    """Read the tree that `save_safetensors` wrote: the same nesting, the same order, the same bits.

    Dicts of every kind come back as dicts, lists as lists, tuples as tuples. A file cannot recreate other types: a
    NamedTuple or a `TrainState` comes back as a dict of its fields, with the paths and the leaf order it had, so
    ``tree.unflatten(tree.flatten(like)[1], tree.leaves(loaded))`` puts the leaves into the containers of `like`.
    A file that another program wrote comes back as nested dicts, split at the dots.

    device: where the tensors go, the CPU by default. They own their memory and need no gradient.

    Raises errors that name the file: `OSError` where it is missing or may not be read, and `ValueError` where it is
    damaged, cut short, not safetensors, or has names that cannot be nested, such as both ``a`` and ``a.b``.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> save_safetensors([torch.arange(3), {}], path)
        >>> load_safetensors(path, device="cpu")
        [tensor([0, 1, 2]), {}]
    """
    device = torch.device("cpu" if device is None else device)
    path = check_readable("load_safetensors", path)
    leaves, header = _read(path, device)
    if OUTLINE not in header:
        return _nest(leaves, path)
    try:
        # Not every JSON text is an outline, and a header can be edited: what does not fit is damage.
        tree, names = _put_together(json.loads(header[OUTLINE]), leaves)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise _damaged(path, f"the tree recorded in its header does not fit its tensors: {error}") from error
    if extra := leaves.keys() - names:
        raise _damaged(path, f"it has tensors that the tree recorded in its header lacks: {sorted(extra)}")
    return tree


def _flat(tree: Tree, metadata: Mapping[str, str] | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The leaves of a tree by path, and the header that goes with them."""
    leaves: dict[str, Tensor] = {}
    outline = _take_apart(tree, "", leaves)
    header = _header(metadata)
    header[OUTLINE] = json.dumps(outline, separators=(",", ":"))
    return leaves, header


def _write(leaves: dict[str, Tensor], header: dict[str, str], path: str | os.PathLike[str]) -> None:
    apart = independent(leaves)
    replace_file(
        "save_safetensors",
        path,
        lambda temporary: save_file(apart, temporary, header),
        (OSError, SafetensorError),
    )


def _take_apart(node: Tree, path: str, leaves: dict[str, Tensor]) -> Outline:
    """Collect the leaves of `node` by path, in order, and return its outline."""
    if isinstance(node, Tensor):
        if path in leaves:
            raise ValueError(
                f"save_safetensors: two leaves have the path {path!r}: a dot in a key stands for a key in a dict of "
                f"its own; rename one"
            )
        _check_storable(node, path)
        leaves[path] = node
        return None
    if type(node) in (list, tuple):
        kind = "list" if type(node) is list else "tuple"
        return {kind: [_take_apart(child, _join(path, str(n)), leaves) for n, child in enumerate(node)]}
    if (parts := _parts(node)) is not None:
        checked = [(_checked_key(key, path), child) for key, child in parts]
        return {"dict": [[key, _take_apart(child, _join(path, key), leaves)] for key, child in checked]}
    raise TypeError(
        f"save_safetensors: {_place(path)} is {type(node).__name__}, expected a tensor, dict, list, tuple or "
        f"NamedTuple; turn numbers and arrays into tensors with torch.as_tensor, and put text into metadata="
    )


def _parts(node: Tree) -> list[tuple[Any, Tree]] | None:
    """The (key, child) pairs of a dict, a NamedTuple or a class registered as a pytree; None for anything else."""
    parts, _ = pytree.tree_flatten_with_path(node, is_leaf=lambda part: part is not node)
    if any(not keys for keys, _ in parts):  # one part without a key is the node itself: a leaf
        return None
    return [(_name(keys[0]), child) for keys, child in parts]


def _name(key: Any) -> Any:
    """A dict's own key, of whatever type; the name of a field; the position in any other sequence."""
    return key.key if hasattr(key, "key") else key.name if hasattr(key, "name") else str(key.idx)


def _checked_key(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise TypeError(
            f"save_safetensors: key {key!r} of {_place(path)} is {type(key).__name__}, expected a string; "
            f"rename it, for example to {str(key)!r}"
        )
    if not key or _join(path, key) == "__metadata__":
        raise ValueError(
            f"save_safetensors: key {key!r} of {_place(path)} cannot be part of a name: an empty one is none, "
            f"and __metadata__ belongs to the format; rename it"
        )
    return key


def _check_storable(leaf: Tensor, path: str) -> None:
    if leaf.is_meta:
        raise ValueError(f"save_safetensors: {_place(path)} is on the meta device and has no data to save")
    if leaf.layout is not torch.strided:
        raise TypeError(f"save_safetensors: {_place(path)} has layout {leaf.layout}; make it dense with .to_dense()")
    if leaf.dtype in (torch.complex32, torch.complex128) or leaf.is_quantized:
        raise TypeError(
            f"save_safetensors: {_place(path)} has dtype {leaf.dtype}, which the format lacks; "
            f"save torch.view_as_real of a complex tensor, .dequantize() of a quantized one"
        )


def _header(metadata: Mapping[str, str] | None) -> dict[str, str]:
    header = {"format": "pt"}  # Transformers refuses files whose header does not say so
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(
                f"save_safetensors: metadata {key!r}: {value!r} is {type(key).__name__}: {type(value).__name__}, "
                f"expected strings; json.dumps turns other values into one"
            )
        if key == OUTLINE:
            raise ValueError(f"save_safetensors: metadata key {OUTLINE!r} holds the tree itself; choose another")
        header[key] = value
    return header


def _read(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: the reader's tensors lie in the mapped file, at odd addresses, and change when it is overwritten.
            leaves = {name: file.get_tensor(name).to(device, copy=True) for name in _stored_order(file)}
            return leaves, file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise OSError(f"load_safetensors: cannot read {path}: {error}") from error


def _stored_order(file: Any) -> Iterable[str]:
    """Names as they lie in the file, where the reader tells (safetensors >= 0.6); sorted otherwise."""
    return file.offset_keys() if hasattr(file, "offset_keys") else sorted(file.keys())


def _nest(leaves: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Nested dicts of names split at the dots: what a file without our outline gives."""
    try:
        return nest(leaves)
    except ValueError as error:
        raise ValueError(
            f"load_safetensors: {path} cannot be nested: {error}; read it flat with safetensors.torch.load_file"
        ) from error


def _put_together(outline: Outline, leaves: dict[str, Tensor]) -> tuple[Tree, set[str]]:
    """The tree of that outline, and the names of the leaves that it took."""
    names: set[str] = set()

    def build(node: Outline, path: str) -> Tree:
        if node is None:
            names.add(path)
            return leaves[path]
        ((kind, parts),) = node.items()
        if kind == "dict":
            return {key: build(child, _join(path, key)) for key, child in parts}
        items: Iterator[Tree] = (build(child, _join(path, str(n))) for n, child in enumerate(parts))
        return {"list": list, "tuple": tuple}[kind](items)

    return build(outline, ""), names


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"load_safetensors: {path} is damaged, cut short or no safetensors file ({reason}); "
        f"take another copy, or write it again with save_safetensors"
    )


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _place(path: str) -> str:
    return f"leaf {path!r}" if path else "the tree itself"
