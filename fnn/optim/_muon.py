"""Muon: momentum of matrices, orthogonalized."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._chain import chain
from fnn.optim._contract import GradientTransformation, OptState, widened, zeros
from fnn.optim._decay import add_decayed_weights
from fnn.optim._hyper import Hyperparameter, ScalarOrSchedule, Scheduled, advance, check, start
from fnn.optim._inner import check_count
from fnn.optim._learning_rate import scale_by_learning_rate
from fnn.optim._moments import average
from fnn.tree import Tree, Where

# What the updates of an (m, n) matrix are multiplied by.
_SCALES = {
    "original": lambda m, n: math.sqrt(max(1, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral_unclamped": lambda m, n: math.sqrt(m / n),
}


class ScaleByMuonState(NamedTuple):
    """State of `scale_by_muon`: the average `mu` has the parameters' structure."""

    momentum: Hyperparameter | Scheduled
    eps: Hyperparameter | Scheduled
    mu: Tree


def scale_by_muon(
    momentum: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-7,
    *,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    adjust_lr: str = "original",
    compute_dtype: torch.dtype | None = torch.bfloat16,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Orthogonalize an average of the gradients of matrices: all its singular values become about 1.

    .. math::
        m_t &= \mu m_{t-1} + (1 - \mu) g_t, \qquad x_0 = m_t / \max(\lVert m_t \rVert, \epsilon), \quad
            \text{with nesterov of } \mu m_t + (1 - \mu) g_t \\
        x_{k+1} &= a x_k + (b \, x_k x_k^\top + c \, (x_k x_k^\top)^2) \, x_k, \qquad u_t = s \, x_K

    Args and errors are those of `muon`.

    Example:
        >>> from fnn import optim
        >>> transformation = optim.scale_by_muon()
        >>> grads = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
        >>> updates, _ = transformation.update(grads, transformation.init(grads))
        >>> bool(((updates.diag() > 0.6) & (updates.diag() < 1.2)).all())
        True

    Reference: Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024,
    https://kellerjordan.github.io/posts/muon/
    """
    given = check(momentum=momentum, eps=eps)
    check_count("muon", 1, ns_steps=ns_steps)
    if adjust_lr not in _SCALES:
        raise ValueError(f"muon: adjust_lr must be one of {', '.join(map(repr, _SCALES))}, got {adjust_lr!r}")
    if len(ns_coefficients) != 3:
        raise ValueError(f"muon: ns_coefficients must be three numbers (a, b, c), got {ns_coefficients!r}")
    floating = isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point
    if compute_dtype is not None and (not floating or compute_dtype == torch.float16):
        raise ValueError(
            "muon: compute_dtype must be None or a floating dtype of the range of float32, as torch.bfloat16 has it, "
            f"got {compute_dtype!r}"
        )
    scale = _SCALES[adjust_lr]

    def init(params: Tree) -> OptState:
        hyper = start(given, params)
        for path, leaf in tree.paths(params).items():
            if leaf.ndim != 2 + ("*" in path.split(".")):
                raise ValueError(
                    f"muon: leaf {path!r} has shape {tuple(leaf.shape)}, expected a matrix (2-D); give the other "
                    "leaves another optimizer: by_label({'muon': muon(lr), 'adamw': adamw(lr)}, "
                    "lambda path, leaf: 'muon' if leaf.ndim == 2 else 'adamw')"
                )
        return ScaleByMuonState(mu=zeros(params, moment_dtype), **hyper)

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        (momentum, eps), hyper = advance(given, state)
        mu = ahead = average(momentum, state.mu, grads)
        if nesterov:
            ahead = tree.map(lambda m, g: momentum * widened(m) + (1 - momentum) * widened(g), mu, grads)

        def direction(m: Tensor) -> Tensor:
            m = widened(m)
            x = _orthogonalize(m if compute_dtype is None else m.to(compute_dtype), ns_coefficients, ns_steps, eps)
            return scale(*m.shape[-2:]) * x.to(m.dtype)

        return tree.map(direction, ahead), ScaleByMuonState(mu=mu, **hyper)

    return GradientTransformation(init, update)


def _orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: Tensor) -> Tensor:
    """Matrices (..., m, n) with the singular vectors of `x` and singular values near 1, by Newton-Schulz iterations."""
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the smaller of the two Gram matrices
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / torch.maximum(norm, eps.to(norm.dtype))
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon(
    lr: ScalarOrSchedule,
    momentum: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-7,
    *,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    adjust_lr: str = "original",
    weight_decay: ScalarOrSchedule = 0.1,
    weight_decay_mask: Where | None = None,
    compute_dtype: torch.dtype | None = torch.bfloat16,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Muon, for the matrices of hidden layers, equal to `torch.optim.Muon`.

    .. math:: p_t = p_{t-1} - \eta \, (s \operatorname{orthogonalize}(m_t) + \lambda p_{t-1})

    with the average :math:`m_t` of the gradients and the iteration of `scale_by_muon`. Every leaf must be a matrix, or
    a stack of matrices below the "*" of an `nn.Repeat`; `by_label` gives biases, norms and embeddings another
    optimizer, usually `adamw`.

    Args:
        lr: :math:`\eta`. It, `momentum`, `eps` and `weight_decay` may be floats, 0-d tensors or schedules.
        momentum: :math:`\mu`.
        eps: least norm to divide by.
        nesterov: orthogonalize the average after one more share of the gradient.
        ns_coefficients: :math:`a, b, c` of the Newton-Schulz iteration.
        ns_steps: how many iterations.
        adjust_lr: the factor :math:`s` of an (m, n) matrix: "original", :math:`\sqrt{\max(1, m / n)}`;
            "match_rms_adamw", :math:`0.2 \sqrt{\max(m, n)}`, with which `lr` and `weight_decay` of `adamw` fit;
            "spectral_unclamped", :math:`\sqrt{m / n}`.
        weight_decay: :math:`\lambda`; each step takes `lr * weight_decay` of a parameter away.
        weight_decay_mask: which leaves decay, all by default; see `add_decayed_weights`.
        compute_dtype: dtype of the iteration; `None` is the parameters' own, or float32 where that is half precision.
        moment_dtype: dtype of :math:`m`, by default each parameter's own (float32 for float16).

    Raises `ValueError` for a leaf that is no matrix (in `init`), for an unknown `adjust_lr`, and for a `compute_dtype`
    of less range, such as float16, in which small gradients would vanish.

    Example:
        >>> from fnn import optim
        >>> opt = optim.by_label(
        ...     {"muon": optim.muon(0.02), "adamw": optim.adamw(3e-4)},
        ...     lambda path, leaf: "muon" if leaf.ndim == 2 else "adamw",
        ... )
        >>> params = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
        >>> updates, opt_state = opt.update(params, opt.init(params), params)
        >>> optim.get(opt_state, "muon.2.lr"), optim.get(opt_state, "adamw.2.lr")
        (tensor(0.0200), tensor(0.0003))

    Reference: Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024,
    https://kellerjordan.github.io/posts/muon/; Liu et al., Muon is scalable for LLM training, 2025,
    https://arxiv.org/abs/2502.16982
    """
    scaling = scale_by_muon(
        momentum,
        eps,
        nesterov=nesterov,
        ns_coefficients=ns_coefficients,
        ns_steps=ns_steps,
        adjust_lr=adjust_lr,
        compute_dtype=compute_dtype,
        moment_dtype=moment_dtype,
    )
    return chain(scaling, add_decayed_weights(weight_decay, weight_decay_mask), scale_by_learning_rate(lr))
