"""Every tile of the product compiles for a Hopper GPU into the instructions it is meant for; none of it is run."""

import re
import subprocess
from itertools import product as combinations
from pathlib import Path

import pytest
import torch
import triton
from compiler import SLACK, hopper

from triton_kernels._matmul._configs import BF16X3, CONFIGS, HALF, IEEE, TF32, Config, candidates, choose, shared_memory
from triton_kernels._matmul._hopper import persistent_matmul_kernel
from triton_kernels._matmul._kernel import matmul_kernel, sum_split_k_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KINDS = {
    "bf16": (HALF, torch.bfloat16, "ieee"),
    "tf32": (TF32, torch.float32, "tf32"),
    "bf16x3": (BF16X3, torch.float32, "bf16x3"),
    "ieee": (IEEE, torch.float32, "ieee"),
}
TILES = [pytest.param(kind, tile, id=f"{kind} {tile}") for kind in KINDS for tile in KINDS[kind][0]]
SIZES = [
    *[(size,) * 3 for size in (1, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)],
    *[(m, 4096, 4096) for m in (1, 4, 16, 32, 64, 128, 256)],
    *[(256, 512, 784), (64, 10, 784), (65536, 1024, 1024), (8192, 16, 4096), (128, 128, 65536), (4096, 50257, 768)],
]


def _compile(
    tile: Config,
    kind: str,
    *,
    a_transposed: bool = False,
    b_transposed: bool = True,
    activation: str | None = "gelu",
    index_64: bool = False,
    even: bool = True,
    ones: tuple[str, ...] = (),
    runtime: tuple[str, ...] = (),
    types: dict[str, str] | None = None,
):
    """The tile's kernel for aligned matrices, with all that an epilogue can have.

    ones: further arguments that are 1, which Triton compiles as constants. runtime: constants that are to be none.
    types: of arguments, other than usual.
    """
    element = {"bf16": "bf16", "fp16": "fp16"}.get(kind, "fp32")
    persistent = tile.kernel == "persistent"
    kernel = persistent_matmul_kernel if persistent else matmul_kernel
    constants: dict[str, object] = {
        "stride_bias": 1,
        "BLOCK_SIZE_M": tile.block_m,
        "BLOCK_SIZE_N": tile.block_n,
        "BLOCK_SIZE_K": tile.block_k,
        "GROUP_SIZE_M": tile.group_m,
        "PRECISION": kind if kind in ("tf32", "bf16x3") else "ieee",
        "ACTIVATION": activation,
        "INDEX_64": index_64,
        "UPCAST": False,
    }
    if persistent:
        constants |= {"NUM_PROGRAMS": 132, "A_TRANSPOSED": a_transposed, "B_TRANSPOSED": b_transposed}
        constants |= {"WARP_SPECIALIZE": tile.warp_specialize}
    else:
        constants |= {"SPLIT_K": tile.split_k, "EVEN_K": even, "batch_size": 1, "batch_size_1": 1, "batch_size_2": 1}
        constants |= {f"stride_{operand}{i}": 0 for operand in "ab" for i in range(3)}
        constants |= {"stride_am" if a_transposed else "stride_ak": 1, "stride_bk" if b_transposed else "stride_bn": 1}
        if tile.split_k > 1:
            constants |= {"bias_ptr": None, "preactivation_ptr": None, "ACTIVATION": None}
    constants = {name: value for name, value in constants.items() if name not in runtime} | dict.fromkeys(ones, 1)
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "bias_ptr", "c_ptr", "preactivation_ptr"), f"*{element}")
    types = pointers | {"negative_slope": "fp32"} | ({"c_ptr": "*fp32"} if tile.split_k > 1 else {}) | (types or {})
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if name not in constants and name != "negative_slope"]
    return hopper(kernel, signature, constants, aligned, num_warps=tile.num_warps, num_stages=tile.num_stages)


def _spilled_bytes(kernel, folder: Path) -> int:
    """The stack and local memory that a thread takes, which holds what does not fit its registers."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(re.search(rf"{memory}:(\d+)", usage)[1]) for memory in ("STACK", "LOCAL"))


def _check(kernel, kind: str, tile: Config, folder: Path, *, spill: int = 0) -> None:
    ptx = kernel.asm["ptx"]
    assert kernel.metadata.shared <= shared_memory((9, 0))
    assert ("wgmma" in ptx) == (kind != "ieee" and tile.block_m >= 64)
    assert ("mma" in ptx) == (kind != "ieee")
    assert ("cp.async.bulk.tensor" in ptx) == (tile.kernel == "persistent")
    assert ("setmaxnreg" in ptx) == tile.warp_specialize
    assert _spilled_bytes(kernel, folder) <= spill + SLACK


@pytest.mark.parametrize(("kind", "tile"), TILES)
def test_tiles(kind, tile, tmp_path):
    _check(_compile(tile, kind), kind, tile, tmp_path)


@pytest.mark.parametrize(("a_transposed", "b_transposed"), list(combinations([False, True], repeat=2)))
@pytest.mark.parametrize("tile", [HALF[0], Config("pointer", 128, 128, 64, 8, 4)], ids=str)
def test_layouts(tile, a_transposed, b_transposed, tmp_path):
    """Operands that are aligned reach shared memory 16 bytes at a time however they lie."""
    kind = "fp16" if a_transposed else "bf16"
    kernel = _compile(tile, kind, a_transposed=a_transposed, b_transposed=b_transposed)
    _check(kernel, kind, tile, tmp_path)
    if tile.kernel == "pointer":
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", kernel.asm["ptx"])
        assert set(copies) == {"0x10"}


POINTER = Config("pointer", 64, 64, 64, 4, 5)
BATCH = ("batch_size", "batch_size_1", "batch_size_2", *(f"stride_{operand}{i}" for operand in "ab" for i in range(3)))


@pytest.mark.parametrize("ones", ["M", "N", "K", "MN", "MNK"])
@pytest.mark.parametrize("tile", [POINTER, Config(**{**vars(POINTER), "split_k": 2}), HALF[2]], ids=str)
def test_sizes_of_one(tile, ones, tmp_path):
    """Triton makes an argument of 1 a constant of the kernel: each size may be one."""
    kernel = _compile(tile, "bf16", ones=tuple(ones), index_64=len(ones) > 1, even="K" not in ones)
    _check(kernel, "bf16", tile, tmp_path, spill=128)


@pytest.mark.parametrize("wide", [False, True])
def test_batch_dimensions(wide, tmp_path):
    types = dict.fromkeys([*BATCH[3:], "stride_am", "stride_bn"], "i64" if wide else "i32")
    kernel = _compile(POINTER, "bf16", runtime=BATCH, types=types, index_64=wide)
    _check(kernel, "bf16", POINTER, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tile"), TILES)
def test_every_layout_and_activation(kind, tile, tmp_path):
    """Also with K split or ragged, and with 64-bit offsets, which take more registers."""
    # Of three of these kernels ptxas sets two registers aside, outside of the inner loop.
    spill = 8
    for a_transposed, b_transposed in combinations([False, True], repeat=2):
        if kind == "tf32" and tile.kernel == "persistent" and (a_transposed or not b_transposed):
            continue  # never launched: wgmma takes tf32 only where K is innermost
        kernel = _compile(tile, kind, a_transposed=a_transposed, b_transposed=b_transposed, activation=None)
        _check(kernel, kind, tile, tmp_path, spill=spill)
    for activation in ("relu", "silu", "tanh", "sigmoid", "leaky_relu"):
        _check(_compile(tile, kind, activation=activation), kind, tile, tmp_path, spill=spill)
    _check(_compile(tile, kind, index_64=True), kind, tile, tmp_path, spill=256)
    if tile.kernel == "pointer":
        _check(_compile(tile, kind, even=False), kind, tile, tmp_path, spill=spill)
        for split_k in (2, 32):
            split = Config(**{**vars(tile), "split_k": split_k})
            _check(_compile(split, kind), kind, split, tmp_path, spill=spill)


@pytest.mark.parametrize("tile", [HALF[0], Config("pointer", 128, 128, 64, 8, 4)], ids=str)
def test_64_bit_offsets(tile):
    """Products of an index and a stride, and of the index of a program and a size, are made in 64 bits."""
    narrow, wide = (_compile(tile, "bf16", index_64=index_64).asm["ttir"] for index_64 in (False, True))
    scalars, tensors = r"arith\.muli [^:]*: i{}\b", r"arith\.muli [^:]*: tensor<[^>]*xi{}>"
    for products in (scalars, tensors):
        assert not re.search(products.format(64), narrow)
    assert re.search(tensors.format(64), wide)
    if tile.kernel == "pointer":  # the copy engine counts rows and columns, not elements
        assert re.search(scalars.format(64), wide)
        assert not re.search(tensors.format(32), wide)


@pytest.mark.parametrize("index_64", [False, True])
def test_split_k(index_64, tmp_path):
    split = Config("pointer", 64, 64, 64, 4, 5, split_k=4)
    kernel = _compile(split, "bf16", index_64=index_64)
    _check(kernel, "bf16", split, tmp_path)
    assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"])

    constants = {"stride_bias": 1, "SPLIT_K": 4, "BLOCK_SIZE": 1024, "ACTIVATION": "gelu", "INDEX_64": index_64}
    types = {"partial_ptr": "*fp32", "bias_ptr": "*bf16", "c_ptr": "*bf16", "preactivation_ptr": "*bf16"}
    names = sum_split_k_kernel.arg_names
    types |= {"size": "i32", "N": "i32", "negative_slope": "fp32"}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [name for name in types if name != "negative_slope"]
    kernel = hopper(sum_split_k_kernel, signature, constants, aligned, num_warps=4)
    assert _spilled_bytes(kernel, tmp_path) <= SLACK
    assert "ld.global.v4" in kernel.asm["ptx"]


def test_choices_are_configurations():
    """What is chosen is in `CONFIGS`, so that it was compiled here, and is always the same."""
    configs = set(CONFIGS)
    for kind, (m, n, k), batch, tma in combinations(KINDS, SIZES, (1, 16), (False, True)):
        _, dtype, precision = KINDS[kind]
        options = {"tma": tma}
        chosen = choose(m, n, k, batch, dtype, precision, **options)
        tried = candidates(m, n, k, batch, dtype, precision, **options)
        assert chosen in tried
        assert set(tried) <= configs
        choose.cache_clear()
        assert chosen == choose(m, n, k, batch, dtype, precision, **options)
        assert chosen.kernel == "pointer" or (tma and batch == 1)


def test_choices_suit_their_sizes():
    def half(m, n, k, **options):
        return choose(m, n, k, 1, torch.bfloat16, "ieee", **options)

    assert half(8192, 8192, 8192, tma=True).warp_specialize
    assert half(8192, 8192, 8192).kernel == "pointer"
    assert half(8192, 8192, 8192, tma=True, capability=(8, 0)).kernel == "pointer"
    assert half(1, 4096, 4096).block_m == 16
    assert half(4096, 8, 4096).block_n == 16
    assert half(128, 128, 65536).split_k > 4
    assert half(4096, 4096, 4096).split_k == 1
    for capability in ((8, 0), (8, 6), (8, 9), (12, 0)):
        limit = shared_memory(capability)
        for tile in candidates(512, 512, 512, 1, torch.bfloat16, "ieee", capability=capability):
            assert tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k * 2 <= limit


def test_names():
    assert str(HALF[0]) == "persistent 128x256x64, 4 warps, 4 stages, warp-specialised"
    assert str(Config("pointer", 64, 64, 32, 4, 3, split_k=2)) == "pointer 64x64x32, 4 warps, 3 stages, K in 2 parts"
