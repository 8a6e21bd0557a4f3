"""Along which axis a leaf is parted among processes."""

from __future__ import annotations

from collections.abc import Sequence


def sharded_axis(shape: Sequence[int], count: int, path: str = "") -> int | None:
    """The longest axis that `count` divides, the first of equals; None where there is none, such a leaf stays whole.

    path: the leaf's path; each "*" in it is a stack of copies, whose axes, the first ones, are not parted.
    """
    found = None
    for axis in range(path.split(".").count("*"), len(shape)):
        divides = shape[axis] > 0 and shape[axis] % count == 0
        if divides and (found is None or shape[axis] > shape[found]):
            found = axis
    return found
