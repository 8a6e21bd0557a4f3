"""Schedule-free training: an average of the parameters in the place of a decaying learning rate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree
from fnn.optim._adam import scale_by_adam
from fnn.optim._chain import chain
from fnn.optim._contract import (
    GradientTransformation,
    OptState,
    check_moment_dtype,
    is_absent,
    map_partial,
    map_same,
    widened,
)
from fnn.optim._decay import add_decayed_weights
from fnn.optim._hyper import (
    Hyperparameter,
    ScalarOrSchedule,
    Scheduled,
    advance,
    check,
    hyperparameters,
    is_zero,
    start,
)
from fnn.optim._inner import check_transformation
from fnn.tree import Tree, Where


class ScheduleFreeState(NamedTuple):
    """State of `schedule_free`: `z` has the parameters' structure, `inner` is the state of the inner transformation.

    `max_lr` is the largest learning rate so far, `weight_sum` the sum of the weights in the average, and `mixed` the
    `b1` with which the present parameters were made; all are 0-d.
    """

    lr: Hyperparameter | Scheduled
    b1: Hyperparameter | Scheduled
    weight_lr_power: Hyperparameter | Scheduled
    max_lr: Tensor
    weight_sum: Tensor
    mixed: Tensor
    inner: OptState
    z: Tree

    def eval_params(self, params: Tree) -> Tree:
        """The parameters to evaluate with, for `optim.eval_params`; `()` where a leaf is not averaged."""

        def average(y: Tensor, z: Any) -> Any:
            return () if is_absent(z) else _average(widened(y), widened(z), self.mixed)

        return map_partial(average, "params", params, self.z)


def _average(y: Tensor, z: Tensor, b1: Tensor) -> Tensor:
    """The x of which y is ``b1 * x + (1 - b1) * z``."""
    return (y - (1 - b1) * z) / b1


def schedule_free(
    transformation: GradientTransformation,
    lr: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    *,
    weight_lr_power: ScalarOrSchedule = 2.0,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Train at a point between the iterates of an optimizer and their average, so that no schedule is needed.

    .. math::
        z_t &= z_{t-1} - \eta_t \, u_t, \qquad u_t \text{ of the gradients at } y_{t-1} \\
        x_t &= (1 - c_t) x_{t-1} + c_t z_t, \qquad
            c_t = w_t \big/ \textstyle\sum_{i \le t} w_i, \quad w_t = (\max_{i \le t} \eta_i)^r \\
        y_t &= b_1 x_t + (1 - b_1) z_t

    The parameters are :math:`y`; evaluate and save :math:`x`, which ``eval_params(opt_state, params)`` finds from
    them. Memory is one copy of the parameters, :math:`z`. Equal to `optax.contrib.schedule_free` for a constant `lr`;
    of a schedule Optax weighs each step by the value of the next.

    Args:
        transformation: what makes :math:`u` of the gradients: without momentum and without a learning rate, such as
            ``scale_by_adam(b1=0.0)``; ``identity()`` is SGD.
        lr: :math:`\eta`, constant or a warmup. It and the other numbers may be floats, 0-d tensors or schedules.
        b1: how near to the average the gradients are taken; more than 0.
        weight_lr_power: :math:`r`; how little the steps of a warmup weigh in the average.
        moment_dtype: dtype of :math:`z`, by default each parameter's own.

    Raises `ValueError` for a `b1` of 0, and for a transformation that has a learning rate.

    Example:
        >>> from fnn import optim
        >>> opt = optim.schedule_free(optim.identity(), 0.5)
        >>> params = torch.tensor([1.0])
        >>> opt_state = opt.init(params)
        >>> for _ in range(100):
        ...     updates, opt_state = opt.update(params, opt_state, params)
        ...     params = optim.apply_updates(params, updates)
        >>> bool(optim.eval_params(opt_state, params).abs() < 0.01)
        True

    Reference: Defazio et al., The road less scheduled, 2024, https://arxiv.org/abs/2405.15682
    """
    check_transformation("schedule_free", "transformation", transformation)
    given = check(lr=lr, b1=b1, weight_lr_power=weight_lr_power)
    if is_zero(b1):
        raise ValueError("schedule_free: b1 must be more than 0, for the average is found from the parameters; got 0")

    def init(params: Tree) -> OptState:
        hyper = start(given, params)
        inner = transformation.init(params)
        for path, _ in hyperparameters(inner):
            if path.rpartition(".")[2] == "lr":
                raise ValueError(
                    f"schedule_free: the transformation has a learning rate of its own ({path!r}), but schedule_free "
                    "takes it as its argument lr; give a part without one, such as scale_by_adam(b1=0.0)"
                )
        zero = torch.zeros_like(hyper["lr"].value)
        check_moment_dtype(moment_dtype)
        # a copy: a donating step must not find the parameters in the state
        z = tree.map(lambda p: p.to(moment_dtype or p.dtype, copy=True), params)
        mixed = hyper["b1"].value.clone()
        return ScheduleFreeState(max_lr=zero, weight_sum=zero.clone(), mixed=mixed, inner=inner, z=z, **hyper)

    def update(grads: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, OptState]:
        if params is None:
            raise ValueError("schedule_free needs the parameters: opt.update(grads, opt_state, params)")
        (lr, b1, power), hyper = advance(given, state)
        directions, inner = transformation.update(grads, state.inner, params, **extra)
        max_lr = torch.maximum(state.max_lr, lr)
        weight = max_lr**power
        weight_sum = state.weight_sum + weight
        # while the learning rate is 0 nothing moves, and the average need not either
        share = weight / torch.where(weight_sum > 0, weight_sum, 1)

        def moved(z: Tensor, u: Tensor) -> Tensor:
            return (widened(z) - lr * u).to(z.dtype)

        def change(y: Tensor, old: Tensor, z: Tensor) -> Tensor:
            y, z = widened(y), widened(z)
            x = _average(y, widened(old), state.mixed)
            x = (1 - share) * x + share * z
            return b1 * x + (1 - b1) * z - y

        z = map_same(moved, "grads", state.z, directions)
        updates = map_same(change, "params", params, state.z, z)
        return updates, ScheduleFreeState(
            max_lr=max_lr, weight_sum=weight_sum, mixed=b1.clone(), inner=inner, z=z, **hyper
        )

    return GradientTransformation(init, update)


def schedule_free_sgd(
    lr: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    *,
    weight_lr_power: ScalarOrSchedule = 2.0,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Where | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Schedule-free SGD, equal to `optax.contrib.schedule_free_sgd`.

    Args:
        lr, b1, weight_lr_power: as in `schedule_free`; the best `lr` is often larger than that of `sgd`.
        weight_decay: added to the gradients, times the parameters.
        weight_decay_mask: which leaves decay, all by default; see `add_decayed_weights`.
        moment_dtype: dtype of :math:`z`, by default each parameter's own.

    Example:
        >>> from fnn import optim
        >>> opt = optim.schedule_free_sgd(optim.linear(0.0, 0.5, 10))
        >>> opt_state = opt.init(torch.tensor([1.0]))
        >>> optim.get(opt_state, "lr")
        tensor(0.)

    Reference: Defazio et al., The road less scheduled, 2024, https://arxiv.org/abs/2405.15682
    """
    return schedule_free(
        add_decayed_weights(weight_decay, weight_decay_mask),
        lr,
        b1,
        weight_lr_power=weight_lr_power,
        moment_dtype=moment_dtype,
    )


def schedule_free_adamw(
    lr: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    *,
    weight_lr_power: ScalarOrSchedule = 2.0,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: Where | None = None,
    moment_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Schedule-free AdamW, equal to `optax.contrib.schedule_free_adamw`.

    Args:
        lr, b1, weight_lr_power: as in `schedule_free`.
        b2, eps: as in `adamw`; the first moment gives way to the average.
        weight_decay: each step takes `lr * weight_decay` of the parameters away from :math:`z`.
        weight_decay_mask: which leaves decay, all by default; see `add_decayed_weights`.
        moment_dtype: dtype of :math:`z` and of the second moment, by default each parameter's own (for float16 the
            second moment is float32).

    Example:
        >>> from fnn import optim
        >>> opt = optim.schedule_free_adamw(0.1)
        >>> params = torch.tensor([1.0])
        >>> opt_state = opt.init(params)
        >>> for _ in range(100):
        ...     updates, opt_state = opt.update(params, opt_state, params)
        ...     params = optim.apply_updates(params, updates)
        >>> bool(optim.eval_params(opt_state, params).abs() < 0.05)
        True

    Reference: Defazio et al., The road less scheduled, 2024, https://arxiv.org/abs/2405.15682
    """
    direction = chain(
        scale_by_adam(0.0, b2, eps, moment_dtype=moment_dtype),
        add_decayed_weights(weight_decay, weight_decay_mask),
    )
    return schedule_free(direction, lr, b1, weight_lr_power=weight_lr_power, moment_dtype=moment_dtype)
