"""What happens to a tile of the product: bias and activation, in float32, and the way to memory."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    # exp only ever sees a negative number, so that neither side overflows.
    decay = tl.exp(-tl.abs(x))
    return tl.where(x < 0, decay, 1.0) / (1.0 + decay)


@triton.jit
def tanh(x):
    # Near 0 the difference of exponentials would cancel: there, the odd polynomial of Cephes' tanhf.
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = x + x * square * series
    decay = tl.exp(-2.0 * tl.abs(x))
    magnitude = 1.0 - 2.0 * decay / (1.0 + decay)
    far = tl.where(x < 0, -magnitude, magnitude)
    return tl.where(tl.abs(x) < 0.625, near, far)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activate(x, negative_slope, ACTIVATION: tl.constexpr):
    """The activation of that name; NaN stays NaN, as `x < 0` is false for it."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x < 0, negative_slope * x, x)
    elif ACTIVATION == "gelu":
        x = gelu(x)
    elif ACTIVATION == "silu":
        x = x * sigmoid(x)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    elif ACTIVATION == "sigmoid":
        x = sigmoid(x)
    else:
        tl.static_assert(ACTIVATION is None, "unknown activation")
    return x


@triton.jit
def store_columns(
    accumulator,
    bias_ptr,
    c_ptr,
    preactivation_ptr,
    offs_m,
    offs_n,
    M,
    N,
    stride_bias,
    negative_slope,
    ACTIVATION: tl.constexpr,
):
    c_offsets = offs_m[:, None] * N + offs_n[None, :]
    c_mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=offs_n < N, other=0.0)
        accumulator += bias.to(tl.float32)[None, :]
    if preactivation_ptr is not None:
        tl.store(preactivation_ptr + c_offsets, accumulator.to(preactivation_ptr.dtype.element_ty), mask=c_mask)
    accumulator = activate(accumulator, negative_slope, ACTIVATION)
    tl.store(c_ptr + c_offsets, accumulator.to(c_ptr.dtype.element_ty), mask=c_mask)


@triton.jit
def store_tile(
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
    ACTIVATION: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Stores activation(accumulator + bias), and what goes into the activation, at rows offs_m, columns from start_n.

    bias_ptr: (N,) or None. c_ptr, preactivation_ptr (or None): (M, N), contiguous; what lies outside is not stored.
    HALVES: the left half of the columns, then the right one, as gelu or tanh of a large tile at once spills registers.
    """
    BLOCK_SIZE_M: tl.constexpr = accumulator.shape[0]
    BLOCK_SIZE_N: tl.constexpr = accumulator.shape[1]
    if HALVES:
        halves = tl.permute(tl.reshape(accumulator, (BLOCK_SIZE_M, 2, BLOCK_SIZE_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        offs_n = start_n + tl.arange(0, BLOCK_SIZE_N // 2)
        store_columns(
            left, bias_ptr, c_ptr, preactivation_ptr, offs_m, offs_n, M, N, stride_bias, negative_slope, ACTIVATION
        )
        offs_n += BLOCK_SIZE_N // 2
        store_columns(
            right, bias_ptr, c_ptr, preactivation_ptr, offs_m, offs_n, M, N, stride_bias, negative_slope, ACTIVATION
        )
    else:
        offs_n = start_n + tl.arange(0, BLOCK_SIZE_N)
        store_columns(
            accumulator,
            bias_ptr,
            c_ptr,
            preactivation_ptr,
            offs_m,
            offs_n,
            M,
            N,
            stride_bias,
            negative_slope,
            ACTIVATION,
        )
