"""What becomes of the softmax and cross-entropy kernels on Hopper: every tile of the rule, compiled without a GPU."""

import functools
import pathlib
import re
import subprocess

import pytest
import torch
import triton
from compiler import SLACK, hopper

from triton_kernels._cross_entropy import _kernel as cross_entropy_kernels
from triton_kernels._softmax import _configs
from triton_kernels._softmax import _kernel as softmax_kernels

CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = [2**power for power in range(19)]
ROWS = [(1, 1), (1, 7), (1, 64), (1, 4096), (1, 2**20), (64, 64), (4096, 16)]  # (outer, rows)

# What each kernel is compiled for beside its tile, and how the rule is asked for that.
KERNELS = {
    "softmax": (softmax_kernels.softmax_kernel, {"LOG": False}, {}),
    "log_softmax": (softmax_kernels.softmax_kernel, {"LOG": True}, {}),
    "softmax_backward": (softmax_kernels.softmax_backward_kernel, {"LOG": False}, {"tensors": 2}),
    "log_softmax_backward": (softmax_kernels.softmax_backward_kernel, {"LOG": True}, {"tensors": 2}),
    "cross_entropy": (cross_entropy_kernels.cross_entropy_kernel, {"SMOOTHED": False}, {"read_once": True}),
    "cross_entropy_smoothed": (cross_entropy_kernels.cross_entropy_kernel, {"SMOOTHED": True}, {"read_once": True}),
    "cross_entropy_backward": (
        cross_entropy_kernels.cross_entropy_backward_kernel,
        {"SMOOTHED": True, "HAS_GRAD_LOSSES": True, "HAS_GRAD_LOG_TOTALS": True},
        None,
    ),
}


def chosen(name: str, dtype: str, along_columns: bool, rows: tuple[int, int], columns: int) -> _configs.Configuration:
    """What the rule returns for (outer, rows) x columns."""
    layout = {"along_columns": along_columns, "itemsize": TYPES[dtype].itemsize}
    options = KERNELS[name][2]
    if options is None:
        return _configs.elementwise(rows[0] * rows[1], columns, **layout)
    return _configs.reduction(*rows, columns, **layout, **options)


@functools.cache
def compiled(name: str, dtype: str, along_columns: bool, config: _configs.Configuration, index_64: bool = False):
    """The kernel for tensors whose strides are 1 along columns or along rows and else divisible by 16."""
    kernel, constants, _ = KERNELS[name]
    tile = {"ROWS": config.rows, "COLUMNS": config.columns, "STAGES": config.stages}
    flags = {"ONLINE": config.kind == "online", "INDEX_64": index_64}
    constants = constants | {key: value for key, value in (tile | flags).items() if key in kernel.arg_names}
    unit_stride = "stride_column" if along_columns else "stride_row"
    constants |= {argument: 1 for argument in kernel.arg_names if argument.endswith(unit_stride)}

    def type_of(argument):
        if argument in constants:
            return "constexpr"
        if argument.endswith("_ptr"):
            own = {"labels_ptr": "i64"} | {
                key: "fp32" for key in kernel.arg_names if re.search("loss|normal|total", key)
            }
            return "*" + own.get(argument, dtype)
        return "fp32" if argument == "label_smoothing" else "i32"

    signature = {argument: type_of(argument) for argument in kernel.arg_names}
    aligned = [key for key in signature if "ptr" in key or "stride" in key or key in ("rows", "columns")]
    aligned = [key for key in aligned if key not in constants]
    return hopper(kernel, signature, constants, aligned, num_warps=config.warps)


def resources(program, folder: pathlib.Path) -> dict[str, int]:
    """What one thread takes: REG, STACK, LOCAL."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(program.asm["cubin"])
    dump = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump.stdout)}


def check_no_spills(name, dtype, along_columns, config, folder):
    program = compiled(name, dtype, along_columns, config)
    used = resources(program, folder)
    # 8 bytes, two registers, are what smoothed cross-entropy along rows needs in one tile; no other spills at all.
    allowed = 8 if name == "cross_entropy_smoothed" and not along_columns else 0
    assert used["STACK"] <= allowed + SLACK, (config, used)
    assert used["LOCAL"] == 0, (config, used)
    assert used["REG"] * 32 * config.warps <= 65536
    assert program.metadata.shared <= 227 * 1024 // 2, "two programs should fit a multiprocessor"


@pytest.mark.parametrize("along_columns", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_usual_sizes_compile_without_spills(name, dtype, along_columns, tmp_path):
    for columns in (1024, 16384, 131072):
        check_no_spills(name, dtype, along_columns, chosen(name, dtype, along_columns, (1, 4096), columns), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("along_columns", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_every_configuration_compiles_without_spills(name, dtype, along_columns, tmp_path):
    found = [chosen(name, dtype, along_columns, rows, columns) for rows in ROWS for columns in COLUMNS]
    for config in dict.fromkeys(found):
        check_no_spills(name, dtype, along_columns, config, tmp_path)


@pytest.mark.parametrize("columns", [1024, 16384, 131072])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_contiguous_rows_are_read_16_bytes_at_a_time(name, dtype, columns):
    config = chosen(name, dtype, True, (1, 4096), columns)
    ptx = compiled(name, dtype, True, config).asm["ptx"]
    if config.kind == "whole":
        assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", ptx)
    else:  # copied ahead into shared memory
        assert re.search(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", ptx)
    if name not in ("cross_entropy", "cross_entropy_smoothed"):
        assert re.search(r"st\.global(\.\w+)*\.v4\.b32", ptx)


@pytest.mark.parametrize("dtype", TYPES)
def test_other_dimensions_are_read_16_bytes_at_a_time_along_the_rows(dtype):
    for columns in (64, 4096):
        config = chosen("softmax", dtype, False, (64, 4096), columns)
        ptx = compiled("softmax", dtype, False, config).asm["ptx"]
        vector = (
            r"ld\.global(\.\w+)*\.v4\.b32" if config.kind == "whole" else r"cp\.async\.cg\.shared\.global[^;]*, 0x10"
        )
        assert re.search(vector, ptx)


@pytest.mark.parametrize("columns", [64, 131072])
@pytest.mark.parametrize("name", KERNELS)
def test_offsets_have_64_bits_where_asked_and_only_there(name, columns):
    config = chosen(name, "fp32", False, (1, 4096), columns)

    def strides_multiplied(index_64):
        """The types in which tensors of indices are multiplied by a stride."""
        ttir = compiled(name, "fp32", False, config, index_64).asm["ttir"]
        return set(re.findall(r"arith\.muli [^\n]*: tensor<(?:\d+x)+(i\d+)>", ttir))

    assert strides_multiplied(True) == {"i64"}
    # A label is 64 bits wide anyway.
    assert strides_multiplied(False) == (
        {"i32", "i64"} if name in ("cross_entropy", "cross_entropy_smoothed") else {"i32"}
    )


def test_the_rule_covers_what_it_should():
    """Tiles hold a power of two of values, cover short rows whole, and never step through a row in tiny blocks."""
    for along_columns in (True, False):
        for itemsize in (2, 4):
            for outer, rows in ROWS:
                for columns in (1, 2, 3, 63, 64, 65, 1000, 4095, 32768, 32769, 262144):
                    for options in ({}, {"tensors": 2}, {"read_once": True}):
                        layout = {"along_columns": along_columns, "itemsize": itemsize}
                        config = _configs.reduction(outer, rows, columns, **layout, **options)
                        assert (config.kind == "whole") == (config.columns >= columns)
                        assert config.columns >= min(columns, 64)
                        assert config.rows < 2 * rows
                        assert 1 <= config.warps <= 16
