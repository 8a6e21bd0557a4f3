"""Unit vectors of a pytree, and matrices as pytrees: between a Jacobian's rows and the leaves they belong to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fnn import tree


def unit_vectors(like: Any, start: int, stop: int) -> Any:
    """Rows `start` to `stop` of the identity over all elements of a tree: leaves (stop - start, *leaf.shape).

    They do not depend on values, so under an outer `vmap` they are not batched: one identity serves all samples.
    """
    leaves, structure = tree.flatten(like)
    units, offset = [], 0
    for leaf in leaves:
        size = leaf.numel()
        rows = torch.arange(start - offset, stop - offset, device=leaf.device).unsqueeze(1)
        unit = (rows == torch.arange(size, device=leaf.device)).to(leaf.dtype)
        units.append(unit.reshape(stop - start, *leaf.shape))
        offset += size
    return tree.unflatten(structure, units)


def unravel_jacobian(matrix: Tensor, output: Any, input: Any) -> Any:
    """A Jacobian matrix as a pytree: for each leaf of the output the tree of the input, of shape out.shape + in.shape.

    matrix: (..., m, n), as `jacobian(f, flat=True)` gives it; leading axes stay in front. output, input: trees of
    tensors, also on the meta device, with m and n elements in all; only their structure, shapes and dtypes count.
    A block has the wider dtype of its two leaves.

    Raises ValueError for a matrix of other sizes.

    Example:
        >>> blocks = unravel_jacobian(torch.eye(3), torch.zeros(3), {"a": torch.zeros(2), "b": torch.zeros(())})
        >>> blocks["a"].shape, blocks["b"].shape
        (torch.Size([3, 2]), torch.Size([3]))
    """
    expected = (tree.size(output), tree.size(input))
    if tuple(matrix.shape[-2:]) != expected:
        raise ValueError(
            f"unravel_jacobian: expected a matrix (..., {expected[0]}, {expected[1]}), got {tuple(matrix.shape)}"
        )
    return from_columns([matrix], output, input, flat_input=True)


def from_columns(matrices: list[Tensor], output: Any, input: Any, flat_input: bool) -> Any:
    """Trees of blocks. matrices: one (..., m, size) for each leaf of the input, or one (..., m, n) for all of them."""
    in_leaves, in_structure = tree.flatten(input)
    out_leaves, out_structure = tree.flatten(output)
    if flat_input:
        matrices = list(matrices[0].split([leaf.numel() for leaf in in_leaves], dim=-1))
    rows, offset = [], 0
    for out in out_leaves:
        parts = [matrix.narrow(-2, offset, out.numel()) for matrix in matrices]
        blocks = [_block(part, out, leaf) for part, leaf in zip(parts, in_leaves, strict=True)]
        rows.append(tree.unflatten(in_structure, blocks))
        offset += out.numel()
    return tree.unflatten(out_structure, rows)


def from_rows(matrices: list[Tensor], output: Any, input: Any) -> Any:
    """Trees of blocks. matrices: one (..., size, n) for each leaf of the output."""
    in_leaves, in_structure = tree.flatten(input)
    out_leaves, out_structure = tree.flatten(output)
    sizes = [leaf.numel() for leaf in in_leaves]
    rows = []
    for out, matrix in zip(out_leaves, matrices, strict=True):
        parts = matrix.split(sizes, dim=-1)
        blocks = [_block(part, out, leaf) for part, leaf in zip(parts, in_leaves, strict=True)]
        rows.append(tree.unflatten(in_structure, blocks))
    return tree.unflatten(out_structure, rows)


def widest(*trees: Any) -> torch.dtype:
    """The dtype to which those of all leaves are promoted."""
    leaves = tree.leaves(trees)
    dtype = leaves[0].dtype
    for leaf in leaves[1:]:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def _block(part: Tensor, out: Tensor, leaf: Tensor) -> Tensor:
    shape = (*part.shape[:-2], *out.shape, *leaf.shape)
    assert math.prod(shape) == part.numel()
    return part.reshape(shape).to(torch.promote_types(out.dtype, leaf.dtype))
