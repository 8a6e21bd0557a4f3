"""`Checkpointer`: a run on disk, so that it can go on from there bit for bit.

Checkpoints are files ``step_00001234.safetensors`` in one folder (see `_checkpoint_file`), each whole in itself: the
`TrainState`, what the callbacks keep, the rows of the history and what the current row has added up, the config, and
what the batches depend on. A new file is complete on disk before an old one goes.

A state that is parted over processes (`DTensor` leaves) goes into a folder ``step_00001234`` instead (see
`_checkpoint_sharded`). Where a run has several processes rank 0 alone decides, locks, deletes, and writes what is not
parted; each process reads for itself. An error is raised on all of them.

Each file has the number of its run. A run that takes the place of another one has the next number, so that a process
which is killed while both have files here leaves no doubt about which of them goes on.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fnn._placement import check_same_leaves, is_parted
from fnn._ranks import count, everywhere, is_main, on_main
from fnn.train import _checkpoint_file as checkpoint_file
from fnn.train import _checkpoint_folder as files
from fnn.train import _checkpoint_sharded as checkpoint_sharded
from fnn.train._callback import Callback, Run
from fnn.train._checkpoint_content import STATE, apply_rows, named, state_like, take_callbacks, take_rows
from fnn.train._checkpoint_file import DamagedError
from fnn.train._checkpoint_lock import give_back
from fnn.train._checkpoint_origin import (
    check_processes,
    check_same,
    check_same_everywhere,
    environment,
    plain,
    warn_of_other_environment,
)
from fnn.train._checkpoint_saved import WHO, Saved, read
from fnn.train._meter import Meter
from fnn.train._state import TrainState

FORMAT = 1


class Checkpointer:
    """Where `fit` saves a run: at each row of the history, every `every` steps, at the end, and on Ctrl-C or SIGTERM.

    folder: made when the run starts
    every: steps from one checkpoint to the next, beside those at the rows; None saves at the rows only
    keep: how many checkpoints stay: the newest ones, the best among them. While one is written there is one more
    monitor: a column of the history; the checkpoint where it was best stays
    mode: "min" where lower is better, "max" where higher is
    config: options of the run, as plain values by name; a run that goes on with other options raises
    overwrite: whether a run that starts anew may replace the checkpoints of an unfinished one. Those of a finished run
        are replaced in any case, when the first new one is on disk
    reshard: whether `fit` may go on with another number of processes than the run had, which rounds otherwise

    In a loop of your own, call ``train_state = checkpoints.restore(train_state)`` before it and
    ``checkpoints.save(train_state)`` in it. What it saves takes the place of later steps that were there.

    Each file has a checksum. Where the newest is damaged, an older good one is taken, with a warning.

    In a run of several processes each of them makes the same Checkpointer and calls the same methods; the folder lies
    on a file system that all of them share. A state with `DTensor` leaves is saved by all processes, in a folder
    ``step_00001234`` that `torch.distributed.checkpoint` fills. `restore` takes either kind, of any number of
    processes, to a state of either kind with any placements, bit for bit.

    Raises `TypeError` or `ValueError` for bad arguments, for a checkpoint of another network or optimizer, naming the
    first leaf that differs, and for another config or other data; `OSError` where the folder cannot be written: what
    was saved before stays; `FileExistsError` where it holds an unfinished run, or is in use by one.

    Example:
        >>> import tempfile
        >>> from fnn import optim, random, train
        >>> checkpoints = train.Checkpointer(tempfile.mkdtemp())
        >>> train_state = train.TrainState.create({"w": torch.ones(2)}, optim.sgd(0.1), random.key(0))
        >>> path = checkpoints.save(train_state)
        >>> path.name
        'step_00000000.safetensors'
        >>> checkpoints.restore(train_state).params
        {'w': tensor([1., 1.])}
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int | None = None,
        keep: int = 3,
        monitor: str | None = None,
        mode: str = "min",
        config: dict[str, Any] | None = None,
        overwrite: bool = False,
        reshard: bool = False,
    ):
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"Checkpointer: {name} is {value!r}, expected a whole number of at least 1")
        if monitor is not None and keep < 2:
            raise ValueError("Checkpointer: keep is 1, expected at least 2 with monitor: the newest and the best")
        if mode not in ("min", "max"):
            raise ValueError(f"Checkpointer: mode is {mode!r}, expected 'min' or 'max'")
        self.folder, self.every, self.keep = Path(folder).absolute(), every, keep
        self.monitor, self.mode, self.overwrite, self.reshard = monitor, mode, overwrite, reshard
        self.config = plain("config", config)
        self._lock: int | None = None
        self._forget()

    def _forget(self) -> None:
        self.best: tuple[int, float] | None = None
        """Step and value of the best checkpoint, with `monitor`."""
        self._run: int | None = None  # the number of the run that is saved here, once it has begun
        self._mine: dict[int, Path] = {}  # the checkpoints of that run
        self._last: tuple[int, int, bool] | None = None
        self._batches: dict[str, Any] | None = None

    def __repr__(self) -> str:
        steps = sorted({step for step, _ in files.files(self.folder)})
        return f"Checkpointer({str(self.folder)!r}, checkpoints at steps {steps})"

    # In a loop of one's own

    def save(self, train_state: TrainState) -> Path:
        """Write a checkpoint of this state alone; returns its file, or its folder."""
        tensors = named(STATE, train_state)
        on_main(WHO, lambda: files.make(self.folder))
        if self._run is None:
            self._check_everywhere(tensors)
            self._begin()
        return self._write(int(train_state.step), tensors, {})

    def restore(self, train_state: TrainState, *, best: bool = False) -> TrainState:
        """The newest good checkpoint, or the best one, as a state like `train_state`; that itself where there is none.

        Leaves come back with the strides, the placements and on the device of those of `train_state`.
        """
        self._check_everywhere(named(STATE, train_state), best=best)
        saved = self._newest_good()
        if saved is not None and best:
            saved = self._best_of(saved)
        if saved is None:
            return train_state
        found = saved
        check_same("config", self.config, found.facts["config"], found.path, "go on with the same options")
        restored = everywhere(WHO, lambda: state_like(train_state, found, STATE))
        if self._run is None:
            self._go_on(found)
        return restored

    # Inside fit

    def open(self, run: Run, meter: Meter, loader: Any, *, resume: bool) -> Saved | None:
        """Take the folder for a run; with `resume`, set the run back to its newest good checkpoint and return that."""
        on_main(WHO, self._take_lock)
        self._forget()
        try:
            on_main(WHO, lambda: files.clear_leftovers(self.folder))
            identity = {"batches": run.steps_per_epoch, **getattr(loader, "identity", {})}
            self._batches = everywhere(WHO, lambda: plain("the loader's identity", identity))
            self._check_everywhere(named(STATE, run.train_state), resume=resume, data=self._batches)
            saved = self._newest_good() if resume else None
            if saved is None:
                self._begin()
            else:
                self._resume(run, meter, saved)
            return saved
        except BaseException:
            self.close()
            raise

    def due(self, step: int) -> bool:
        """Whether this step is one of every `every`."""
        return self.every is not None and step % self.every == 0

    def save_run(
        self,
        run: Run,
        meter: Meter,
        callbacks: Sequence[Callback],
        row: dict[str, float] | None = None,
        *,
        finished: bool = False,
    ) -> None:
        """Save the run between two steps; `row` is the one that was just written, `finished` whether it is the last."""
        state = (run.step, len(run.history.rows), finished)
        if self._last == state:
            return
        tensors = named(STATE, run.train_state)
        facts = {
            "finished": finished,
            "stopped": run.ended,
            "skipped": run.skipped,
            "epochs_done": run.epochs_done,
            "epoch_began": run.epoch_began,
            "row": meter.saved(),
            "callbacks": everywhere(WHO, lambda: take_callbacks(callbacks, tensors)),
            "data": self._batches,
        }
        take_rows(run.history, tensors)
        if self.monitor is not None and row is not None:
            self.best = on_main(WHO, lambda: self._judged(run, row))
        self._write(run.step, tensors, facts)
        self._last = state

    def close(self) -> None:
        """Give the folder free."""
        give_back(self._lock)
        self._lock = None

    def _take_lock(self) -> None:
        self._lock = files.take(self.folder)

    def _check_everywhere(self, tensors: dict[str, Tensor], **values: Any) -> None:
        """Raise, on every process, where one was given something else."""
        own = {name: getattr(self, name) for name in ("every", "keep", "monitor", "mode", "overwrite", "reshard")}
        check_same_everywhere({"folder": str(self.folder), **own, "config": self.config, **values})
        check_same_leaves(WHO, tensors, "make the same state on every process")

    def _begin(self) -> None:
        """Start a new run."""
        self._run = on_main(WHO, lambda: files.next_run(self.folder, overwrite=self.overwrite))

    def _go_on(self, saved: Saved) -> None:
        """Let what is saved from now on be of the run that wrote a checkpoint."""
        facts = saved.facts
        self._run = facts["run"]
        self._mine = on_main(WHO, lambda: files.of_run(self.folder, facts["run"], facts["step"]))
        best = facts["best"] if facts["monitor"] == [self.monitor, self.mode] else None
        self.best = None if best is None else tuple(best)

    def _write(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
        facts = {
            "format": FORMAT,
            "run": self._run,
            "step": step,
            "config": self.config,
            "best": self.best,
            "monitor": [self.monitor, self.mode],
            "environment": environment({name: leaf for name, leaf in tensors.items() if name.startswith(f"{STATE}.")}),
            "processes": count(),
            **facts,
        }
        parted = {name: leaf for name, leaf in tensors.items() if is_parted(leaf)}
        check_same_leaves(WHO, parted, "make the same state, and give the same callbacks, on every process")
        path = on_main(WHO, lambda: files.new_path(self.folder, step, parted=bool(parted)))
        if parted:
            checkpoint_sharded.write(path, tensors, facts)
        else:
            on_main(WHO, lambda: checkpoint_file.write(path, tensors, facts))
        mine = {n: other for n, other in self._mine.items() if n < step} | {step: path}
        best = None if self.best is None else self.best[0]
        self._mine = on_main(WHO, lambda: files.prune(self.folder, mine, best, self.keep))
        return path

    def _newest_good(self) -> Saved | None:
        damaged: list[str] = []
        for _, path, _ in on_main(WHO, lambda: files.by_age(self.folder)):
            try:
                saved = read(path)
            except DamagedError as error:
                damaged.append(f"{path.name} ({error})")
                continue
            if saved.facts.get("format") != FORMAT:
                raise ValueError(
                    f"Checkpointer: {path} has format {saved.facts.get('format')}, this version reads format {FORMAT}; "
                    "use the version of fnn that wrote it, or another folder"
                )
            if damaged and is_main():
                warnings.warn(
                    f"Checkpointer: damaged in {self.folder}: {', '.join(damaged)}; going on from {path.name}",
                    RuntimeWarning,
                    stacklevel=4,
                )
            return saved
        if damaged:
            raise ValueError(
                f"Checkpointer: no checkpoint in {self.folder} is good: {', '.join(damaged)}; delete the folder to "
                "start anew"
            )
        return None

    def _best_of(self, saved: Saved) -> Saved:
        """The best checkpoint of the run of a newer one."""
        found = saved.facts.get("best")
        if found is None:
            raise ValueError(f"Checkpointer: {self.folder} has no best checkpoint; give fit a Checkpointer(monitor=)")
        path = on_main(WHO, lambda: files.path_of(self.folder, saved.facts["run"], found[0]))
        try:
            return read(path)
        except (DamagedError, FileNotFoundError) as error:
            raise ValueError(f"Checkpointer: the best checkpoint, {path}, cannot be used: {error}") from error

    def _resume(self, run: Run, meter: Meter, saved: Saved) -> None:
        facts = saved.facts
        check_same("config", self.config, facts["config"], saved.path, "go on with the options it was started with")
        if "row" not in facts:
            raise ValueError(
                f"Checkpointer: {saved.path} was written by save(train_state), and has no run to go on with; "
                "use restore(train_state), then fit without resume"
            )
        check_same("the data", self._batches, facts["data"], saved.path, "go on with the same data in the same order")
        processes = facts.get("processes", 1)
        if not self.reshard:
            check_processes(processes, saved.path)
        run.train_state = everywhere(WHO, lambda: state_like(run.train_state, saved, STATE))
        run.step = run.started_at = facts["step"]
        run.epochs_done, run.epoch_began, run.skipped = facts["epochs_done"], facts["epoch_began"], facts["skipped"]
        run.ended = facts["stopped"]
        everywhere(WHO, lambda: apply_rows(run.history, saved))
        meter.restore(facts["row"])
        self._go_on(saved)
        self._last = (run.step, len(run.history.rows), facts["finished"])
        if is_main() and processes == count():
            now = environment(named(STATE, run.train_state))
            warn_of_other_environment(facts["environment"], now, saved.path)

    def _judged(self, run: Run, row: dict[str, float]) -> tuple[int, float] | None:
        """The best so far, this row among them."""
        if self.monitor not in row:
            if run.stop_reason is not None:  # a row that was broken off is not evaluated
                return self.best
            raise ValueError(
                f"Checkpointer: the history has no column {self.monitor!r} to monitor; its columns are {list(row)}"
            )
        value = row[self.monitor]
        better = self.best is None or (value < self.best[1] if self.mode == "min" else value > self.best[1])
        return (run.step, value) if value == value and better else self.best
