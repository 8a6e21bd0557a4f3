"""Disks that are full or cannot be written: a clear message, and the checkpoints that were there."""

import shutil
import subprocess

import pytest
import torch

from fnn import data, losses, nn, optim, random, train, tree

NET = nn.Linear(2)
OPTIMIZER = optim.adam(0.05)
X = torch.randn(32, 1000, generator=torch.Generator().manual_seed(0))  # a checkpoint of 24 kB
Y = (X.sum(1) > 0).long()


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("no right to mount a file system here")
    yield folder
    subprocess.run(["umount", folder], check=True)


class At(train.Callback):
    """Does something after some step."""

    def __init__(self, step, act):
        self.at, self.act = step, act

    def step(self, run):
        if run.step == self.at:
            self.act()


def loss_fn(params, state, batch, key):
    return losses.cross_entropy(NET(params, batch[0]), batch[1]), (state, {})


def run(folder=None, **options):
    params, state = NET.init(random.key(0), X)
    train_state = train.TrainState.create(params, OPTIMIZER, random.key(1), state=state)
    checkpoints = None if folder is None else train.Checkpointer(folder, keep=2)
    step = train.make_step(loss_fn, OPTIMIZER, compile=False)
    return train.fit(step, train_state, data.Loader((X, Y), 16), epochs=5, checkpoints=checkpoints, **options)[0]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*step_*")}


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(disk):
    ballast, before = disk / "ballast", {}

    def fill():
        before.update(contents(disk / "run"))
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(b"0" * 1024):
                    pass
            except OSError:
                pass

    with pytest.raises(
        OSError, match=r"cannot write .*step_00000006.*[Nn]o space left.*unchanged; check that"
    ) as caught:
        run(disk / "run", callbacks=[At(5, fill)])
    assert int(caught.value.train_state.step) == 6  # nothing of the run is lost for a caller that catches this
    assert contents(disk / "run") == before != {}
    ballast.unlink()
    assert tree.allclose(run(disk / "run", resume=True), run(), rtol=0, atol=0)


def test_a_disk_that_cannot_be_written(disk):
    class Stop(train.Callback):
        def step(self, run):
            run.signal = "interrupted" if run.step == 5 else None

    run(disk / "run", callbacks=[Stop()])
    before = contents(disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for name, resume in (("run", True), ("other", False)):
        with pytest.raises(OSError, match=rf"cannot use the folder .*{name}: .*[Rr]ead-only.*give one that can be"):
            run(disk / name, resume=resume)
    assert contents(disk / "run") == before != {}
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert tree.allclose(run(disk / "run", resume=True), run(), rtol=0, atol=0)
