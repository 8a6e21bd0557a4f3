"""The folder of checkpoints: whose it is, what stays in it, and what does not belong there."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from fnn import data, losses, nn, optim, random, train

NET = nn.Linear(2)
OPTIMIZER = optim.sgd(0.1)
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def loss_fn(params, state, batch, key):
    return losses.cross_entropy(NET(params, batch[0]), batch[1]), (state, {})


def start(seed=0):
    params, state = NET.init(random.key(seed), X)
    return train.TrainState.create(params, OPTIMIZER, random.key(1), state=state)


def run(checkpoints, *, epochs=3, seed=0, **options):
    """Two steps an epoch."""
    if not isinstance(checkpoints, train.Checkpointer):
        checkpoints = train.Checkpointer(checkpoints)
    step = train.make_step(loss_fn, OPTIMIZER, compile=False)
    return train.fit(step, start(seed), data.Loader((X, Y), 16), epochs=epochs, checkpoints=checkpoints, **options)


def steps(folder):
    return sorted(int(path.name[5:13]) for path in folder.glob("step_*"))


class Do(train.Callback):
    """Something at one of the moments that callbacks know."""

    def __init__(self, moment, act):
        setattr(self, moment, lambda run, *_: act(run))


def failing(run):
    raise OSError("no more")


@pytest.mark.parametrize("moment", ["start", "epoch", "end"])
def test_an_error_of_a_callback_leaves_the_folder_free(tmp_path, moment):
    ended = []
    with pytest.raises(OSError, match="no more"):
        run(tmp_path, callbacks=[Do("end", ended.append), Do(moment, failing), Do("end", ended.append)])
    assert len(ended) == (1 if moment == "start" else 2)
    run(train.Checkpointer(tmp_path, overwrite=True))


def test_a_run_with_nothing_to_do_leaves_the_folder_free(tmp_path):
    train_state, _ = run(tmp_path / "first")
    step = train.make_step(loss_fn, OPTIMIZER, compile=False)
    with pytest.warns(RuntimeWarning, match="nothing to do"):
        train.fit(
            step, train_state, data.Loader((X, Y), 16), epochs=3, checkpoints=train.Checkpointer(tmp_path / "other")
        )
    run(tmp_path / "other")


def test_one_checkpointer_serves_one_run_at_a_time_and_then_another(tmp_path):
    checkpoints = train.Checkpointer(tmp_path, keep=2)

    def inner(_):
        for other in (checkpoints, train.Checkpointer(tmp_path)):
            with pytest.raises(FileExistsError, match="in use by another run"):
                run(other)

    run(checkpoints, callbacks=[Do("epoch", inner)])
    assert steps(tmp_path) == [4, 6]
    run(checkpoints, epochs=1)
    run(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_process_that_outlives_the_run_does_not_hold_the_folder(tmp_path):
    children = []

    def fork(_):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        children.append(child)

    try:
        run(tmp_path, callbacks=[Do("start", fork)])
        run(tmp_path)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_what_looks_like_a_checkpoint_and_is_a_folder_is_left_alone(tmp_path):
    (tmp_path / "step_00000099.safetensors").mkdir()
    run(tmp_path, epochs=1)
    run(tmp_path, resume=True)
    assert steps(tmp_path) == [2, 4, 6, 99]


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"file is a file; give the name of a folder"):
        run(tmp_path / "file")
    with pytest.raises(FileExistsError, match=r"file is a file; give the name of a folder"):
        train.Checkpointer(tmp_path / "file").save(start())


def test_the_folder_stays_the_same_when_the_working_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    run("run", callbacks=[Do("start", lambda _: os.chdir("elsewhere"))])
    assert steps(tmp_path / "run") == [2, 4, 6]


def test_a_run_that_was_killed_while_it_replaced_another_goes_on_itself(tmp_path, monkeypatch):
    """The other one has got further, so its files have greater numbers."""
    run(tmp_path)
    unlink = Path.unlink

    def killed(path, **options):
        if path.name.startswith("step_"):
            raise KeyboardInterrupt
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, seed=1)
    monkeypatch.undo()
    assert steps(tmp_path) == [2, 4, 6]
    with pytest.raises(FileExistsError, match="unfinished run, saved after step 2"):
        run(tmp_path, seed=1)
    resumed, history = run(tmp_path, seed=1, resume=True)
    whole, _ = run(tmp_path / "whole", seed=1)
    assert torch.equal(resumed.params["weight"], whole.params["weight"])
    assert history["step"] == [2, 4, 6]
    assert steps(tmp_path) == [2, 4, 6]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(tmp_path, monkeypatch):
    unlink = Path.unlink

    def refused(path, **options):
        if path.name.startswith("step_"):
            raise PermissionError(path)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refused)
    run(train.Checkpointer(tmp_path, keep=1))
    assert steps(tmp_path) == [2, 4, 6]
    monkeypatch.undo()
    run(train.Checkpointer(tmp_path, keep=1), epochs=4, resume=True)
    assert steps(tmp_path) == [8]


def test_saving_replaces_no_unfinished_run_and_goes_on_after_restore(tmp_path):
    first = train.Checkpointer(tmp_path, keep=2)
    for number in range(4):
        first.save(start().replace(step=torch.tensor(number)))
    assert steps(tmp_path) == [2, 3]
    with pytest.raises(FileExistsError, match="unfinished run, saved after step 3; go on with it .resume, or restore"):
        train.Checkpointer(tmp_path).save(start())
    second = train.Checkpointer(tmp_path, keep=2)
    train_state = second.restore(start())
    second.save(train_state.replace(step=train_state.step + 1))
    assert steps(tmp_path) == [3, 4]
    second.save(start())  # what goes back takes the place of what came later
    assert steps(tmp_path) == [0]


def test_a_look_back_during_a_run_changes_nothing(tmp_path):
    checkpoints = train.Checkpointer(tmp_path, keep=3, monitor="loss", mode="max")
    look = Do("log", lambda run: run.step < 3 or checkpoints.restore(start(), best=True))
    run(checkpoints, epochs=4, callbacks=[look], log_every=1)
    assert steps(tmp_path) == [2, 6, 8]
    assert checkpoints.best is not None
    assert checkpoints.best[0] == 2


def test_another_monitor_starts_with_no_best(tmp_path):
    values = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])

    def score(train_state):
        return {"score": next(values)}

    run(train.Checkpointer(tmp_path, keep=2, monitor="eval_score"), epochs=3, eval=score)
    assert steps(tmp_path) == [2, 6]
    checkpoints = train.Checkpointer(tmp_path, keep=2, monitor="eval_score", mode="max")
    run(checkpoints, epochs=5, eval=score, resume=True)
    assert checkpoints.best == (10, 5.0)
    run(train.Checkpointer(tmp_path, keep=1), epochs=6, resume=True, eval=score)
    assert steps(tmp_path) == [12]


def test_leaves_that_share_memory_are_saved_too(tmp_path):
    weight = torch.arange(6.0)
    shared = train.TrainState({"all": weight, "last": weight[3:]}, {}, (), random.key(0), torch.tensor(0))
    checkpoints = train.Checkpointer(tmp_path)
    checkpoints.save(shared)
    assert checkpoints.restore(shared).params["last"].tolist() == [3.0, 4.0, 5.0]
    wide = train.TrainState({"w": weight.to(torch.complex128)}, {}, (), random.key(0), torch.tensor(1))
    with pytest.raises(ValueError, match=r"leaf 'train_state.params.w' is complex128.*make it complex64"):
        checkpoints.save(wide)


def test_leftovers_of_a_killed_process_go(tmp_path):
    (tmp_path / ".step_00000003.safetensors.abc.tmp").write_bytes(b"half")
    run(tmp_path, epochs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step_00000002.safetensors"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(tmp_path / "file" / "checkpoints")


@pytest.mark.parametrize("moment", ["start", "log"])
def test_a_run_that_a_callback_stops_has_no_evaluation_to_judge(tmp_path, moment):
    checkpoints = train.Checkpointer(tmp_path, monitor="eval_score")
    stop = Do(moment, lambda run: run.stop("enough") if moment == "start" or run.step == 3 else None)
    _, history = run(checkpoints, eval=lambda ts: {"score": 1.0}, callbacks=[stop], log_every=1)
    assert history.stopped == "enough"
    assert checkpoints.best == (None if moment == "start" else (2, 1.0))
    assert run(tmp_path, resume=True)[1].stopped == "enough"
