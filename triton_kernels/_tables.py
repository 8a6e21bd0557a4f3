"""Tables of measurements: for which sizes a Triton kernel beats the library on a card, and with which configuration.

A table is a JSON file that `python -m triton_kernels.tune` writes on the card it is for; those in `tables/` come with
the package, `load_table` adds one of the user's. Nothing is measured while a program runs: the same call takes the same
kernel in every run, and what no table covers is left to the library.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

COVERED = 2.0  # an entry speaks for sizes within this factor of its own, each way


class Entry(NamedTuple):
    """One measured size."""

    sizes: tuple[int, ...]
    config: dict[str, Any] | None  # of the fastest Triton kernel; None where the library was at least as fast
    milliseconds: float | None
    library_milliseconds: float
    fastest: dict[str, Any] | None = None  # like config, but also where the library was as fast


_loaded: dict[tuple[str, str, str], list[Entry]] = {}  # (device, operation, kind) -> entries


def load_table(path: str | Path) -> str:
    """Adds a table written by `python -m triton_kernels.tune` and returns the name of its card.

    Its entries replace those of the same card, operation and kind. Call it before the first call to be compiled.
    """
    device, entries = _read(Path(path))
    _loaded.update(entries)
    nearest.cache_clear()
    return device


@cache
def nearest(device: str, operation: str, kind: str, sizes: tuple[int, ...]) -> Entry | None:
    """The entry whose sizes are nearest in ratio to `sizes`, if each is within `COVERED`; the first of equals."""
    if 0 in sizes:
        return None
    best, least = None, math.inf
    for entry in _loaded.get((device, operation, kind), ()):
        ratios = [abs(math.log2(size / own)) for size, own in zip(sizes, entry.sizes, strict=True)]
        if max(ratios) <= math.log2(COVERED) and sum(ratios) < least:
            best, least = entry, sum(ratios)
    return best


def any_loaded() -> bool:
    """Whether there is any table: without one, nothing is chosen but the library."""
    return bool(_loaded)


def covered(device: str) -> bool:
    """Whether any table is of this card."""
    return any(key[0] == device for key in _loaded)


def _read(path: Path) -> tuple[str, dict[tuple[str, str, str], list[Entry]]]:
    try:
        table = json.loads(path.read_text())
        device, entries = table["device"], {}
        for row in table["entries"]:
            times = row["milliseconds"], row["library_milliseconds"]
            entry = Entry(tuple(row["sizes"]), row["config"], *times, row.get("fastest", row["config"]))
            if not entry.sizes or not all(isinstance(size, int) and size > 0 for size in entry.sizes):
                raise ValueError(f"sizes must be positive integers, got {row['sizes']!r}")
            entries.setdefault((device, row["operation"], row["kind"]), []).append(entry)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of `python -m triton_kernels.tune`: {error!r}") from error
    return device, entries


for _path in sorted((Path(__file__).parent / "tables").glob("*.json")):
    _loaded.update(_read(_path)[1])
