"""`TensorBoard`: the run's numbers, and the graph of its step, as TensorBoard's event files."""

from __future__ import annotations

import os
from typing import Any

from fnn.train._callback import Callback, Run
from fnn.train._graph import step_graph


class TensorBoard(Callback):
    """Write the metrics of a run, and on request the graph of its step, for ``tensorboard --logdir folder``.

    folder: where the event file goes; None is a new folder of torch's choice, ``runs/<date>_<host>``
    graph: whether to write the operators of one training step, grouped by layer, with their shapes

    The metrics of single steps appear as "step/loss", ..., the columns of the history as "epoch/loss",
    "epoch/eval_loss", ..., both over steps. A run replaces what an earlier one wrote in `folder` after the step that it
    starts from: all of that, or where it goes on from a saved state, what came after it.

    Raises `ImportError` naming the extra to install where tensorboard is absent.

    Example:
        >>> from fnn import train
        >>> board = train.TensorBoard("runs/mnist", graph=True)
        >>> train_state, history = train.fit(
        ...     step, train_state, batches, epochs=10, callbacks=[board]
        ... )  # doctest: +SKIP
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, graph: bool = False):
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ModuleNotFoundError as error:
            raise ImportError(
                'TensorBoard needs tensorboard, which is not installed; pip install "fnn[log]"'
            ) from error
        self.folder, self.graph = folder, graph

    def start(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = None if self.folder is None else os.fspath(self.folder)
        self.writer: Any = SummaryWriter(folder, purge_step=run.step + 1)
        self.folder = self.writer.log_dir
        self._graph_due = self.graph

    def log(self, run: Run, metrics: dict[str, float]) -> None:
        if self._graph_due:
            from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

            graph = step_graph(run.step_fn.update, run.train_state, run.batch)
            self.writer.file_writer.add_event(Event(graph_def=graph))
            self._graph_due = False
        self._scalars("step", run.step, metrics)

    def epoch(self, run: Run, row: dict[str, float]) -> None:
        self._scalars("epoch", run.step, {name: row[name] for name in row if name not in ("epoch", "step")})
        self.writer.flush()

    def end(self, run: Run) -> None:
        self.writer.close()

    def _scalars(self, group: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)
