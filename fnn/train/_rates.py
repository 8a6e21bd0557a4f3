"""The learning rates in an optimizer's state: one, or several where parts of a network have their own."""

from __future__ import annotations

from typing import Any

from fnn.optim._hyper import Scheduled, hyperparameters


def learning_rates(opt_state: Any) -> dict[str, float]:
    """`{"lr": 0.1}`, or where there are several one under each path. Reads the device."""
    found = {path: float(rate.value) for path, rate in _rates(opt_state).items() if rate.value.dim() == 0}
    return found if len(found) != 1 else {"lr": next(iter(found.values()))}


def constant_rates(who: str, opt_state: Any) -> dict[str, float]:
    """The learning rates by path. Raises `ValueError` naming `who` where there is none, or one follows a schedule."""
    rates = _rates(opt_state)
    if not rates:
        raise ValueError(f"{who}: the optimizer has no learning rate 'lr' in its state to change; optim.sgd(0.1) has")
    for path, rate in rates.items():
        if isinstance(rate, Scheduled):
            raise ValueError(
                f"{who}: {path!r} follows a schedule, which would overwrite the new rate at the next step; make the "
                "optimizer with a number, such as optim.adam(1e-3)"
            )
        if rate.value.dim():
            raise ValueError(
                f"{who}: {path!r} has shape {tuple(rate.value.shape)}, expected the one rate of one network"
            )
    return {path: float(rate.value) for path, rate in rates.items()}


def _rates(opt_state: Any) -> dict[str, Any]:
    return {path: rate for path, rate in hyperparameters(opt_state) if path.rpartition(".")[2] == "lr"}
