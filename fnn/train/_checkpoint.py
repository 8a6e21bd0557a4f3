"""`Checkpointer`: a run on disk, so that it can go on from there bit for bit.

Checkpoints are files ``step_00001234.safetensors`` in one folder (see `_checkpoint_file`), each whole in itself: the
`TrainState`, what the callbacks keep, the rows of the history and what the current row has added up, the config, and
what the order of the data depends on. A new file is complete on disk before an old one goes.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnn.train import _checkpoint_file as checkpoint_file
from fnn.train._callback import Callback, Run
from fnn.train._checkpoint_content import STATE, Saved, by_name, named, put_together, state_like, take_apart
from fnn.train._checkpoint_file import DamagedError
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
    config: options of the run, as plain values; a run that goes on with other options raises
    overwrite: whether a run that starts anew may replace the checkpoints of an unfinished one. Those of a finished run
        are replaced in any case, when the first new one is on disk

    In a loop of your own, call ``train_state = checkpoints.restore(train_state)`` before it and
    ``checkpoints.save(train_state)`` in it.

    Each file has a checksum. Where the newest is damaged, an older good one is taken, with a warning.

    Raises `ValueError` for bad arguments, for a checkpoint of another network or optimizer, naming the first leaf that
    differs, and for another config or other data; `OSError` where the folder cannot be written: what was saved before
    stays; `FileExistsError` where it holds an unfinished run, or is in use by one.

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
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.monitor, self.mode, self.overwrite = monitor, mode, overwrite
        self.config = None if config is None else json.loads(json.dumps(config, default=str))
        self._forget()

    def _forget(self) -> None:
        self.best: tuple[int, float] | None = None
        """Step and value of the best checkpoint, with `monitor`."""
        self._mine: set[int] = set()  # steps whose files are of this run
        self._last: tuple[int, bool] | None = None
        self._loader: dict[str, Any] | None = None
        self._lock: int | None = None

    def __repr__(self) -> str:
        return f"Checkpointer({str(self.folder)!r}, checkpoints at steps {sorted(self._files())})"

    # In a loop of one's own

    def save(self, train_state: TrainState) -> Path:
        """Write a checkpoint of this state alone; returns its file."""
        self.folder.mkdir(parents=True, exist_ok=True)
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
        return train_state if saved is None else state_like(train_state, saved, STATE)

    # Inside fit

    def open(self, run: Run, meter: Meter, loader: Any, *, resume: bool) -> Saved | None:
        """Take the folder for a run; with `resume`, set the run back to its newest good checkpoint and return that."""
        self._forget()
        self._loader = getattr(loader, "identity", None)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            for leftover in self.folder.glob(".step_*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
        except FileExistsError:
            raise
        except OSError as error:
            message = f"Checkpointer: cannot use the folder {self.folder}: {error}; give one that can be written"
            raise OSError(error.errno, message) from error
        try:
            saved = self._newest_good() if resume else None
            if saved is not None:
                self._resume(run, meter, saved)
            elif not resume:
                self._check_finished()
            return saved
        except BaseException:
            self.close()
            raise

    def due(self, step: int) -> bool:
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
        if self._last == (run.step, finished):
            return
        tensors = named(STATE, run.train_state)
        kept = {}
        for name, callback in by_name(callbacks).items():
            state = callback.state()
            if state is not None:
                kept[name] = take_apart(f"callbacks.{name}", state, tensors)
        self._judge(run.step, row)
        facts = {
            "finished": finished,
            "stopped": run.ended,
            "skipped": run.skipped,
            "epochs_done": run.epochs_done,
            "epoch_began": run.epoch_began,
            "row": meter.saved(),
            "rows": run.history.rows,
            "callbacks": kept,
            "loader": self._loader,
        }
        self._write(run.step, tensors, facts)
        self._last = (run.step, finished)

    def restore_callbacks(self, callbacks: Sequence[Callback], saved: Saved, run: Run) -> None:
        """Hand what was saved of the callbacks to those of this run."""
        for name, callback in by_name(callbacks).items():
            kept = saved.facts["callbacks"].get(name)
            if kept is not None:
                callback.restore(put_together(f"callbacks.{name}", kept, saved, run.train_state))

    def close(self) -> None:
        """Give the folder free."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # Files

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.safetensors"

    def _files(self) -> dict[int, Path]:
        """The checkpoints in the folder by step, newest first."""
        if not self.folder.is_dir():
            return {}
        found = {int(match[1]): path for path in self.folder.iterdir() if (match := NAME.fullmatch(path.name))}
        return dict(sorted(found.items(), reverse=True))

    def _write(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Path:
        facts = {
            "format": FORMAT,
            "step": step,
            "config": self.config,
            "best": self.best,
            **facts,
            **_environment(tensors),
        }
        path = self._path(step)
        checkpoint_file.write(path, tensors, facts)
        self._mine.add(step)
        newest = sorted(self._mine, reverse=True)
        best = None if self.best is None else self.best[0]
        others = [n for n in newest if n != best]
        staying = {best, *others[: self.keep - (best in self._mine)]}
        for old, file in self._files().items():
            if old not in staying:
                file.unlink(missing_ok=True)
        self._mine &= staying
        return path

    def _newest_good(self) -> Saved | None:
        damaged: list[str] = []
        for path in self._files().values():
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
        _check_same("config", self.config, facts["config"], saved.path, "go on with the options it was started with")
        if "rows" not in facts:
            raise ValueError(
                f"Checkpointer: {saved.path} was written by save(train_state), and has no run to go on with; "
                "use restore(train_state), then fit without resume"
            )
        _check_same("the order of the data", self._loader, facts["loader"], saved.path, "go on with the same data")
        run.train_state = state_like(run.train_state, saved, STATE)
        run.step = run.started_at = facts["step"]
        run.epochs_done, run.epoch_began, run.skipped = facts["epochs_done"], facts["epoch_began"], facts["skipped"]
        run.ended = facts["stopped"]
        run.history.rows[:] = facts["rows"]
        meter.restore(facts["row"])
        self.best = None if facts["best"] is None else tuple(facts["best"])
        self._mine = {step for step in self._files() if step <= run.step}
        self._last = (run.step, facts["finished"])
        _warn_of_other_environment(saved, run.train_state)

    def _check_finished(self) -> None:
        """Raise where a run that starts anew would take the place of one that could go on."""
        for step, path in self._files().items():
            try:
                finished = checkpoint_file.read_facts(path).get("finished", False)
            except DamagedError:
                finished = False
            if not finished and not self.overwrite:
                raise FileExistsError(
                    f"Checkpointer: {self.folder} holds an unfinished run, saved after step {step}; go on with it "
                    "(resume), choose another folder, or let it be replaced (overwrite)"
                )
            return

    def _take_lock(self) -> None:
        """One run at a time: the system gives the lock free when the process ends, however it ends."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise FileExistsError(
                f"Checkpointer: {self.folder} is in use by another run; give a folder of its own"
            ) from error
        except OSError:  # a file system without locks
            self.close()

    def _judge(self, step: int, row: dict[str, float] | None) -> None:
        """Note whether this row is the best so far."""
        if self.monitor is None or row is None:
            return
        if self.monitor not in row:
            raise ValueError(
                f"Checkpointer: the history has no column {self.monitor!r} to monitor; its columns are {list(row)}"
            )
        value = row[self.monitor]
        better = self.best is None or (value < self.best[1] if self.mode == "min" else value > self.best[1])
        if value == value and better:
            self.best = (step, value)


def _check_same(what: str, now: Any, was: Any, path: Path, cure: str) -> None:
    if now is None or was is None or now == was:
        return
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    listed = ", ".join(f"{name} was {was.get(name)!r}, is {now.get(name)!r}" for name in names)
    raise ValueError(f"Checkpointer: {what} of {path} differs: {listed}; {cure}, or give another folder")


def _environment(tensors: dict[str, Tensor]) -> dict[str, Any]:
    device = next((leaf.device.type for leaf in tensors.values()), "cpu")
    return {"environment": {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}}


def _warn_of_other_environment(saved: Saved, train_state: TrainState) -> None:
    was, now = saved.facts["environment"], _environment(named(STATE, train_state))["environment"]
    differences = [f"{name} was {was[name]}, is {now[name]}" for name in now if was[name] != now[name]]
    if differences:
        warnings.warn(
            f"Checkpointer: {saved.path.name} was written elsewhere ({', '.join(differences)}), so the run goes on "
            "with other rounding than it would have had",
            RuntimeWarning,
            stacklevel=5,
        )
