"""`Checkpointer`: a run on disk, so that it can go on from there bit for bit.

Checkpoints are files ``step_00001234.safetensors`` in one folder (see `_checkpoint_file`), each whole in itself: the
`TrainState`, what the callbacks keep, the rows of the history and what the current row has added up, the config, and
what the batches depend on. A new file is complete on disk before an old one goes.

Each file has the number of its run. A run that takes the place of another one has the next number, so that a process
which is killed while both have files here leaves no doubt about which of them goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fnn.train import _checkpoint_file as checkpoint_file
from fnn.train._callback import Callback, Run
from fnn.train._checkpoint_content import (
    STATE,
    Saved,
    apply_rows,
    named,
    state_like,
    take_callbacks,
    take_rows,
)
from fnn.train._checkpoint_file import DamagedError
from fnn.train._checkpoint_lock import give_back, take_lock
from fnn.train._checkpoint_origin import check_same, environment, plain, warn_of_other_environment
from fnn.train._meter import Meter
from fnn.train._state import TrainState

NAME = re.compile(r"step_(\d+)\.safetensors")
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

    In a loop of your own, call ``train_state = checkpoints.restore(train_state)`` before it and
    ``checkpoints.save(train_state)`` in it. What it saves takes the place of later steps that were there.

    Each file has a checksum. Where the newest is damaged, an older good one is taken, with a warning.

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
    ):
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"Checkpointer: {name} is {value!r}, expected a whole number of at least 1")
        if monitor is not None and keep < 2:
            raise ValueError("Checkpointer: keep is 1, expected at least 2 with monitor: the newest and the best")
        if mode not in ("min", "max"):
            raise ValueError(f"Checkpointer: mode is {mode!r}, expected 'min' or 'max'")
        self.folder, self.every, self.keep = Path(folder).absolute(), every, keep
        self.monitor, self.mode, self.overwrite = monitor, mode, overwrite
        self.config = plain("config", config)
        self._lock: int | None = None
        self._forget()

    def _forget(self) -> None:
        self.best: tuple[int, float] | None = None
        """Step and value of the best checkpoint, with `monitor`."""
        self._run: int | None = None  # the number of the run that is saved here, once it has begun
        self._mine: set[int] = set()  # the steps of which that run has files
        self._last: tuple[int, int, bool] | None = None
        self._batches: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"Checkpointer({str(self.folder)!r}, checkpoints at steps {sorted(self._files())})"

    # In a loop of one's own

    def save(self, train_state: TrainState) -> Path:
        """Write a checkpoint of this state alone; returns its file."""
        self._make_folder()
        if self._run is None:
            self._begin()
        return self._write(int(train_state.step), named(STATE, train_state), {})

    def restore(self, train_state: TrainState, *, best: bool = False) -> TrainState:
        """The newest good checkpoint, or the best one, as a state like `train_state`; that itself where there is none.

        Leaves come back with the strides and on the device of those of `train_state`.
        """
        saved = self._newest_good()
        if saved is not None and best:
            found = saved.facts.get("best")
            if found is None:
                raise ValueError(
                    f"Checkpointer: {self.folder} has no best checkpoint; give fit a Checkpointer(monitor=)"
                )
            path = self._path(found[0])
            try:
                saved = Saved(path, *checkpoint_file.read(path))
            except (DamagedError, FileNotFoundError) as error:
                raise ValueError(f"Checkpointer: the best checkpoint, {path}, cannot be used: {error}") from error
        if saved is None:
            return train_state
        check_same("config", self.config, saved.facts["config"], saved.path, "go on with the same options")
        restored = state_like(train_state, saved, STATE)
        if self._run is None:
            self._go_on(saved)
        return restored

    # Inside fit

    def open(self, run: Run, meter: Meter, loader: Any, *, resume: bool) -> Saved | None:
        """Take the folder for a run; with `resume`, set the run back to its newest good checkpoint and return that."""
        try:
            self._make_folder()
            lock = take_lock(self.folder)
        except FileExistsError:
            raise
        except OSError as error:
            message = f"Checkpointer: cannot use the folder {self.folder}: {error}; give one that can be written"
            raise OSError(error.errno, message) from error
        self._forget()
        self._lock = lock
        try:
            for leftover in self.folder.glob(".step_*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
            identity = {"batches": run.steps_per_epoch, **getattr(loader, "identity", {})}
            self._batches = plain("the loader's identity", identity)
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
            "callbacks": take_callbacks(callbacks, tensors),
            "data": self._batches,
        }
        take_rows(run.history, tensors)
        self._judge(run, row)
        self._write(run.step, tensors, facts)
        self._last = state

    def close(self) -> None:
        """Give the folder free."""
        give_back(self._lock)
        self._lock = None

    # Files

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.safetensors"

    def _files(self) -> dict[int, Path]:
        """The checkpoints in the folder by step."""
        if not self.folder.is_dir():
            return {}
        names = ((NAME.fullmatch(path.name), path) for path in self.folder.iterdir() if path.is_file())
        return {int(match[1]): path for match, path in names if match}

    def _by_age(self) -> list[tuple[int, Path, dict[str, Any]]]:
        """Step, file and facts of the checkpoints, newest first; one whose facts cannot be read may be the newest."""
        found = [(step, path, checkpoint_file.facts_or_none(path) or {}) for step, path in self._files().items()]
        return sorted(found, key=lambda file: (file[2].get("run", math.inf), file[0]), reverse=True)

    def _make_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"Checkpointer: {self.folder} is a file; give the name of a folder")
        self.folder.mkdir(parents=True, exist_ok=True)

    def _begin(self) -> None:
        """Start a new run; raise where it would take the place of one that could go on."""
        files = self._by_age()
        if files and not files[0][2].get("finished", False) and not self.overwrite:
            raise FileExistsError(
                f"Checkpointer: {self.folder} holds an unfinished run, saved after step {files[0][0]}; go on with it "
                "(resume, or restore), choose another folder, or let it be replaced (overwrite)"
            )
        self._run = 1 + max((facts.get("run", 0) for *_, facts in files), default=0)

    def _go_on(self, saved: Saved) -> None:
        """Let what is saved from now on be of the run that wrote a checkpoint."""
        facts = saved.facts
        self._run = facts["run"]
        same_run = (step for step, _, other in self._by_age() if other.get("run") == self._run)
        self._mine = {step for step in same_run if step <= facts["step"]}
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
            "environment": environment(tensors),
            **facts,
        }
        path = self._path(step)
        checkpoint_file.write(path, tensors, facts)
        self._mine = {n for n in self._mine if n < step} | {step}
        best = None if self.best is None else self.best[0]
        others = sorted(self._mine - {best}, reverse=True)
        staying = {best, *others[: self.keep - (best in self._mine)]}
        for old, file in self._files().items():
            if old not in staying:
                with contextlib.suppress(OSError):  # what was saved is good; the next time tries again
                    file.unlink(missing_ok=True)
        self._mine &= staying
        return path

    def _newest_good(self) -> Saved | None:
        damaged: list[str] = []
        for _, path, _ in self._by_age():
            try:
                saved = Saved(path, *checkpoint_file.read(path))
            except DamagedError as error:
                damaged.append(f"{path.name} ({error})")
                continue
            if saved.facts.get("format") != FORMAT:
                raise ValueError(
                    f"Checkpointer: {path} has format {saved.facts.get('format')}, this version reads format {FORMAT}; "
                    "use the version of fnn that wrote it, or another folder"
                )
            if damaged:
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

    def _resume(self, run: Run, meter: Meter, saved: Saved) -> None:
        facts = saved.facts
        check_same("config", self.config, facts["config"], saved.path, "go on with the options it was started with")
        if "row" not in facts:
            raise ValueError(
                f"Checkpointer: {saved.path} was written by save(train_state), and has no run to go on with; "
                "use restore(train_state), then fit without resume"
            )
        check_same("the data", self._batches, facts["data"], saved.path, "go on with the same data in the same order")
        run.train_state = state_like(run.train_state, saved, STATE)
        run.step = run.started_at = facts["step"]
        run.epochs_done, run.epoch_began, run.skipped = facts["epochs_done"], facts["epoch_began"], facts["skipped"]
        run.ended = facts["stopped"]
        apply_rows(run.history, saved)
        meter.restore(facts["row"])
        self._go_on(saved)
        self._last = (run.step, len(run.history.rows), facts["finished"])
        now = environment(named(STATE, run.train_state))
        warn_of_other_environment(facts["environment"], now, saved.path)

    def _judge(self, run: Run, row: dict[str, float] | None) -> None:
        """Note whether this row is the best so far."""
        if self.monitor is None or row is None:
            return
        if self.monitor not in row:
            if run.stop_reason is not None:  # a row that was broken off is not evaluated
                return
            raise ValueError(
                f"Checkpointer: the history has no column {self.monitor!r} to monitor; its columns are {list(row)}"
            )
        value = row[self.monitor]
        better = self.best is None or (value < self.best[1] if self.mode == "min" else value > self.best[1])
        if value == value and better:
            self.best = (run.step, value)
