"""Tile configurations, and the rule that picks one by size.

The tiles are those that the literature and Inductor's templates use on an H100. The rule is a roofline of one
multiprocessor, `cycles`; its constants come from data sheets, none was measured with these kernels. A table from a
tuner, which times `candidates`, is always better.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Literal

import torch

MULTIPROCESSORS = 132  # of an H100 SXM or H200


@dataclass(frozen=True)
class Config:
    """How one product is cut into tiles.

    kernel: "pointer" is `_kernel.matmul_kernel`, "persistent" is `_hopper.persistent_matmul_kernel`.
    group_m: rows of tiles that are computed together for the sake of L2. split_k: parts of K summed apart.
    warp_specialize: only for "persistent" with 4 warps, to which Triton adds those that fetch.
    """

    kernel: Literal["pointer", "persistent"]
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    split_k: int = 1
    warp_specialize: bool = False

    def __str__(self) -> str:
        tile = f"{self.kernel} {self.block_m}x{self.block_n}x{self.block_k}, {self.num_warps} warps"
        split = f", K in {self.split_k} parts" if self.split_k > 1 else ""
        return f"{tile}, {self.num_stages} stages{split}" + (", warp-specialised" if self.warp_specialize else "")


def _pointer(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    return Config("pointer", block_m, block_n, block_k, num_warps, num_stages)


def _persistent(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    return Config("persistent", block_m, block_n, block_k, num_warps, num_stages, warp_specialize=True)


HALF = [  # float16 and bfloat16
    _persistent(128, 256, 64, 4, 4),
    _persistent(256, 128, 64, 4, 4),
    _persistent(128, 128, 64, 4, 4),
    _persistent(128, 128, 128, 4, 3),
    _pointer(128, 256, 64, 8, 3),
    _pointer(256, 128, 64, 8, 3),
    _pointer(128, 128, 64, 8, 4),
    _pointer(128, 128, 64, 4, 4),
    _pointer(64, 256, 64, 4, 3),
    _pointer(64, 128, 64, 4, 4),
    _pointer(128, 64, 64, 4, 4),
    _pointer(64, 64, 64, 4, 5),
    _pointer(64, 32, 64, 4, 5),
    _pointer(32, 128, 64, 4, 4),
    _pointer(32, 64, 128, 4, 4),
    _pointer(16, 128, 128, 4, 4),
    _pointer(16, 64, 128, 4, 5),
    _pointer(128, 16, 128, 4, 4),
    _pointer(64, 16, 128, 4, 5),
]
TF32 = [  # float32 operands on tensor cores: tf32
    _persistent(128, 256, 32, 4, 3),
    _persistent(128, 128, 32, 4, 4),
    _pointer(128, 256, 32, 8, 3),
    _pointer(128, 128, 32, 8, 4),
    _pointer(64, 128, 32, 4, 4),
    _pointer(128, 64, 32, 4, 4),
    _pointer(64, 64, 32, 4, 5),
    _pointer(32, 64, 64, 4, 4),
    _pointer(16, 64, 64, 4, 5),
    _pointer(64, 16, 64, 4, 5),
]
BF16X3 = [  # float32 operands on tensor cores, each as a sum of bfloat16: the split takes registers
    _pointer(128, 128, 32, 8, 3),
    _pointer(64, 128, 32, 4, 3),
    _pointer(128, 64, 32, 4, 3),
    _pointer(64, 64, 32, 4, 4),
    _pointer(32, 64, 64, 4, 3),
    _pointer(16, 64, 64, 4, 4),
    _pointer(64, 16, 64, 4, 4),
]
IEEE = [  # float32 without tensor cores: accumulators and fragments of operands share the registers
    _pointer(128, 128, 16, 8, 3),
    _pointer(128, 64, 16, 4, 4),
    _pointer(64, 128, 16, 4, 4),
    _pointer(64, 64, 16, 4, 4),
    _pointer(64, 32, 32, 4, 4),
    _pointer(32, 64, 32, 4, 4),
    _pointer(32, 32, 32, 4, 4),
    _pointer(16, 64, 64, 4, 3),
    _pointer(64, 16, 64, 4, 3),
]
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def _with_splits(configs: list[Config]) -> list[Config]:
    splits = {config: SPLITS if config.kernel == "pointer" else (1,) for config in configs}
    return [replace(config, split_k=split) for config in configs for split in splits[config]]


CONFIGS = list(dict.fromkeys(_with_splits([*HALF, *TF32, *BF16X3, *IEEE])))
"""Every configuration that may be chosen."""


def of_dtype(dtype: torch.dtype, precision: str) -> list[Config]:
    """The tiles for operands of a dtype, without those that split K."""
    if dtype != torch.float32:
        return HALF
    return {"tf32": TF32, "bf16x3": BF16X3, "ieee": IEEE}[precision]


@lru_cache(maxsize=4096)
def choose(
    m: int,
    n: int,
    k: int,
    batch: int,
    dtype: torch.dtype,
    precision: str,
    *,
    capability: tuple[int, int] = (9, 0),
    tma: bool = False,
) -> Config:
    """The configuration for (batch, m, k) @ (batch, k, n): the one that `cycles` says is fastest, the first of equals.

    capability: of the CUDA device. tma: whether the copy engine can fetch both operands as they lie in memory.
    """
    configs = candidates(m, n, k, batch, dtype, precision, capability=capability, tma=tma)
    return min(configs, key=lambda config: cycles(config, m, n, k, batch, dtype, precision))


def candidates(
    m: int,
    n: int,
    k: int,
    batch: int,
    dtype: torch.dtype,
    precision: str,
    *,
    capability: tuple[int, int] = (9, 0),
    tma: bool = False,
) -> list[Config]:
    """The configurations worth timing for a size: those that fit the device and do not cut K finer than useful."""
    limit = shared_memory(capability)
    configs = []
    for config in of_dtype(dtype, precision):
        persistent = config.kernel == "persistent"
        if persistent and not (tma and batch == 1 and capability[0] == 9):
            continue
        if not persistent and _shared(config, dtype) > limit:
            continue
        tiles = ceil(m / config.block_m) * ceil(n / config.block_n) * batch
        for split in (1,) if persistent else SPLITS:
            # Parts of K pay only while some multiprocessor has no tile, and while each has a few steps to do.
            if split == 1 or (tiles * split <= 2 * MULTIPROCESSORS and k >= 4 * config.block_k * split):
                configs.append(replace(config, split_k=split))
    return configs


def cycles(config: Config, m: int, n: int, k: int, batch: int, dtype: torch.dtype, precision: str) -> float:
    """Clock cycles of the busiest multiprocessor, from the data sheet of an H100; unmeasured, only for comparison.

    Each step along K multiplies block_m x block_n numbers and fetches block_m + block_n, mostly at the same time.
    """
    kind = "half" if dtype != torch.float32 else precision
    products_per_cycle = {"half": 2048, "tf32": 1024, "bf16x3": 500, "ieee": 128}[kind]
    if kind == "ieee":  # the larger a thread's square of accumulators, the fewer loads per product
        side = (config.block_m * config.block_n / (32 * config.num_warps)) ** 0.5
        products_per_cycle /= 1 + 2 / side
    elif config.block_m < 64:
        products_per_cycle *= 0.6  # tiles this low take mma, not wgmma
    bytes_per_cycle = 48.0  # from L2
    start = 1500.0  # to fill the pipeline
    if config.kernel == "pointer":
        products_per_cycle *= 0.75  # 70-90 % of cuBLAS is what kernels without the copy engine are reported to reach
        finish = config.block_m * config.block_n / 32  # the epilogue
    else:
        products_per_cycle *= 0.95
        finish = config.block_m * config.block_n / 128  # overlaps with the next tile

    tiles = ceil(m / config.block_m) * ceil(n / config.block_n) * batch * config.split_k
    tiles_in_a_row = ceil(tiles / MULTIPROCESSORS)
    steps = ceil(ceil(k / config.block_k) / config.split_k) * config.block_k
    multiply = config.block_m * config.block_n / products_per_cycle
    fetch = (config.block_m + config.block_n) * dtype.itemsize / bytes_per_cycle
    step = max(multiply, fetch) + 0.25 * min(multiply, fetch)
    total = start + tiles_in_a_row * (finish + steps * step)
    if config.split_k > 1:
        partial_bytes = 2 * config.split_k * 4 * m * n * batch  # written, then read
        total += 4000.0 + partial_bytes / (MULTIPROCESSORS * bytes_per_cycle)  # a second launch
    return total


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a program may have."""
    kibibytes = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
    return kibibytes.get((capability[0], capability[1]), 99 if capability >= (8, 0) else 64) * 1024


def _shared(config: Config, dtype: torch.dtype) -> int:
    """Bytes of shared memory of the pointer kernel: the operands of every stage, or the tile on its way out."""
    stages = config.num_stages * (config.block_m + config.block_n) * config.block_k * dtype.itemsize
    return max(stages, config.block_m * config.block_n * 4)
