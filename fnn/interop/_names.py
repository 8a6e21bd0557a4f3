"""Names joined by dots, as in a `state_dict`, and the nested dicts that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of names split at the dots. Raises ValueError where one name is the beginning of another."""
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        parts = name.split(".")
        node = root
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or parts[-1] in node:
            other = next(n for n in leaves if n.startswith(f"{name}.") or name.startswith(f"{n}."))
            raise ValueError(f"{min(name, other)!r} and {max(name, other)!r} are both tensors")
        node[parts[-1]] = leaf
    return root
