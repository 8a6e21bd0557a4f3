"""A tile of `activation(a @ b + bias)` per program, through pointers: any strides, any sizes, any GPU."""

import triton
import triton.language as tl

from triton_kernels._matmul._epilogue import activate, store_tile


@triton.jit
def tile_of(tile, M, N, BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, GROUP_SIZE_M: tl.constexpr):
    """Row and column of the tile-th tile: down GROUP_SIZE_M rows first, so that neighbours share operands in L2."""
    num_pid_m = tl.cdiv(M, BLOCK_SIZE_M)
    num_pid_n = tl.cdiv(N, BLOCK_SIZE_N)
    num_pid_in_group = GROUP_SIZE_M * num_pid_n
    first_pid_m = (tile // num_pid_in_group) * GROUP_SIZE_M
    group_size_m = min(num_pid_m - first_pid_m, GROUP_SIZE_M)
    pid_m = first_pid_m + (tile % num_pid_in_group) % group_size_m
    pid_n = (tile % num_pid_in_group) // group_size_m
    return pid_m, pid_n


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    c_ptr,
    preactivation_ptr,
    M,
    N,
    K,
    batch_size,
    batch_size_1,
    batch_size_2,
    stride_a0,
    stride_a1,
    stride_a2,
    stride_am,
    stride_ak,
    stride_b0,
    stride_b1,
    stride_b2,
    stride_bk,
    stride_bn,
    stride_bias,
    negative_slope,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INDEX_64: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program computes one tile of one matrix of the batch; with SPLIT_K, over one part of K.

    a_ptr, b_ptr: matrices (M, K) and (K, N), a batch of batch_size each, in up to three batch dimensions.
    bias_ptr: (N,) or None. preactivation_ptr: like c_ptr, for what goes into the activation, or None.
    c_ptr: (batch_size, M, N), contiguous; with SPLIT_K > 1, (SPLIT_K, batch_size, M, N) in float32 for the sums of
        the parts of K, which `sum_split_k_kernel` adds.
    batch_size_1, batch_size_2: sizes of the inner two batch dimensions; stride_a0 ... stride_b2: their strides.
    EVEN_K: K is a multiple of BLOCK_SIZE_K, so that no mask is needed in the loop.
    INDEX_64: some offset does not fit an int32. UPCAST: multiply in float32, for the interpreter, which takes the
        bits of a bfloat16 for an integer.
    """
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    num_tiles = tl.cdiv(M, BLOCK_SIZE_M) * tl.cdiv(N, BLOCK_SIZE_N)
    pid_m, pid_n = tile_of(program % num_tiles, M, N, BLOCK_SIZE_M, BLOCK_SIZE_N, GROUP_SIZE_M)
    split = (program // num_tiles) % SPLIT_K
    batch = program // num_tiles // SPLIT_K

    a_ptr += batch // batch_size_2 // batch_size_1 * stride_a0
    a_ptr += batch // batch_size_2 % batch_size_1 * stride_a1 + batch % batch_size_2 * stride_a2
    b_ptr += batch // batch_size_2 // batch_size_1 * stride_b0
    b_ptr += batch // batch_size_2 % batch_size_1 * stride_b1 + batch % batch_size_2 * stride_b2

    offs_m = pid_m * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    offs_n = pid_n * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    blocks_per_split = tl.cdiv(tl.cdiv(K, BLOCK_SIZE_K), SPLIT_K)
    k_start = split * blocks_per_split * BLOCK_SIZE_K
    k_end = min(K, k_start + blocks_per_split * BLOCK_SIZE_K)
    offs_k = k_start + tl.arange(0, BLOCK_SIZE_K)
    if INDEX_64:
        offs_k = offs_k.to(tl.int64)

    # Rows and columns past the edge wrap around to valid ones: no mask in the loop, and they are not stored.
    a_ptrs = a_ptr + (offs_m % M)[:, None] * stride_am + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + (offs_n % N)[None, :] * stride_bn
    a_step = BLOCK_SIZE_K * stride_ak
    b_step = BLOCK_SIZE_K * stride_bk
    accumulator = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
    for k in range(k_start, k_end, BLOCK_SIZE_K):
        if EVEN_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            inside = tl.arange(0, BLOCK_SIZE_K) < K - k
            a = tl.load(a_ptrs, mask=inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=inside[:, None], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
        a_ptrs += a_step
        b_ptrs += b_step

    if SPLIT_K > 1:
        c_ptr += (split * batch_size + batch) * M * N
        c_mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
        tl.store(c_ptr + offs_m[:, None] * N + offs_n[None, :], accumulator, mask=c_mask)
    else:
        c_ptr += batch * M * N
        if preactivation_ptr is not None:
            preactivation_ptr += batch * M * N
        start_n = pid_n * BLOCK_SIZE_N
        store_tile(
            accumulator,
            bias_ptr,
            c_ptr,
            preactivation_ptr,
            offs_m,
            start_n,
            M,
            N,
            stride_bias,
            negative_slope,
            ACTIVATION,
            HALVES=BLOCK_SIZE_M * BLOCK_SIZE_N > 64 * 128,
        )


@triton.jit
def sum_split_k_kernel(
    partial_ptr,
    bias_ptr,
    c_ptr,
    preactivation_ptr,
    size,
    N,
    stride_bias,
    negative_slope,
    SPLIT_K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INDEX_64: tl.constexpr,
):
    """Adds the parts of `matmul_kernel` always in the same order, so that the same call gives the same bits.

    partial_ptr: (SPLIT_K, size) in float32. bias_ptr: (N,) or None.
    c_ptr, preactivation_ptr (or None): (size,), which is rows of N.
    """
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    offsets = program * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < size
    total = tl.zeros((BLOCK_SIZE,), dtype=tl.float32)
    for _ in range(SPLIT_K):
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        partial_ptr += size
    if bias_ptr is not None:
        total += tl.load(bias_ptr + offsets % N * stride_bias, mask=mask, other=0.0).to(tl.float32)
    if preactivation_ptr is not None:
        tl.store(preactivation_ptr + offsets, total.to(preactivation_ptr.dtype.element_ty), mask=mask)
    total = activate(total, negative_slope, ACTIVATION)
    tl.store(c_ptr + offsets, total.to(c_ptr.dtype.element_ty), mask=mask)
