"""`find_lr`: which learning rates a network can learn with, from one short run in which the rate rises."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fnn import _ranks, optim
from fnn._files import replace_file
from fnn.train._rates import constant_rates
from fnn.train._state import TrainState
from fnn.train._step import Step

_MEMORY = 0.9
_DIVERGED = 4.0


@dataclasses.dataclass(frozen=True)
class LRCurve:
    """What `find_lr` found: the loss before the step with each rate, up to where it diverged."""

    lrs: list[float]
    losses: list[float]
    suggestion: float
    """Where the smoothed loss falls most steeply over the logarithm of the rate; NaN where it falls nowhere."""

    @property
    def smoothed(self) -> list[float]:
        """`losses`, each the mean of its neighbours on both sides, so that it is not late; the nearer, the heavier."""
        width = max(1.0, len(self.losses) / 30)
        return [self._mean_around(index, width) for index in range(len(self.losses))]

    def _mean_around(self, index: int, width: float) -> float:
        reach = min(int(3 * width), index, len(self.losses) - 1 - index)  # as many on one side as on the other
        around = range(index - reach, index + reach + 1)
        weights = [math.exp(-0.5 * ((other - index) / width) ** 2) for other in around]
        return sum(w * self.losses[other] for w, other in zip(weights, around, strict=True)) / sum(weights)

    def plot(self, path: str | Path) -> None:
        """Draw loss over learning rate, with the suggestion, as an image (PNG, or what `path` ends in).

        Of several processes rank 0 alone draws.
        Raises `ImportError` where matplotlib is absent, `OSError` where the file cannot be written.
        """
        if not _ranks.is_main():
            return
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ImportError('LRCurve.plot needs matplotlib; pip install "fnn[examples]"') from error
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes: Any = figure.add_subplot()
        axes.plot(self.lrs, self.losses, color="C0", alpha=0.35, linewidth=1, label="loss")
        axes.plot(self.lrs, self.smoothed, color="C0", linewidth=1.8, label="smoothed")
        if math.isfinite(self.suggestion):
            axes.axvline(self.suggestion, color="C3", linestyle="--", label=f"suggestion {self.suggestion:.2g}")
        axes.set(title="learning-rate range test", xlabel="learning rate (log scale)", ylabel="loss", xscale="log")
        low, high = min(self.losses), max(self.smoothed[: max(1, len(self.smoothed) // 2)])
        if high > low:  # what comes after the divergence would flatten all that matters
            axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        kind = Path(path).suffix[1:] or "png"
        replace_file("LRCurve.plot", path, lambda file: figure.savefig(file, dpi=120, format=kind))


def find_lr(
    step: Step,
    train_state: TrainState,
    loader: Iterable[Any],
    *,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 100,
) -> LRCurve:
    """The learning-rate range test: train with a rate that rises from `low` to `high`, and watch the loss.

    The rate is multiplied by one factor after each step, in the optimizer's state: the step stays the one compiled
    graph that the training will use. It ends early where the loss, smoothed, is above four times its best, or not
    finite. The run is made on a copy: `train_state` stays as it is, whether the step donates or not.

    Smith 2015, Cyclical Learning Rates for Training Neural Networks. The suggestion is that of fastai: the rate of the
    steepest descent. It is looked for before the loss first rises again, and neither in the first tenth of the steps
    nor in the last five.

    loader: a `data.Loader` or any iterable of batches that can be iterated again; it is iterated as often as needed

    Raises `ValueError` for an optimizer without a single constant learning rate, for bad arguments, and for a loss
    that is not finite within the first ten steps.

    Example:
        >>> from fnn import train
        >>> curve = train.find_lr(step, train_state, batches)  # doctest: +SKIP
        >>> curve.suggestion  # doctest: +SKIP
        0.0158
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"find_lr: low is {low!r} and high is {high!r}, expected 0 < low < high")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 20:
        raise ValueError(f"find_lr: steps is {steps!r}, expected a whole number of at least 20")
    rates = constant_rates("find_lr", train_state.opt_state)
    if len(rates) > 1:
        raise ValueError(f"find_lr: the optimizer has several learning rates, {', '.join(rates)}; expected one")
    (path,) = rates
    trained = train_state.copy()
    lrs: list[float] = []
    losses: list[float] = []
    recent, best = 0.0, math.inf
    for index, batch in zip(range(steps), _batches(loader), strict=False):
        lr = low * (high / low) ** (index / (steps - 1))
        trained = trained.replace(opt_state=optim.set(trained.opt_state, **{path: lr}))
        trained, metrics = step(trained, batch)
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            if index < 10:
                raise ValueError(
                    f"find_lr: the loss or an update was not finite in step {index}, at the rate {lr:.2g}; "
                    "a smaller low may help, where the network and the data are not to blame"
                )
            break
        lrs.append(lr)
        losses.append(loss)
        recent = _MEMORY * recent + (1 - _MEMORY) * loss
        smooth = recent / (1 - _MEMORY ** (index + 1))
        best = min(best, smooth)
        if index >= 10 and smooth > _DIVERGED * abs(best):
            break
    return LRCurve(lrs, losses, _steepest(lrs, LRCurve(lrs, losses, math.nan).smoothed))


def _batches(loader: Iterable[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    for epoch in itertools.count():
        count = 0
        for batch in loader.epoch(epoch) if callable(getattr(loader, "epoch", None)) else loader:  # type: ignore
            count += 1
            yield batch
        if not count:
            raise ValueError(
                "find_lr: the loader gave no batches; an iterator that is used up cannot be iterated again"
            )


def _steepest(lrs: list[float], losses: list[float]) -> float:
    """Where the loss falls most over one step, which is everywhere the same factor of the rate.

    Asked are the steps before the first rise by a quarter of the whole descent: a loss that has diverged falls, too.
    """
    descent, low, end = losses[0] - min(losses), math.inf, len(lrs) - 5
    for index, loss in enumerate(losses):
        low = min(low, loss)
        if loss - low > descent / 4:
            end = min(end, index)
            break
    slopes = {index: losses[index + 1] - losses[index - 1] for index in range(max(1, len(lrs) // 10), end)}
    best = min(slopes, key=slopes.__getitem__, default=None)
    return math.nan if best is None or slopes[best] >= 0 else lrs[best]
