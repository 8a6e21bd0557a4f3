"""Exponential moving averages: of the updates, and of the parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._contract import (
    GradientTransformation,
    OptState,
    apply_updates,
    fill,
    map_partial,
    map_same,
    widened,
    zeros,
)
from fnn.optim._hyper import Hyperparameter, ScalarOrSchedule, Scheduled, advance, check, start
from fnn.optim._inner import check_state, check_transformation
from fnn.tree import Tree


class EmaState(NamedTuple):
    """State of `ema`. `weight` is the sum of the weights in the average, ``()`` where it is not divided by it."""

    decay: Hyperparameter | Scheduled
    weight: Tensor | tuple[()]
    ema: Tree


class EmaParamsState(NamedTuple):
    """State of `ema_params`: the average of the parameters, and the state of the optimizer."""

    decay: Hyperparameter | Scheduled
    ema: Tree
    inner: OptState

    def eval_params(self, params: Tree) -> Tree:
        """The parameters to evaluate with, for `optim.eval_params`; `()` where a leaf is not averaged."""
        return self.ema


def ema(
    decay: ScalarOrSchedule, debias: bool = True, *, moment_dtype: torch.dtype | None = None
) -> GradientTransformation:
    r"""An exponential moving average of the gradients (or updates) in their place.

    .. math:: m_t = d \, m_{t-1} + (1 - d) \, g_t, \qquad u_t = m_t / (1 - d^t)

    without the division where `debias` is false. `trace` is the sum without the factor :math:`1 - d`. With a
    scheduled :math:`d_t`, what is divided by is :math:`1 - \prod_t d_t`. `moment_dtype` is the dtype of :math:`m`,
    by default each parameter's own, float32 for float16. For an average of the parameters see `ema_params`.

    Example:
        >>> from fnn import optim
        >>> transformation = optim.ema(0.9)
        >>> updates, state = transformation.update(torch.tensor([1.0]), transformation.init(torch.zeros(1)))
        >>> updates, state = transformation.update(torch.tensor([2.0]), state)
        >>> updates
        tensor([1.5263])
    """
    given = check(decay=decay)

    def init(params: Tree) -> OptState:
        hyper = start(given, params)
        weight = torch.zeros_like(hyper["decay"].value) if debias else ()
        return EmaState(weight=weight, ema=zeros(params, moment_dtype), **hyper)

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        (decay,), hyper = advance(given, state)
        share = 1 - decay

        def average(m: Tensor, g: Tensor) -> Tensor:
            return (decay * widened(m) + share * widened(g)).to(m.dtype)

        updates = mean = map_same(average, "grads", state.ema, grads)
        weight: Any = ()
        if debias:
            # a sum like the averages themselves, so that it holds for a decay that changes
            weight = decay * state.weight + share
            updates = tree.map(lambda m: widened(m) / weight, mean)
        return updates, EmaState(weight=weight, ema=mean, **hyper)

    return GradientTransformation(init, update)


def ema_params(optimizer: GradientTransformation, decay: ScalarOrSchedule) -> GradientTransformation:
    r"""Train with `optimizer`, and keep an exponential moving average of the parameters for evaluation.

    .. math:: \bar p_0 = p_0, \qquad \bar p_t = d \, \bar p_{t-1} + (1 - d) \, p_t

    `eval_params(opt_state, params)` reads it. The average is kept in float32 for half-precision parameters, which
    would lose nearly every increment. A `decay` near 1 remembers :math:`p_0` for long; a schedule lets it rise:
    ``lambda step: torch.clamp((1 + step) / (10 + step), max=0.999)``. `update` needs the parameters.

    The average is of the parameters with these updates, so nothing may change the updates afterwards: it goes
    outermost, but for `freeze` and `accumulate`, within which it averages the trained leaves, and counts steps.

    Example:
        >>> from fnn import optim
        >>> opt = optim.ema_params(optim.sgd(0.5), decay=0.9)
        >>> params = torch.tensor([1.0])
        >>> updates, opt_state = opt.update(torch.tensor([2.0]), opt.init(params), params)
        >>> params = optim.apply_updates(params, updates)
        >>> params, optim.eval_params(opt_state, params)
        (tensor([0.]), tensor([0.9000]))

    Reference: Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992,
    https://doi.org/10.1137/0330046
    """
    given = check(decay=decay)
    check_transformation("ema_params", "optimizer", optimizer)

    def init(params: Tree) -> OptState:
        # clones: the state owns its memory
        mean = tree.map(lambda p: widened(p).clone(), params)
        return EmaParamsState(ema=mean, inner=optimizer.init(params), **start(given, params))

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        state = check_state(state, EmaParamsState)
        if params is None:
            raise ValueError("an average of the parameters needs them: opt.update(grads, opt_state, params)")
        (decay,), hyper = advance(given, state)
        updates, inner = optimizer.update(grads, state.inner, params, **extra)
        share = 1 - decay
        mean = map_same(
            lambda m, p: decay * m + share * widened(p), "params", state.ema, apply_updates(params, updates)
        )
        return updates, EmaParamsState(ema=mean, inner=inner, **hyper)

    return GradientTransformation(init, update)


def eval_params(opt_state: OptState, params: Tree) -> Tree:
    """The parameters to evaluate with: those that the optimizer averages, the others as they are. In their own memory.

    For an optimizer with `ema_params`, `lookahead` or `schedule_free` in it; where one stands within the other, the
    outer one counts.
    Raises `ValueError` where the optimizer averages nothing, and where its average is not one of these parameters.

    Example:
        >>> from fnn import optim
        >>> params = {"weight": torch.ones(2)}
        >>> opt_state = optim.ema_params(optim.sgd(0.1), 0.999).init(params)
        >>> optim.eval_params(opt_state, params)
        {'weight': tensor([1., 1.])}
    """
    found = _averages(opt_state, params)
    if not found:
        raise ValueError(
            "eval_params: this optimizer averages no parameters; evaluate with the parameters themselves, or make "
            "it with ema_params(optimizer, decay), lookahead or schedule_free"
        )
    result = params
    for mean in found:
        result = map_partial(fill, "params", result, mean)
    # a copy: a donating step writes the next values into the memory of both
    return map_same(lambda p, m: m.to(p.dtype).clone(), "the average in opt_state", params, result)


def _averages(node: Any, params: Tree) -> list[Tree]:
    """The averages of the parameters in a state, ``()`` in the place of leaves of which there is none."""
    if hasattr(node, "eval_params"):
        return [node.eval_params(params)]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, tuple | list) else ()
    return [mean for child in children for mean in _averages(child, params)]
