"""`TensorBoard`: what happens in a run, and the graph of its step, as TensorBoard's event files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fnn import _ranks, tree
from fnn._placement import whole
from fnn.train._callback import Callback, Run
from fnn.train._graph import step_graph
from fnn.train._rates import learning_rates


class TensorBoard(Callback):
    """Write the metrics of a run, and on request more, for ``tensorboard --logdir folder``.

    folder: where the event file goes; None is a new folder of torch's choice, ``runs/<date>_<host>``
    graph: whether to write the operators of one training step, grouped by layer, with their shapes
    histograms: write the distribution of each parameter at every so many rows of the history; None writes none
    images: ``images(run) -> {name: (n, c, h, w) tensor}`` with 1 or 3 channels, drawn as a grid at each row; uint8, or
        floating in [0, 1]. Floating numbers beyond that are scaled, all of a name together, to fill it;
        what is not finite is drawn as 0
    config: hyper-parameters by name, which the HPARAMS tab shows beside the last value of each column of the history;
        a dict within it is written under names such as "optimizer.lr"

    The metrics of single steps appear as "step/loss", ..., learning rates among them, the columns of the history as
    "epoch/loss", "epoch/eval_loss", ..., both over steps. A run replaces what an earlier one wrote in `folder` after
    the step that it starts from: all of that, or where it goes on from a saved state, what came after it. The row that
    an interruption broke off stays, beside the whole row that the resumed run writes. Of several processes rank 0 alone
    writes, while all of them gather parted parameters for `histograms` and call `images`.

    Raises `ImportError` naming the extra to install where tensorboard is absent, `TypeError` or `ValueError` for bad
    arguments and for images of another shape.

    Example:
        >>> from fnn import train
        >>> board = train.TensorBoard("runs/mnist", graph=True, histograms=1, config={"lr": 1e-3})
        >>> train_state, history = train.fit(
        ...     step, train_state, batches, epochs=10, callbacks=[board]
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        graph: bool = False,
        histograms: int | None = None,
        images: Callable[[Run], dict[str, Tensor]] | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ModuleNotFoundError as error:
            raise ImportError(
                'TensorBoard needs tensorboard, which is not installed; pip install "fnn[log]"'
            ) from error
        whole = isinstance(histograms, int) and not isinstance(histograms, bool)
        if histograms is not None and (not whole or histograms < 1):
            raise ValueError(f"TensorBoard: histograms is {histograms!r}, expected a number of rows of at least 1")
        if config is not None and not isinstance(config, Mapping):
            raise TypeError(f"TensorBoard: config is {type(config).__name__}, expected a dict (dataclasses.asdict)")
        self.folder, self.graph, self.histograms, self.images = folder, graph, int(histograms or 0), images
        self.config = None if config is None else _flat(config)

    def start(self, run: Run) -> None:
        self.writer: Any = None
        if not _ranks.is_main():
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = None if self.folder is None else os.fspath(self.folder)
        self.writer = SummaryWriter(folder, purge_step=run.step + 1)
        self.folder = self.writer.log_dir
        self._graph_due, self._columns = self.graph, None

    def log(self, run: Run, metrics: dict[str, float]) -> None:
        if self.writer is None:
            return
        if self._graph_due:
            from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

            graph = step_graph(run.step_fn.update, run.train_state, run.batch)
            self.writer.file_writer.add_event(Event(graph_def=graph))
            self._graph_due = False
        self._scalars("step", run.step, metrics | learning_rates(run.train_state.opt_state))

    def epoch(self, run: Run, row: dict[str, float]) -> None:
        due = self.histograms and len(run.history.rows) % self.histograms == 0
        images = self.images(run) if self.images is not None else {}
        for path, leaf in tree.paths(run.train_state.params).items() if due else ():
            values = whole(leaf.detach())
            if self.writer is not None and values.numel():
                self.writer.add_histogram(f"params/{path.replace('.', '/')}", values.float(), run.step)
        if self.writer is None:
            return
        columns = {name: row[name] for name in row if name not in ("epoch", "step")}
        self._scalars("epoch", run.step, columns)
        if self.config is not None and self._columns != list(columns):
            self._columns = list(columns)
            self._hyperparameters(ended=False)
        for name, drawn in images.items():
            self.writer.add_images(name, _drawable(name, drawn), run.step)
        self.writer.flush()

    def end(self, run: Run) -> None:
        if self.writer is None:
            return
        if self.config is not None and self._columns is not None:
            self._hyperparameters(ended=True)
        self.writer.close()

    def _scalars(self, group: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)

    def _hyperparameters(self, ended: bool) -> None:
        """What the HPARAMS tab reads, in this event file: `SummaryWriter.add_hparams` would begin a run of its own."""
        from torch.utils.tensorboard.summary import hparams

        columns = {f"epoch/{name}": 0.0 for name in self._columns or ()}
        experiment, session_start, session_end = hparams(self.config, columns)
        for summary in (session_end,) if ended else (experiment, session_start):
            self.writer.file_writer.add_summary(summary)


def _flat(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Numbers stay numbers, a mapping within becomes names with dots, and all else is written as text."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{path}{name}.")
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            flat[f"{path}{name}"] = value if number else str(value)
    return flat


def _drawable(name: str, images: Tensor) -> Tensor:
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"TensorBoard: images {name!r} have shape {tuple(images.shape)}, expected (n, 1 or 3, h, w)")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"TensorBoard: images {name!r} are {images.dtype}, expected uint8 or floating")
    images = torch.nan_to_num(images.detach().float(), 0.0, 0.0, 0.0)
    low, high = images.min(), images.max()
    return images if low >= 0 and high <= 1 else (images - low) / (high - low).clamp(min=1e-12)
