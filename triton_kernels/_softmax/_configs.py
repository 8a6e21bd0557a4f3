"""Which tile a softmax or cross-entropy kernel works on: a rule by size, not a race.

Nobody has measured the thresholds here on a GPU. They come from what published kernels use (one row a program up to
32768 columns, as Liger and FlagGems) and from the H100 and H200 themselves: 132 multiprocessors, at most 16 bytes a
load and thread, lines of 128 bytes in sectors of 32, 65536 registers a multiprocessor.
"""

import dataclasses
from typing import Literal

MULTIPROCESSORS = 132
LINE_BYTES, SECTOR_BYTES = 128, 32
LANES = 32  # threads of a warp
VALUES_PER_LANE = 16  # in 16-bit types two loads of 16 bytes, in float32 four: enough bytes under way to hide latency
MAX_WARPS = 16  # leaves every thread 128 registers
SHORT_ROWS_TILE = 2048  # values of a program that takes many rows
FEW_ROWS_TILE = 512  # the same, where larger tiles would leave multiprocessors idle
ONLINE_TILE = 8192  # values of one step over rows too long for the registers
STAGES = 3  # blocks of such a row under way at once

# How many values a program may hold of rows that it reads twice, and of those it reads once; longer rows go by blocks.
REREAD_RESIDENT, ONCE_READ_RESIDENT = 32768, 8192


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A tile of rows x columns, and how many warps work on it.

    kind: "whole" where the tile holds entire rows, "online" where the program steps through them in blocks of columns.
    rows, columns: powers of two. stages: blocks of columns loaded ahead, 1 where there is one block.
    """

    kind: Literal["whole", "online"]
    rows: int
    columns: int
    warps: int
    stages: int


def reduction(
    outer: int,
    rows: int,
    columns: int,
    *,
    along_columns: bool,
    itemsize: int,
    tensors: int = 1,
    read_once: bool = False,
) -> Configuration:
    """The tile for reducing (outer, rows, columns) over its columns.

    along_columns: memory is read along the columns (rows lie apart), else along the rows.
    tensors: how many are read. read_once: the reduction is all, no second pass needs the values again.
    """
    resident = ONCE_READ_RESIDENT if read_once else REREAD_RESIDENT
    online_tile = ONLINE_TILE // tensors
    block = power_of_two(columns)
    if along_columns:
        rows_of_tile = 1 if block > SHORT_ROWS_TILE else rows_along_columns(outer * rows, rows, block)
    else:
        rows_of_tile = rows_along_rows(outer, rows, block, itemsize)
        resident = min(resident, ONLINE_TILE)
    if rows_of_tile * block * tensors <= resident:
        return Configuration("whole", rows_of_tile, block, warps(rows_of_tile * block), stages=1)
    return Configuration("online", rows_of_tile, online_tile // rows_of_tile, warps(online_tile), STAGES)


def elementwise(rows: int, columns: int, *, along_columns: bool, itemsize: int) -> Configuration:
    """The tile for a pass over (rows, columns) in which no value depends on another."""
    tile = SHORT_ROWS_TILE if rows * columns >= 2 * MULTIPROCESSORS * SHORT_ROWS_TILE else FEW_ROWS_TILE
    if along_columns:
        columns_of_tile = min(power_of_two(columns), tile)
        rows_of_tile = min(power_of_two(rows), tile // columns_of_tile)
    else:
        rows_of_tile = min(power_of_two(rows), LINE_BYTES // itemsize)
        columns_of_tile = min(power_of_two(columns), tile // rows_of_tile)
    return Configuration("whole", rows_of_tile, columns_of_tile, warps(rows_of_tile * columns_of_tile), stages=1)


def rows_along_columns(total_rows: int, rows: int, block: int) -> int:
    tile = SHORT_ROWS_TILE if total_rows * block >= 2 * MULTIPROCESSORS * SHORT_ROWS_TILE else FEW_ROWS_TILE
    return max(1, min(power_of_two(rows), tile // block))


def rows_along_rows(outer: int, rows: int, block: int, itemsize: int) -> int:
    """A line of neighbouring rows, or a sector where lines would leave multiprocessors idle; more if rows are short."""
    line = LINE_BYTES // itemsize
    if outer * -(-rows // line) < MULTIPROCESSORS:
        line, tile = SECTOR_BYTES // itemsize, FEW_ROWS_TILE
    else:
        tile = SHORT_ROWS_TILE
    return min(power_of_two(rows), max(line, tile // block))


def warps(tile: int) -> int:
    return max(1, min(MAX_WARPS, tile // (LANES * VALUES_PER_LANE)))


def power_of_two(size: int) -> int:
    """The least power of two that is not below size."""
    return 1 << max(0, size - 1).bit_length()
