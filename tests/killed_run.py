"""A run that is killed again and again (started by test_checkpoint_kill.py, in a process of its own).

    python tests/killed_run.py FOLDER KILLS SEED

The run is a forked child, so that each start costs milliseconds: what was imported is there, and one thread computes.
Prints one line of JSON: how often the run was killed before it had ended, the step of its newest checkpoint after each
time, the digest of the final weights and history, and that of a run nobody disturbed.
"""

import contextlib
import hashlib
import json
import os
import random as python_random
import signal
import sys
import time
from pathlib import Path

import torch

from fnn import data, losses, nn, optim, random, train, tree
from fnn.train import _checkpoint_file

KEEP = 2
NET = nn.Sequential(nn.Linear(16), nn.BatchNorm(), nn.tanh, nn.Dropout(0.2), nn.Linear(2))
OPTIMIZER = optim.adam(0.01)


def loss_fn(params, state, batch, key):
    x, labels = batch
    logits, state = NET.apply(params, state, x, key=key, train=True)
    return losses.cross_entropy(logits, labels), (state, {})


def run(folder: Path) -> str:
    """Train, going on from what there is in `folder`; the digest of what came out."""
    x = random.normal(random.key(0), (64, 8))
    labels = (x.sum(1) > 0).long()
    params, state = NET.init(random.key(1), x)
    step = train.make_step(loss_fn, OPTIMIZER, compile=False)
    train_state = train.TrainState.create(params, OPTIMIZER, random.key(2), state=state)

    def evaluate(train_state):
        return {"loss": float(losses.cross_entropy(NET(train_state.params, x, state=train_state.state), labels))}

    checkpoints = train.Checkpointer(folder, every=1, keep=KEEP, monitor="eval_loss")
    stopping = train.EarlyStopping("eval_loss", patience=3, min_delta=0.01)
    train_state, history = train.fit(
        step,
        train_state,
        data.Loader((x, labels), 16, key=random.key(3)),
        epochs=12,
        eval=evaluate,
        callbacks=[stopping],
        checkpoints=checkpoints,
        resume=True,
    )
    digest = hashlib.sha256(repr([row["loss"] for row in history.rows]).encode())
    for path, leaf in tree.paths(train_state).items():
        digest.update(path.encode() + leaf.contiguous().numpy().tobytes())
    return digest.hexdigest()


def forked(folder: Path, result: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    with contextlib.suppress(BaseException):
        result.write_text(run(folder))
        code = 0
    os._exit(code)


def check(folder: Path) -> None:
    """Every checkpoint is whole, and there are no more files than allowed, half-written ones counted."""
    files = [path for path in folder.glob("*") if path.name != ".lock"] + list(folder.glob(".step*"))
    assert len(set(files)) <= KEEP + 1, files
    for path in folder.glob("step_*"):
        _checkpoint_file.read(path)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name[5:13]) for path in folder.glob("step_*")), default=0)


def ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    draw = python_random.Random(seed)
    expected = run(folder / "undisturbed")
    in_time, reached = 0, []
    for _ in range(kills):
        child = forked(folder / "killed", folder / "found")
        goal = (reached[-1] if reached else 0) + draw.randrange(4)
        while newest(folder / "killed") < goal and not ended(child):
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        in_time += os.WIFSIGNALED(status)
        check(folder / "killed")
        reached.append(newest(folder / "killed"))
    _, status = os.waitpid(forked(folder / "killed", folder / "found"), 0)
    assert status == 0, status
    check(folder / "killed")
    found = (folder / "found").read_text()
    print(json.dumps({"killed": in_time, "reached": reached, "expected": expected, "found": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
