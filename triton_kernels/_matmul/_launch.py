"""Runs the kernels: `product` turns two tensors of any strides into launches."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from triton_kernels._launch import INTERPRETED, needs_64_bit
from triton_kernels._matmul._configs import Config, choose

MAX_PROGRAMS = 2**31 - 1  # in the first dimension of a grid; the others hold only 65535
BATCH_DIMS = 3  # that the kernel steps through by itself
REDUCE_BLOCK = 1024


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    preactivation: bool = False,
    precision: str = "ieee",
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The activation of a (*batch, M, K) @ b (*batch, K, N) + bias (N,), as a contiguous (*batch, M, N) tensor.

    a, b: float32, float16 or bfloat16, the same; batch dimensions broadcast, any strides, nothing is copied.
    activation: "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu" (of slope negative_slope) or None.
    preactivation: return a pair, the second being what goes into the activation.
    precision: of float32 products, "ieee", "tf32" or "bf16x3"; sums are float32 in any case.
    config: the tiles; by default `choose` picks them.
    """
    batch_shape = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*batch_shape, a.shape[-2], b.shape[-1])
    out_dtype = out_dtype or a.dtype
    # The interpreter rounds to bfloat16 wrongly: there torch does it afterwards.
    rounds_later = INTERPRETED and out_dtype == torch.bfloat16
    out = a.new_empty(shape, dtype=torch.float32 if rounds_later else out_dtype)
    before = torch.empty_like(out) if preactivation else None
    if out.numel():
        operands = _Operands(a, b, batch_shape)
        if config is None:
            config = operands.choose(precision)
        with torch.cuda.device_of(a):
            if config.kernel == "persistent":
                _launch_persistent(operands, bias, out, before, activation, negative_slope, precision, config)
            else:
                _launch_pointer(operands, bias, out, before, activation, negative_slope, precision, config)
    if rounds_later:
        out, before = out.to(out_dtype), None if before is None else before.to(out_dtype)
    return out if before is None else (out, before)


def configuration(a: Tensor, b: Tensor, *, precision: str = "ieee") -> Config:
    """The configuration that `product` takes for these operands by itself."""
    return _Operands(a, b, torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])).choose(precision)


def fit_tma(a: Tensor, b: Tensor, precision: str) -> bool:
    """Whether the persistent kernels, which fetch blocks with the copy engine, take these operands."""
    return _Operands(a, b, torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])).fit_tma(precision)


class _Operands:
    """Two operands as sizes and strides, with as few batch dimensions as these strides allow."""

    def __init__(self, a: Tensor, b: Tensor, batch_shape: torch.Size):
        self.a, self.b = a, b
        self.m, self.k, self.n = a.shape[-2], a.shape[-1], b.shape[-1]
        a_strides, b_strides = a.expand(*batch_shape, -1, -1).stride(), b.expand(*batch_shape, -1, -1).stride()
        self.stride_am, self.stride_ak = a_strides[-2:]
        self.stride_bk, self.stride_bn = b_strides[-2:]
        self.batch_dims = coalesce(batch_shape, a_strides[:-2], b_strides[:-2])
        # One b for all: the batch is more rows of a.
        while self.batch_dims:
            size, stride_a, stride_b = self.batch_dims[-1]
            if stride_b != 0 or (self.m > 1 and stride_a != self.m * self.stride_am):
                break
            self.stride_am = stride_a if self.m == 1 else self.stride_am
            self.m *= size
            self.batch_dims.pop()
        self.batch = prod(size for size, _, _ in self.batch_dims)

    def choose(self, precision: str) -> Config:
        capability = _capability(self.a.device.index) if self.a.is_cuda else (9, 0)
        sizes = (self.m, self.n, self.k, self.batch, self.a.dtype, precision)
        return choose(*sizes, capability=capability, tma=self.fit_tma(precision))

    def fit_tma(self, precision: str) -> bool:
        """Whether the copy engine can fetch both operands, and the tensor cores take them as they come."""
        if self.batch_dims or not self.k or (self.a.dtype == torch.float32 and precision != "tf32"):
            return False
        if self.a.dtype == torch.float32:
            if not (self.stride_ak == 1 and self.stride_bk == 1):
                return False  # wgmma takes tf32 only where K is innermost
            if _triton_version() < (3, 7):
                return False  # takes more shared memory than there is, as the epilogue cannot be halved
        sides = ((self.a, self.stride_am, self.stride_ak), (self.b, self.stride_bk, self.stride_bn))
        return all(_aligned(tensor, *strides) for tensor, *strides in sides)

    def need_64_bit(self) -> bool:
        sizes, strides_a, strides_b = zip(*self.batch_dims, strict=True) if self.batch_dims else ((), (), ())
        return needs_64_bit(
            ((*sizes, self.m, self.k), (*strides_a, self.stride_am, self.stride_ak)),
            ((*sizes, self.k, self.n), (*strides_b, self.stride_bk, self.stride_bn)),
            ((self.batch * self.m * self.n,), (1,)),
            ((max(self.m, self.n, self.k),), (1,)),
        )


def coalesce(
    sizes: tuple[int, ...], strides_a: tuple[int, ...], strides_b: tuple[int, ...]
) -> list[tuple[int, int, int]]:
    """The batch dimensions as (size, stride of a, stride of b), without those of one element, neighbours that both
    operands step through as if they were one made into one."""
    dims: list[tuple[int, int, int]] = []
    for size, stride_a, stride_b in zip(sizes, strides_a, strides_b, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1:] == (size * stride_a, size * stride_b):
            size *= dims.pop()[0]
        dims.append((size, stride_a, stride_b))
    return dims


def _launch_pointer(
    operands: _Operands,
    bias: Tensor | None,
    out: Tensor,
    before: Tensor | None,
    activation: str | None,
    negative_slope: float,
    precision: str,
    config: Config,
) -> None:
    from triton_kernels._matmul._kernel import matmul_kernel, sum_split_k_kernel

    m, n, k = operands.m, operands.n, operands.k
    stride_bias = bias.stride(0) if bias is not None else 0
    index_64 = operands.need_64_bit()
    tiles = ceil(m / config.block_m) * ceil(n / config.block_n) * config.split_k

    def launch(batch_dims, a: Tensor, b: Tensor, out: Tensor, before: Tensor | None) -> None:
        batch = prod(size for size, _, _ in batch_dims)
        if batch_dims and (len(batch_dims) > BATCH_DIMS or tiles * batch > MAX_PROGRAMS):
            # Half of the outermost dimension at a time, until what is left fits a grid.
            (size, stride_a, stride_b), inner = batch_dims[0], batch_dims[1:]
            half = size // 2
            for start, stop in ((0, half), (half, size)):
                first, last = start * batch // size, stop * batch // size
                part = [(stop - start, stride_a, stride_b), *inner] if stop - start > 1 else inner
                launch(
                    part,
                    _from(a, start * stride_a),
                    _from(b, start * stride_b),
                    out[first:last],
                    None if before is None else before[first:last],
                )
            return

        sizes, strides_a, strides_b = zip(*[(1, 0, 0)] * (BATCH_DIMS - len(batch_dims)), *batch_dims, strict=True)
        target, split = out, config.split_k > 1
        if split:
            target = out.new_empty((config.split_k, out.numel()), dtype=torch.float32)
        wide = index_64 or target.numel() >= 2**31
        kernel: Any = matmul_kernel[(tiles * batch,)]
        kernel(
            a,
            b,
            None if split else bias,
            target,
            None if split else before,
            m,
            n,
            k,
            batch,
            sizes[1],
            sizes[2],
            *strides_a,
            operands.stride_am,
            operands.stride_ak,
            *strides_b,
            operands.stride_bk,
            operands.stride_bn,
            stride_bias,
            negative_slope,
            BLOCK_SIZE_M=config.block_m,
            BLOCK_SIZE_N=config.block_n,
            BLOCK_SIZE_K=config.block_k,
            GROUP_SIZE_M=config.group_m,
            SPLIT_K=config.split_k,
            EVEN_K=k % config.block_k == 0,
            PRECISION=_input_precision(a.dtype, precision),
            ACTIVATION=None if split else activation,
            INDEX_64=wide,
            UPCAST=INTERPRETED,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if split:
            kernel = sum_split_k_kernel[(ceil(out.numel() / REDUCE_BLOCK),)]
            kernel(
                target,
                bias,
                out,
                before,
                out.numel(),
                n,
                stride_bias,
                negative_slope,
                SPLIT_K=config.split_k,
                BLOCK_SIZE=REDUCE_BLOCK,
                ACTIVATION=activation,
                INDEX_64=wide,
            )

    matrices = (operands.batch, m, n)
    launch(
        operands.batch_dims,
        operands.a,
        operands.b,
        out.view(matrices),
        None if before is None else before.view(matrices),
    )


def _launch_persistent(
    operands: _Operands,
    bias: Tensor | None,
    out: Tensor,
    before: Tensor | None,
    activation: str | None,
    negative_slope: float,
    precision: str,
    config: Config,
) -> None:
    if not operands.fit_tma(precision):
        raise ValueError(
            f"{config} needs two matrices whose rows or columns are contiguous and 16-byte aligned (of float32: with "
            f'precision="tf32" and K innermost), got {tuple(operands.a.shape)} of strides {operands.a.stride()} @ '
            f"{tuple(operands.b.shape)} of strides {operands.b.stride()}, {operands.a.dtype}"
        )
    import triton

    from triton_kernels._matmul._hopper import persistent_matmul_kernel

    m, n = operands.m, operands.n
    a, b = operands.a, operands.b
    a_transposed, b_transposed = operands.stride_ak != 1, operands.stride_bn != 1
    tiles = ceil(m / config.block_m) * ceil(n / config.block_n)
    multiprocessors = _multiprocessors(a.device.index) if a.is_cuda else 2  # in the interpreter any number will do
    # The descriptors of the copy engine live in scratch memory that Triton asks its caller for.
    triton.set_allocator(lambda size, alignment, stream: a.new_empty(size, dtype=torch.int8))
    kernel: Any = persistent_matmul_kernel[(min(tiles, multiprocessors),)]
    kernel(
        a,
        b,
        bias,
        out,
        before,
        m,
        n,
        operands.k,
        operands.stride_ak if a_transposed else operands.stride_am,
        operands.stride_bn if b_transposed else operands.stride_bk,
        bias.stride(0) if bias is not None else 0,
        negative_slope,
        BLOCK_SIZE_M=config.block_m,
        BLOCK_SIZE_N=config.block_n,
        BLOCK_SIZE_K=config.block_k,
        GROUP_SIZE_M=config.group_m,
        NUM_PROGRAMS=multiprocessors,
        A_TRANSPOSED=a_transposed,
        B_TRANSPOSED=b_transposed,
        PRECISION=_input_precision(a.dtype, precision),
        ACTIVATION=activation,
        WARP_SPECIALIZE=config.warp_specialize,
        INDEX_64=operands.need_64_bit(),
        UPCAST=INTERPRETED,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _input_precision(dtype: torch.dtype, precision: str) -> str:
    """What `tl.dot` is told; the interpreter knows no "bf16x3", and computes all of them in float32."""
    return "ieee" if dtype != torch.float32 or INTERPRETED else precision


def _aligned(tensor: Tensor, *strides: int) -> bool:
    """Whether a matrix is contiguous along one dimension and its other stride, and its start, are of 16 bytes."""
    if 1 not in strides:
        return False
    other = strides[1] if strides[0] == 1 and strides[1] != 1 else strides[0]
    return tensor.data_ptr() % 16 == 0 and other > 0 and other * tensor.itemsize % 16 == 0


def _from(tensor: Tensor, offset: int) -> Tensor:
    """The tensor's memory from an offset on: the kernel knows its shape by itself."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + offset)


@cache
def _triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in version("triton").split(".")[:2])


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
