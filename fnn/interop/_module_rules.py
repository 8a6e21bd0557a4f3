"""Functions of torch's own modules that draw, write or lose derivatives inside, as compositions of others."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fnn import nn
from fnn.interop._pure import Pure, rule
from fnn.interop._random_rules import dropped


def _transformed() -> bool:
    """Whether derivatives may be taken here that torch's fused norms do not have."""
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None  # type: ignore[attr-defined]


@rule(F.batch_norm)
def _batch_norm(
    mode: Pure, func: Any, input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: Any = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    mean, var = mode.now(running_mean), mode.now(running_var)
    if not training and not _transformed():
        return func(input, mean, var, weight, bias, False, 0.0, eps)
    affine = weight is not None or bias is not None
    channels = input.new_ones(input.shape[1])
    state = {"running_mean": channels if mean is None else mean, "running_var": channels if var is None else var}
    params = {}
    if affine:
        params["weight"] = channels if weight is None else weight
        params["bias"] = torch.zeros_like(channels) if bias is None else bias
    counted = running_mean in mode.counts
    layer = nn.BatchNorm(eps=eps, momentum=1.0 if counted else momentum, affine=affine)
    y, new = layer.apply(params, state, input, train=training)
    if training and mean is not None:
        if counted:
            count = mode.now(mode.counts[running_mean]) + 1
            mode.written[mode.counts[running_mean]] = count
            new = {name: state[name] + (new[name] - state[name]) / count for name in state}
        mode.written[running_mean], mode.written[running_var] = new["running_mean"], new["running_var"]
    return y


@rule(F.instance_norm)
def _instance_norm(
    mode: Pure, func: Any, input: Tensor, running_mean: Any = None, running_var: Any = None, weight: Any = None,
    bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats:
        return _batch_norm(mode, F.batch_norm, input, running_mean, running_var, weight, bias, False, momentum, eps)
    wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    axes = list(range(2, input.dim()))
    variance, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    y = (wide - mean) * torch.rsqrt(variance + eps)
    column = (-1, *[1] * len(axes))
    y = y if weight is None else y * weight.reshape(column)
    y = y if bias is None else y + bias.reshape(column)
    if running_mean is not None:
        count = math.prod(input.shape[2:])
        for old, batch in ((running_mean, mean), (running_var, variance * (count / max(1, count - 1)))):
            batch = batch.detach().mean(0).reshape(-1).to(old.dtype)
            mode.written[old] = torch.lerp(mode.now(old), batch, momentum)
    return y.to(input.dtype)


@rule(F.layer_norm, torch.layer_norm)
def _layer_norm(
    mode: Pure, func: Any, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None,
    eps: float = 1e-5, *flags: Any, **more: Any,
) -> Tensor:  # fmt: skip
    shape = tuple(normalized_shape)
    if not _transformed() or tuple(input.shape[input.dim() - len(shape) :]) != shape:
        return func(input, normalized_shape, weight, bias, eps, *flags, **more)
    y = nn.LayerNorm(dims=len(shape), eps=eps, affine=False).apply({}, {}, input)[0]
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@rule(F.scaled_dot_product_attention)
def _attention(
    mode: Pure, func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    if dropout_p == 0:
        return func(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if options.get("enable_gqa"):
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scale = options.get("scale")
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        allowed = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(attn_mask.logical_not(), -math.inf) if allowed else scores + attn_mask
    weights = torch.softmax(scores, -1)
    return dropped(mode, weights, dropout_p, weights.shape) @ value


@rule(F.multi_head_attention_forward)
def _multi_head_attention(
    mode: Pure, func: Any, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Any, in_proj_bias: Any, bias_k: Any, bias_v: Any, add_zero_attn: bool, dropout_p: float,
    out_proj_weight: Tensor, out_proj_bias: Any, training: bool = True, key_padding_mask: Any = None,
    need_weights: bool = True, attn_mask: Any = None, use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None, k_proj_weight: Any = None, v_proj_weight: Any = None, static_k: Any = None,
    static_v: Any = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> Any:  # fmt: skip
    def call(rate: float, weights: bool, average: bool) -> Any:
        return func(
            query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
            add_zero_attn, rate, out_proj_weight, out_proj_bias, training, key_padding_mask, weights, attn_mask,
            use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, static_k, static_v, average,
            is_causal and not weights,
        )  # fmt: skip

    if not training or dropout_p == 0:
        return func(
            query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
            add_zero_attn, 0.0, out_proj_weight, out_proj_bias, training, key_padding_mask, need_weights, attn_mask,
            use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, static_k, static_v,
            average_attn_weights, is_causal,
        )  # fmt: skip
    # torch's own weights, with all its masks, and from there on by hand: dropout lies between weights and values.
    weights = call(0.0, True, False)[1]
    batched = query.dim() == 3
    weights = weights if batched else weights.unsqueeze(0)  # (batch, heads, targets, sources)
    values = value if batched else value.unsqueeze(1)  # (sources, batch, features)
    embed = out_proj_weight.shape[0]
    weight_v = v_proj_weight if use_separate_proj_weight else in_proj_weight[2 * embed :]
    values = F.linear(values, weight_v, None if in_proj_bias is None else in_proj_bias[2 * embed :])
    if bias_v is not None:
        values = torch.cat([values, bias_v.expand(1, values.shape[1], embed)])
    values = values.reshape(values.shape[0], values.shape[1], num_heads, -1).permute(1, 2, 0, 3)
    if static_v is not None:
        values = static_v.reshape(values.shape[0], num_heads, *static_v.shape[1:])
    if add_zero_attn:
        values = torch.cat([values, torch.zeros_like(values[:, :, :1])], 2)
    weights = dropped(mode, weights, dropout_p, weights.shape)
    mixed = (weights @ values).permute(2, 0, 1, 3).flatten(2)
    output = F.linear(mixed, out_proj_weight, out_proj_bias)
    shown = weights.mean(1) if average_attn_weights else weights
    output, shown = (output, shown) if batched else (output.squeeze(1), shown.squeeze(0))
    return output, shown if need_weights else None


def _shortened(mode: Pure, weight: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """The rows that torch would write into the weight before it looks them up; its gradient passes them unchanged."""
    if mode.train:
        raise TypeError(
            f"{mode.who}: {mode.where()}an embedding with max_norm writes into its weight in training; make it with "
            "max_norm=None, and shorten the rows after the optimizer's update"
        )
    rows = weight.detach()
    norms = torch.linalg.vector_norm(rows, norm_type, -1, keepdim=True)
    return weight + (torch.where(norms > max_norm, rows * (max_norm / (norms + 1e-7)), rows) - rows)


@rule(F.embedding)
def _embedding(
    mode: Pure, func: Any, input: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None,
    norm_type: float = 2.0, *flags: Any, **options: Any,
) -> Tensor:  # fmt: skip
    weight = weight if max_norm is None else _shortened(mode, weight, max_norm, norm_type)
    return func(input, weight, padding_idx, None, norm_type, *flags, **options)


@rule(F.embedding_bag)
def _embedding_bag(
    pure: Pure, func: Any, /, input: Tensor, weight: Tensor, offsets: Any = None, max_norm: Any = None,
    norm_type: float = 2.0, *flags: Any, **options: Any,
) -> Tensor:  # fmt: skip
    weight = weight if max_norm is None else _shortened(pure, weight, max_norm, norm_type)
    return func(input, weight, offsets, None, norm_type, *flags, **options)


@rule(torch._weight_norm)  # pyright: ignore[reportPrivateImportUsage]
def _weight_norm(mode: Pure, func: Any, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The fused one has no forward-mode derivative."""
    axes = [axis for axis in range(v.dim()) if dim == -1 or axis != dim % v.dim()]
    return v * (g / v.square().sum(axes, keepdim=True).sqrt()) if axes else v * (g / v.abs())


@rule(F.normalize)
def _normalize(mode: Pure, func: Any, input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12,
               out: Any = None) -> Tensor:  # fmt: skip
    y = func(input, p, dim, eps)
    return y if out is None else out.copy_(y)  # spectral norm's way, for which transforms have no rule


@rule(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
def _recurrent(mode: Pure, func: Any, *args: Any) -> Any:
    """Several layers with dropout between them, one after another: the fused ones draw their own masks."""
    packed = not isinstance(args[3], bool)
    if packed:  # (data, batch_sizes, carry, weights, has_biases, layers, dropout, train, bidirectional)
        if args[6] and args[7] and args[5] > 1:
            mode.refuse(f"{func.__name__}'s dropout between layers", "give padded inputs, not a PackedSequence")
        return func(*args)
    x, carry, weights, biases, layers, p, train, bidirectional, batch_first = args
    if not train or p == 0 or layers == 1:
        return func(*args)
    directions = 2 if bidirectional else 1
    size = len(weights) // layers
    carries = carry if isinstance(carry, tuple | list) else [carry]
    last: list[list[Tensor]] = [[] for _ in carries]
    for index in range(layers):
        x = dropped(mode, x, p, x.shape) if index else x
        here = [part[index * directions : (index + 1) * directions] for part in carries]
        own = weights[index * size : (index + 1) * size]
        start = tuple(here) if isinstance(carry, tuple | list) else here[0]
        x, *ends = func(x, start, own, biases, 1, 0.0, train, bidirectional, batch_first)
        for collected, end in zip(last, ends, strict=True):
            collected.append(end)
    return x, *[torch.cat(ends) for ends in last]
