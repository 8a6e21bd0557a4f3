"""How many operations the operators are, for `torch.utils.flop_counter.FlopCounterMode`.

Import this module before counting. It is not imported with the package, because torch's counter imports Triton.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from triton_kernels import _functions as _functions  # registers the operators
from triton_kernels._matmul import cpu

operators = torch.ops.triton_kernels


@register_flop_formula([operators.product, operators.activated, operators.activated_pair])
def product_flops(a_shape, b_shape, *_, out_shape=None, **__) -> int:
    """Two for each term: a (..., m, k) @ b (..., k, n)."""
    batch = torch.broadcast_shapes(a_shape[:-2], b_shape[:-2])
    return 2 * math.prod((*batch, a_shape[-2], a_shape[-1], b_shape[-1]))


def linear_flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return 2 * math.prod((*x_shape, weight_shape[0]))


if cpu.linear_pointwise is not None:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(linear_flops)


@register_flop_formula(operators.linear_cross_entropy)
def linear_cross_entropy_flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    return linear_flops(x_shape, weight_shape)


@register_flop_formula(operators.linear_cross_entropy_gradients)
def linear_cross_entropy_gradients_flops(_, __, x_shape, weight_shape, *others, out_shape=None, **___) -> int:
    """The logits again, and a product for each gradient of x and weight."""
    needs = others[3]
    return (1 + needs[0] + needs[1]) * linear_flops(x_shape, weight_shape)
