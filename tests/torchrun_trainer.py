"""A small run that torchrun starts and that may be disturbed (see test_torchrun_kill.py).

    torchrun --nproc-per-node 2 tests/torchrun_trainer.py FOLDER [key=value ...]

kills: so often one of the processes kills itself; at which step, and how long after its start, is drawn from `seed`
terminate: after this step rank 1 sends SIGTERM to torchrun
other: what rank 1 has otherwise than rank 0: "lr"

What came of it is in FOLDER/result.json: why it stopped, its step, the rows of the history without clocks, and a digest
of the state.
"""

import hashlib
import json
import os
import random as python_random
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from fnn import _ranks, data, distributed, losses, nn, optim, random, train, tree

NET = nn.Sequential(nn.Linear(16), nn.BatchNorm(), nn.tanh, nn.Dropout(0.2), nn.Linear(2))
STEPS_AN_EPOCH, EPOCHS = 8, 8
KEEP = 3


class Disturb(train.Callback):
    """What happens to the run."""

    def __init__(self, folder, kills=0, seed=0, terminate=None):
        self.notes, self.kills, self.seed, self.terminate = folder / "kills", int(kills), seed, terminate

    def start(self, run):
        self.kill_at = None
        done = len(self.notes.read_text().splitlines()) if self.notes.exists() else 0
        if done < self.kills:
            draw = python_random.Random(f"{self.seed} {done}")
            rank, after, self.delay = draw.randrange(_ranks.count()), draw.randrange(2, 20), draw.uniform(0.0, 0.03)
            if rank == _ranks.rank():
                self.kill_at = min(run.step + after, run.total_steps - 1)

    def step(self, run):
        if run.step == self.kill_at:
            with self.notes.open("a") as file:
                file.write(f"rank {_ranks.rank()} after step {run.step}\n")
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if self.kill_at is not None or self.terminate is not None:
            time.sleep(0.005)
        if self.terminate is not None and run.step == int(self.terminate) and _ranks.rank() == 1:
            os.kill(os.getppid(), signal.SIGTERM)


def main(folder, other=None, **disturbances):
    """The same as in the file, from a process that is in a group already."""
    folder = Path(folder)
    mesh = distributed.init(device="cpu", timeout=20.0, quiet=False)
    x = random.normal(random.key(0), (64, 8))
    labels = (x.sum(1) > 0).long()

    def loss_fn(params, state, batch, key):
        logits, state = NET.apply(params, state, batch[0], key=key, train=True)
        return losses.cross_entropy(logits, batch[1]), (state, {})

    optimizer = optim.adam(0.02 if other == "lr" and _ranks.rank() == 1 else 0.01)
    params, state = NET.init(random.key(1), x)
    step = train.make_step(loss_fn, optimizer, compile=False, mesh=mesh)
    train_state, history = train.fit(
        step,
        train.TrainState.create(params, optimizer, random.key(2), state=state),
        data.Loader((x, labels), 64 // STEPS_AN_EPOCH, key=random.key(3), shard=mesh),
        epochs=EPOCHS,
        log_every=4,
        callbacks=[Disturb(folder, **disturbances)],
        checkpoints=train.Checkpointer(folder / "checkpoints", every=5, keep=KEEP),
        resume=True,
    )
    digest = hashlib.sha256()
    for path, leaf in tree.paths(train_state).items():
        digest.update(path.encode() + leaf.contiguous().numpy().tobytes())
    rows = [{name: row[name] for name in ("epoch", "step", "loss")} for row in history.rows]
    result = {"stopped": history.stopped, "step": int(train_state.step), "rows": rows, "digest": digest.hexdigest()}
    everyone = _ranks.gather("the test", result)
    assert all(one == result for one in everyone), everyone
    if _ranks.is_main():
        (folder / "result.json").write_text(json.dumps(result))
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], **dict(argument.split("=") for argument in sys.argv[2:]))
