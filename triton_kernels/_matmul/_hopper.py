"""`activation(a @ b + bias)` for Hopper: programs that stay on their SM, operands fetched by the copy engine (TMA)."""

# Triton types a list of strides as tensors, but takes numbers too.
# pyright: reportArgumentType=false

import triton
import triton.language as tl

from triton_kernels._matmul._epilogue import store_tile
from triton_kernels._matmul._kernel import tile_of

# Triton 3.6 cannot specialise warps over a tile that is cut: there, gelu and tanh of a large tile spill registers.
CAN_HALVE = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7))


@triton.jit
def persistent_matmul_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    c_ptr,
    preactivation_ptr,
    M,
    N,
    K,
    stride_a,
    stride_b,
    stride_bias,
    negative_slope,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    INDEX_64: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program p of at most NUM_PROGRAMS computes tile p and every NUM_PROGRAMS-th after it.

    a_ptr: (M, K) with rows stride_a apart; with A_TRANSPOSED, (K, M) with rows stride_a apart.
    b_ptr: (K, N) with rows stride_b apart; with B_TRANSPOSED, (N, K) with rows stride_b apart.
        The copy engine wants both to start on 16 bytes and their rows a multiple of 16 bytes apart.
    bias_ptr: (N,) or None. c_ptr, preactivation_ptr (or None): (M, N), contiguous.
    WARP_SPECIALIZE: some warps only fetch, the others only multiply. INDEX_64, UPCAST: as in `matmul_kernel`.
    """
    # Descriptors made on the host would do without scratch memory, but Triton 3.7 cannot specialise warps over them.
    if A_TRANSPOSED:
        a_desc = tl.make_tensor_descriptor(a_ptr, [K, M], [stride_a, 1], [BLOCK_SIZE_K, BLOCK_SIZE_M])
    else:
        a_desc = tl.make_tensor_descriptor(a_ptr, [M, K], [stride_a, 1], [BLOCK_SIZE_M, BLOCK_SIZE_K])
    if B_TRANSPOSED:
        b_desc = tl.make_tensor_descriptor(b_ptr, [N, K], [stride_b, 1], [BLOCK_SIZE_N, BLOCK_SIZE_K])
    else:
        b_desc = tl.make_tensor_descriptor(b_ptr, [K, N], [stride_b, 1], [BLOCK_SIZE_K, BLOCK_SIZE_N])

    num_tiles = tl.cdiv(M, BLOCK_SIZE_M) * tl.cdiv(N, BLOCK_SIZE_N)
    # Triton 3.7 specialises warps on Hopper only in a loop that is not flattened.
    for tile in tl.range(tl.program_id(0), num_tiles, NUM_PROGRAMS, flatten=False, warp_specialize=WARP_SPECIALIZE):
        pid_m, pid_n = tile_of(tile, M, N, BLOCK_SIZE_M, BLOCK_SIZE_N, GROUP_SIZE_M)
        offs_am = pid_m * BLOCK_SIZE_M
        offs_bn = pid_n * BLOCK_SIZE_N
        accumulator = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
        # What a block has beyond the edge of its matrix arrives as 0.
        for offs_k in range(0, K, BLOCK_SIZE_K):
            a = a_desc.load([offs_k, offs_am]).T if A_TRANSPOSED else a_desc.load([offs_am, offs_k])
            b = b_desc.load([offs_bn, offs_k]).T if B_TRANSPOSED else b_desc.load([offs_k, offs_bn])
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)

        offs_m = offs_am + tl.arange(0, BLOCK_SIZE_M)
        if INDEX_64:
            offs_m = offs_m.to(tl.int64)
        store_tile(
            accumulator,
            bias_ptr,
            c_ptr,
            preactivation_ptr,
            offs_m,
            offs_bn,
            M,
            N,
            stride_bias,
            negative_slope,
            ACTIVATION,
            HALVES=CAN_HALVE and BLOCK_SIZE_M * BLOCK_SIZE_N > 64 * 128,
        )
