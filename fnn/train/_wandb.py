"""`WandB`: the run's numbers for Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fnn.train._callback import Callback, Run
from fnn.train._rates import learning_rates


class WandB(Callback):
    """Send the metrics of a run to Weights & Biases, or keep them for it (``mode="offline"``).

    project: where the run appears
    config: its hyper-parameters
    options: for `wandb.init`: name, tags, dir, mode, ...

    The metrics of single steps appear as "step/loss", ..., learning rates among them, the columns of the history as
    "epoch/loss", "epoch/eval_loss", ..., both over the number of steps. A run that goes on from a checkpoint goes on
    under the same id; the steps that it repeats are then there twice. Of several processes rank 0 alone sends them.

    wandb is imported when this is made, not with fnn. Raises `ImportError` where it is absent, and
    `TypeError` for a config that is no mapping.

    Example:
        >>> from fnn import train
        >>> board = train.WandB("digits", config={"lr": 3e-3}, mode="offline")  # doctest: +SKIP
    """

    main_only = True

    def __init__(self, project: str, config: Mapping[str, Any] | None = None, **options: Any):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise ImportError("WandB needs wandb, which is not installed; pip install wandb") from error
        if config is not None and not isinstance(config, Mapping):
            raise TypeError(f"WandB: config is {type(config).__name__}, expected a dict (dataclasses.asdict)")
        self._wandb = wandb
        self._options = {"resume": "allow", **options, "project": project, "config": dict(config or {})}

    def start(self, run: Run) -> None:
        self._id, self._open = None, None

    def log(self, run: Run, metrics: dict[str, float]) -> None:
        self._send("step", run.step, metrics | learning_rates(run.train_state.opt_state))

    def epoch(self, run: Run, row: dict[str, float]) -> None:
        self._send("epoch", run.step, {name: row[name] for name in row if name not in ("epoch", "step")})

    def end(self, run: Run) -> None:
        if self._open is None:
            return
        if run.stop_reason is not None:
            self._open.summary["stopped"] = run.stop_reason
        self._open.finish()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the id of the run."""
        return {"id": self._run().id}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on under the id that `state` gave."""
        self._id = saved["id"]

    def _run(self) -> Any:
        """wandb's run, begun when there is something to send: `restore`, which knows its id, comes after `start`."""
        if self._open is None:
            known = {"id": self._id} if self._id is not None else {}
            self._open = self._wandb.init(**self._options | known)
            self._open.define_metric("steps")
            self._open.define_metric("*", step_metric="steps")
        return self._open

    def _send(self, group: str, step: int, values: dict[str, float]) -> None:
        self._run().log({f"{group}/{name}": value for name, value in values.items()} | {"steps": step})
