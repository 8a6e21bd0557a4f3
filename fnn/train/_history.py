"""`History`: rows of numbers, one an epoch or an evaluation, as a CSV file and as curves."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fnn import _ranks
from fnn._files import replace_file

_NO_CURVE = ("epoch", "step", "skipped", "seconds", "examples_per_second")
_LOWER_IS_BETTER = ("loss", "error", "mse", "mae", "nll", "perplexity")
_HIGHER_IS_BETTER = ("acc", "f1", "auc", "precision", "recall", "iou", "top")


class History:
    """What `fit` records: `.rows`, one an epoch: `{"epoch": 1, "step": 22, "loss": ..., "eval_loss": ..., ...}`.

    rows: those that a run goes on from

    `stopped` says why a run ended early ("interrupted"), and is `None` for one that did not.

    Example:
        >>> from fnn import train
        >>> history = train.History([{"epoch": 1, "step": 22, "loss": 0.5}, {"epoch": 2, "step": 44, "loss": 0.25}])
        >>> history["loss"]
        [0.5, 0.25]
    """

    def __init__(self, rows: Iterable[dict[str, float]] = ()) -> None:
        self.rows: list[dict[str, float]] = [dict(row) for row in rows]
        self.stopped: str | None = None

    def __getitem__(self, name: str) -> list[float]:
        """One column, over the rows that have it: `history["eval_accuracy"]`."""
        column = [row[name] for row in self.rows if name in row]
        if not column:
            raise KeyError(f"history has no column {name!r}; its columns are {self.columns}")
        return column

    def __repr__(self) -> str:
        last = {name: round(value, 4) for name, value in self.rows[-1].items()} if self.rows else None
        return f"History({len(self.rows)} rows, last: {last})"

    @property
    def columns(self) -> list[str]:
        """The names of all numbers in the rows, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def to_csv(self, path: str | Path) -> None:
        """Write all rows; the file that was there stays whole until the new one is complete.

        Of several processes rank 0 alone writes. Raises `OSError` naming the file where it cannot be written.
        """

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(self.rows)

        if _ranks.is_main():
            replace_file("History.to_csv", path, write)

    def plot(self, path: str | Path) -> None:
        """Draw each metric, training and evaluation in one panel, as an image (PNG, or what `path` ends in).

        Over epochs, or over steps where the rows are not whole epochs. A loss that spans two decades or more has a
        logarithmic axis. The best evaluation is marked where the metric's name says what is better ("loss", "error",
        ... the lowest; "accuracy", "f1", ... the highest). Of several processes rank 0 alone draws.

        Raises `ImportError` where matplotlib is absent, `ValueError` without rows and for rows without epoch or step,
        `OSError` where the file cannot be written; a file that was there stays whole then.
        """
        if not _ranks.is_main():
            return
        figure = self._figure()
        kind = Path(path).suffix[1:] or "png"
        replace_file("History.plot", path, lambda file: figure.savefig(file, dpi=120, format=kind))

    def _figure(self) -> Any:
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ImportError('History.plot needs matplotlib; pip install "fnn[examples]"') from error
        names = dict.fromkeys(name.removeprefix("eval_") for name in self.columns if name not in _NO_CURVE)
        if not names:
            raise ValueError(f"History.plot: nothing to draw in {len(self.rows)} rows with columns {self.columns}")
        if any("epoch" not in row or "step" not in row for row in self.rows):
            raise ValueError("History.plot: a row has no 'epoch' or no 'step' to draw over; expected both in each row")
        epochs = self["epoch"]
        along = "epoch" if all(epoch == int(epoch) for epoch in epochs) and len(set(epochs)) == len(epochs) else "step"
        across = min(4, len(names))
        down = -(-len(names) // across)
        figure = Figure(figsize=(max(6.0, 4.5 * across), 3.6 * down + 0.4), layout="constrained")
        reached = f"epoch {self['epoch'][-1]:g}, step {self['step'][-1]:,.0f}"
        stopped = f"stopped: {self.stopped}" if self.stopped else ""
        title = "  ·  ".join(part for part in (reached, stopped) if part)
        figure.suptitle(title, fontsize=10, color="0.35", parse_math=False)
        for index, name in enumerate(names):
            self._panel(figure.add_subplot(down, across, index + 1), name, along)
        return figure

    def _panel(self, axes: Any, name: str, along: str) -> None:
        from matplotlib.ticker import MaxNLocator

        drawn: list[float] = []
        for column, label, color in ((name, "training", "C0"), (f"eval_{name}", "evaluation", "C1")):
            points = [(row[along], row[column]) for row in self.rows if column in row]
            finite = [point for point in points if math.isfinite(point[1])]
            if not finite:
                continue
            dots = "o" if len(points) <= 40 or len(finite) < len(points) else ""
            gaps = [(x, y if math.isfinite(y) else math.nan) for x, y in points]
            axes.plot(*zip(*gaps, strict=True), color=color, marker=dots, markersize=3, linewidth=1.3, label=label)
            drawn += [value for _, value in finite]
            if column != name and (pick := _better(name)) is not None:
                x, y = pick(finite, key=lambda point: point[1])
                label = f"best {y:.4g} at {along} {x:,.0f}"
                axes.plot(x, y, "*", color=color, markeredgecolor="black", markersize=11, zorder=3, ls="", label=label)
        decades = "loss" in name and drawn and min(drawn) > 0 and max(drawn) >= 100 * min(drawn)
        axes.set_title(f"{name} (log scale)" if decades else name, parse_math=False)
        axes.set_xlabel(along)
        if decades:
            axes.set_yscale("log")
        if len(self.rows) == 1:
            axes.set_xlim(self.rows[0][along] - 1, self.rows[0][along] + 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.grid(alpha=0.3)
        if drawn:
            axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, "no finite value", ha="center", transform=axes.transAxes)


def _better(name: str) -> Callable[..., Any] | None:
    """What finds the best of a metric, where its name tells."""
    if any(word in name for word in _LOWER_IS_BETTER):
        return min
    return max if any(word in name for word in _HIGHER_IS_BETTER) else None
