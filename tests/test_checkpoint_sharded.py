"""Checkpoints of several processes: parted states, other numbers of processes, damage, errors on every rank."""

import contextlib
import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist

from fnn import _ranks, data, interop, random, train, tree

RULES = {"w": 0, "b": 0, "image": 1, "ids": 0, "empty": 0, "scalar": None}
OTHER = {"w": 1, "b": None, "image": 0, "ids": 0, "empty": 1, "scalar": None}


def whole(step=3):
    """Plain, of sizes that no number of processes divides, dtypes of all kinds, and a leaf that is not contiguous."""
    params = {
        "w": torch.arange(30.0).reshape(10, 3) / 7,
        "b": torch.linspace(-1, 1, 7, dtype=torch.bfloat16),
        "image": torch.arange(144.0).reshape(4, 9, 2, 2).contiguous(memory_format=torch.channels_last),
        "ids": torch.arange(3) + 2**40,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(0.1, dtype=torch.float64),
    }
    opt_state = tree.map(lambda leaf: leaf * 3, params)
    return train.TrainState(params, {}, (opt_state,), random.key(5), torch.tensor(step))


def zeros():
    return tree.map(torch.zeros_like, whole())


def mesh_of(*shape):
    from torch.distributed.device_mesh import init_device_mesh

    names = ("data", "model")[: len(shape)]
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)


def parted(train_state, rules=RULES, mesh=None):
    """Params and what belongs to them as DTensors; the key and the step stay plain."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of(dist.get_world_size()) if mesh is None else mesh

    def place(path, leaf):
        name = path.rpartition(".")[2]
        if name not in rules:
            return leaf
        placed = Replicate() if rules[name] is None else Shard(rules[name])
        spread = [placed] if mesh.ndim == 1 else [placed, Replicate() if placed == Shard(0) else placed]
        return distribute_tensor(leaf, mesh, spread, src_data_rank=None)

    leaves, structure = tree.flatten(train_state)
    names = tree.paths(train_state)
    return tree.unflatten(structure, [place(path, leaf) for path, leaf in zip(names, leaves, strict=True)])


def same(a, b):
    """Bit for bit, whatever is parted."""
    ours, theirs = tree.paths(a), tree.paths(b)
    assert list(ours) == list(theirs)
    for path, leaf in ours.items():
        full = [other.full_tensor() if hasattr(other, "full_tensor") else other for other in (leaf, theirs[path])]
        assert full[0].dtype == full[1].dtype, path
        assert torch.equal(*full), path
    return True


def steps(folder):
    return sorted(path.name for path in folder.glob("*step_*"))


def _restore_and_save(folder, rules, shape, step):
    """The newest checkpoint into a state placed by these rules, which is saved as another step."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mesh = mesh_of(*shape)
        like = zeros() if rules is None else parted(zeros(), rules, mesh)
        checkpoints = train.Checkpointer(folder, keep=9)
        back = checkpoints.restore(like)
        assert same(back, whole(int(back.step)))
        for path, leaf in tree.paths(back).items():
            expected = tree.paths(like)[path]
            assert type(leaf) is type(expected)
            assert getattr(leaf, "placements", None) == getattr(expected, "placements", None)
            local = [other.to_local() if hasattr(other, "to_local") else other for other in (leaf, expected)]
            assert local[0].stride() == local[1].stride(), path
        path = checkpoints.save(back.replace(step=torch.tensor(step)))
    return path.name, int(back.step)


def alone(folder, step):
    """The same in this process, plain."""
    checkpoints = train.Checkpointer(folder, keep=9)
    back = checkpoints.restore(zeros())
    assert same(back, whole(int(back.step)))
    assert back.params["image"].stride() == whole().params["image"].stride()
    return checkpoints.save(back.replace(step=torch.tensor(step))).name, int(back.step)


def test_one_process_to_two_and_back(tmp_path):
    train.Checkpointer(tmp_path).save(whole())
    assert ranks.run(2, _restore_and_save, tmp_path, RULES, (2,), 4) == [("step_00000004", 3)] * 2
    assert ranks.run(2, _restore_and_save, tmp_path, OTHER, (2,), 5) == [("step_00000005", 4)] * 2
    assert ranks.run(2, _restore_and_save, tmp_path, None, (2,), 6) == [("step_00000006.safetensors", 5)] * 2
    assert ranks.run(2, _restore_and_save, tmp_path, RULES, (1, 2), 7) == [("step_00000007", 6)] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert alone(tmp_path, 8) == ("step_00000008.safetensors", 7)
    found = json.loads((tmp_path / "step_00000007" / "checkpoint.json").read_text())["fnn.checkpoint"]
    assert (found["step"], found["processes"], found["format"]) == (7, 2, 1)


@pytest.mark.slow
def test_one_process_to_two_to_four_and_back(tmp_path):
    train.Checkpointer(tmp_path).save(whole())
    ranks.run(2, _restore_and_save, tmp_path, RULES, (2,), 4)
    try:
        assert ranks.run(4, _restore_and_save, tmp_path, OTHER, (4,), 5) == [("step_00000005", 4)] * 4
        assert ranks.run(4, _restore_and_save, tmp_path, RULES, (2, 2), 6) == [("step_00000006", 5)] * 4
        ranks.run(4, _restore_and_save, tmp_path, RULES, (4,), 7)
    finally:
        ranks.stop(4)
    ranks.run(2, _restore_and_save, tmp_path, OTHER, (2,), 8)
    assert alone(tmp_path, 9) == ("step_00000009.safetensors", 8)


def _save(folder, *numbers, rules=RULES):
    checkpoints = train.Checkpointer(folder, keep=9)
    checkpoints.restore(parted(zeros()))
    return [checkpoints.save(parted(whole(number), rules)).name for number in numbers]


def _restore(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            back = train.Checkpointer(folder).restore(parted(zeros()))
        except ValueError as error:
            return str(error)
    assert same(back, whole(int(back.step)))
    return int(back.step), [str(warning.message) for warning in caught]


def damage(path, how):
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(content[:-9])
    elif path.suffix == ".json":
        path.write_bytes(content.replace(b'"step": 2', b'"step": 3'))
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def test_a_folder_with_a_damaged_file_is_passed_over(tmp_path):
    good = tmp_path / "good"
    assert ranks.run(2, _save, good, 1, 2) == [["step_00000001", "step_00000002"]] * 2
    names = sorted(path.name for path in (good / "step_00000002").iterdir())
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "checkpoint.json"]
    ways = ("flipped", "cut short", "deleted")
    for number, (name, how) in enumerate((name, how) for name in names for how in ways):
        bad = tmp_path / f"{name} {how}"
        shutil.copytree(good, bad)
        damage(bad / "step_00000002" / name, how)
        message = rf"step_00000002 \(.*{name}.*going on from step_00000001"
        with pytest.warns(RuntimeWarning, match=message):
            assert same(train.Checkpointer(bad).restore(zeros()), whole(1))
        if number % 4 == 0:  # each way of some file
            (first, said), (second, nothing) = ranks.run(2, _restore, bad)
            assert first == second == 1, (name, how)
            assert re.search(message, *said)
            assert nothing == []  # rank 0 speaks
    damage(bad / "step_00000001" / "__1_0.distcp", "flipped")
    messages = ranks.run(2, _restore, bad)
    assert messages[0] == messages[1]
    assert "no checkpoint in" in messages[0]
    assert "step_00000001 (the checksum of __1_0.distcp does not fit its content)" in messages[0]


def _raised(action):
    """What went wrong, on this rank."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def _disagree(folder, what):
    mine = _ranks.rank()
    options = {
        "config": {"lr": 0.1 + (what == "config") * mine, "nan": float("nan")},
        "keep": 3 + (what == "keep") * mine,
    }
    checkpoints = train.Checkpointer(folder / str(mine * (what == "folder")), **options)
    state = parted(whole())
    if what == "structure" and mine:
        state = train.TrainState(state.params, {}, (), state.key, state.step)
    if what == "placement" and mine:
        state = parted(whole(), OTHER)
    return _raised(lambda: checkpoints.save(state)), _raised(lambda: checkpoints.restore(state))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config", "config 'lr' is 0.1 on rank 0 and 1.1 on rank 1; give every process the same"),
        ("keep", "keep is 3 on rank 0 and 4 on rank 1"),
        ("folder", "folder is"),
        ("structure", "leaf 'train_state.opt_state.0.w' is 'float32 (10, 3) data=2: Shard(dim=0)' on rank 0 and None"),
        ("placement", "leaf 'train_state.params.w' is 'float32 (10, 3) data=2: Shard(dim=0)' on rank 0 and 'float32"),
    ],
)
def test_what_differs_between_processes_is_named_on_all(tmp_path, what, message):
    for said in zip(*ranks.run(2, _disagree, tmp_path, what), strict=True):
        assert said[0] == said[1]
        assert said[0][0] == "ValueError"
        assert said[0][1].startswith("Checkpointer: ")
        assert message in said[0][1]
    assert not list(tmp_path.glob("**/step_*"))


class Moves:
    """A step of `fit` that counts, and changes each leaf by it where it lies."""

    compile_seconds, update = 0.0, None

    def __call__(self, train_state, batch):
        params = tree.map(lambda leaf: leaf + (train_state.step + batch[0].sum()).to(leaf.dtype), train_state.params)
        new = train.TrainState(params, {}, train_state.opt_state, train_state.key, train_state.step + 1)
        return new, {"loss": train_state.step.double()}


class Keeps(train.Callback):
    """Keeps a parted state, a parted tensor, and a number; may break the run off."""

    def __init__(self, stop=None):
        self.stop, self.kept = stop, {}

    def step(self, run):
        self.kept = {"state": run.train_state, "tensor": run.train_state.params["w"], "number": run.step}
        run.signal = "terminated" if run.step == self.stop else run.signal

    def state(self):
        return self.kept

    def restore(self, saved):
        self.kept = saved


def _fit(folder, stop=None, plain=False, change=None, **options):
    """Eight steps, two a row."""
    config = {"kind": change if change == "config" and _ranks.rank() else "same"}
    rows = torch.arange(8.0) + (change == "data") * _ranks.rank()
    loader = data.Loader((rows,), 4, key=random.key(2))
    checkpoints = None if folder is None else train.Checkpointer(folder, config=config, **options)
    keeps, state = Keeps(stop), whole(0) if plain else parted(whole(0))
    state, history = train.fit(
        Moves(), state, loader, epochs=4, callbacks=[keeps], checkpoints=checkpoints, resume=folder is not None
    )
    values = tree.map(lambda leaf: leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf, (state, keeps.kept))
    seconds = ("seconds", "examples_per_second")
    return values, [{name: value for name, value in row.items() if name not in seconds} for row in history.rows]


def alike(a, b):
    (state, kept), rows = a
    (other, other_kept), other_rows = b
    assert rows == other_rows
    return same(state, other) and same(kept["state"], other_kept["state"]) and kept["number"] == other_kept["number"]


def _goes_on(folder, plain):
    undisturbed = _fit(None, plain=plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*was written elsewhere")
        for stop in (3, 4, 7):
            _fit(folder, stop, plain)
    return alike(undisturbed, _fit(folder, plain=plain)), sorted(path.name for path in folder.glob("step_*"))


@pytest.mark.parametrize("plain", [False, True])
def test_a_run_that_was_terminated_goes_on_bit_for_bit(tmp_path, plain):
    names = [f"step_0000000{n}{'.safetensors' * plain}" for n in (6, 7, 8)]
    assert ranks.run(2, _goes_on, tmp_path, plain) == [(True, names)] * 2
    assert same(train.Checkpointer(tmp_path).restore(zeros()), _fit(None, plain=True)[0][0])


def _resumed(folder, *options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return _raised(lambda: _fit(folder, **dict(options)))


def test_another_number_of_processes_has_to_be_asked_for(tmp_path):
    ranks.run(2, _fit, tmp_path, 3)
    message = (
        r"step_00000003 is of a run of 2 processes, this one has 1: .*start 2 again, or .*Checkpointer\(reshard=True"
    )
    with pytest.raises(ValueError, match=message):
        _fit(tmp_path, plain=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert alike(_fit(None, plain=True), _fit(tmp_path, plain=True, reshard=True))
    (first, second) = ranks.run(2, _resumed, tmp_path)
    assert first == second
    assert first[0] == "ValueError"
    assert "of a run of 1 process, this one has 2" in first[1]
    assert ranks.run(2, _resumed, tmp_path, ("reshard", True)) == [None, None]


@pytest.mark.parametrize(
    ("change", "named"), [("config", "config 'kind' is 'same' on rank 0"), ("data", "data 'digest' is ")]
)
def test_a_process_with_other_options_or_data_stops_all(tmp_path, change, named):
    (first, second) = ranks.run(2, _resumed, tmp_path, ("change", change))
    assert first == second
    assert first[0] == "ValueError"
    assert f"Checkpointer: {named}" in first[1]
    assert ranks.run(2, _resumed, tmp_path) == [None, None]  # the folder is free again


def _others(folder):
    (folder / "file").write_text("")
    (folder / "left").mkdir(exist_ok=True)
    (folder / "left" / ".step_00000007.abc.tmp").mkdir(exist_ok=True)
    (folder / "left" / ".step_00000007.abc.tmp" / "__0_0.distcp").write_text("half")
    dist.barrier()
    said = [_raised(lambda: _fit(folder / "file")), _raised(lambda: _fit(folder / "file" / "below"))]
    said.append(_raised(lambda: train.Checkpointer(folder / "file").save(parted(whole()))))
    _fit(folder / "left", 4)
    said.append(_raised(lambda: train.Checkpointer(folder / "left").save(parted(whole()))))
    partial = parted(whole())
    sums = _partial(partial.params["w"])
    partial = train.TrainState({"w": sums}, {}, (), partial.key, partial.step)
    said.append(_raised(lambda: train.Checkpointer(folder / "sum").save(partial)))
    return said


def _partial(leaf):
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(leaf.full_tensor(), leaf.device_mesh, [Partial()])


def test_what_cannot_be_saved_is_said_on_every_rank(tmp_path):
    first, second = ranks.run(2, _others, tmp_path)
    kinds = ["FileExistsError", "NotADirectoryError", "FileExistsError", "FileExistsError", "ValueError"]
    assert [said[0] for said in first] == kinds
    assert [said[1] for said in first] == [said[1] for said in second]
    assert "is a file; give the name of a folder" in first[0][1]
    assert "holds an unfinished run, saved after step 4" in first[3][1]
    assert "leaf 'train_state.params.w' is a sum that is not done yet" in first[4][1]
    assert steps(tmp_path / "left") == ["step_00000002", "step_00000004"]


def _on_a_full_disk(folder):
    checkpoints = train.Checkpointer(folder / "run", keep=9)
    checkpoints.save(parted(whole(1)))
    if _ranks.is_main():
        with contextlib.suppress(OSError), (folder / "ballast").open("wb", buffering=0) as file:
            while file.write(b"0" * 1024):
                pass
    dist.barrier()
    raised = _raised(lambda: checkpoints.save(parted(whole(2))))
    dist.barrier()  # rank 0 clears away what was begun
    return raised, steps(folder / "run")


def test_a_full_disk_is_said_on_every_rank_and_leaves_what_was_there(tmp_path):
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("no right to mount a file system here")
    try:
        for (kind, message), left in ranks.run(2, _on_a_full_disk, tmp_path):
            assert kind == "OSError"
            assert "cannot write" in message
            assert "step_00000002: on rank " in message
            assert "What was there before is unchanged" in message
            assert left == ["step_00000001"]
        assert same(train.Checkpointer(tmp_path / "run").restore(zeros()), whole(1))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def _not_shared(folder, monkeyed):
    """Rank 1 looks at another disk."""
    exists = Path.exists
    if _ranks.rank():
        Path.exists = lambda path, **options: "step_" not in path.name and exists(path, **options)
    try:
        return _raised(lambda: getattr(train.Checkpointer(folder, overwrite=True), monkeyed)(parted(whole())))
    finally:
        Path.exists = exists


@pytest.mark.parametrize("action", ["save", "restore"])
def test_a_folder_that_only_rank_0_sees(tmp_path, action):
    ranks.run(2, _save, tmp_path, 1)
    for _, message in ranks.run(2, _not_shared, tmp_path, action):
        assert "Checkpointer: rank 1 does not see" in message
        assert "give a folder on a file system that all of them share" in message
    assert steps(tmp_path) == ["step_00000001"]


def _both_kinds(folder):
    plain, checkpoints = whole(), train.Checkpointer(folder, keep=2)
    names = []
    for number, rules in ((1, None), (2, None), (3, RULES), (3, RULES), (3, None), (4, OTHER), (4, RULES)):
        state = plain.replace(step=torch.tensor(number))
        checkpoints.save(state if rules is None else parted(state, rules))
        dist.barrier()
        names.append(steps(folder))
        dist.barrier()
    return names


def test_files_and_folders_make_room_for_each_other(tmp_path):
    a, b, c, d = (f"step_0000000{n}" for n in (1, 2, 3, 4))
    file = ".safetensors"
    expected = [[a + file], [a + file, b + file], [b + file, c], [b + file, c + ".1"], [b + file, c + file]]
    expected += [[c + file, d], [c + file, d + ".1"]]
    for name in ("step_00000009", "step_00000009.1"):  # of somebody else
        (tmp_path / name).mkdir()
    found = ranks.run(2, _both_kinds, tmp_path)
    assert [[name for name in names if "9" not in name] for names in found[0]] == expected
    assert found[1] == found[0]
    assert found[0][-1][-2:] == ["step_00000009", "step_00000009.1"]
    assert same(train.Checkpointer(tmp_path).restore(zeros()), whole(4))


def _best(folder):
    checkpoints = train.Checkpointer(folder, keep=2, monitor="eval_score")
    scores = {2: 2.0, 4: 1.0, 6: 3.0, 8: 4.0}

    def score(train_state):  # which rank 0 knows best
        return {"score": scores[int(train_state.step)] * (-1) ** _ranks.rank()}

    loader = data.Loader((torch.arange(8.0),), 4)
    train.fit(Moves(), parted(whole(0)), loader, epochs=4, eval=score, checkpoints=checkpoints)
    best = train.Checkpointer(folder).restore(parted(zeros()), best=True)
    return checkpoints.best, int(best.step), steps(folder)


def test_the_best_is_that_of_rank_0(tmp_path):
    assert ranks.run(2, _best, tmp_path) == [((4, 1.0), 4, ["step_00000004", "step_00000008"])] * 2
    assert int(train.Checkpointer(tmp_path).restore(zeros(), best=True).step) == 4


def _export(folder):
    state = parted(whole())
    interop.save_safetensors(state, folder / "parted.safetensors")
    interop.save_safetensors({"rank": torch.tensor(_ranks.rank())}, folder / "plain.safetensors")
    other = {"a": torch.zeros(2 + _ranks.rank())}
    bad = {"a": 3} if _ranks.rank() else {"a": torch.zeros(2)}
    return [
        _raised(lambda: interop.save_safetensors(state, folder)),
        _raised(lambda: interop.save_safetensors(other, folder / "other")),
        _raised(lambda: interop.save_safetensors(bad, folder / "bad")),
    ]


def test_export_of_parted_leaves_is_one_file(tmp_path):
    first, second = ranks.run(2, _export, tmp_path)
    assert first == second
    assert [kind for kind, _ in first] == ["IsADirectoryError", "ValueError", "TypeError"]
    assert "leaf 'a' is 'float32 (2,)' on rank 0 and 'float32 (3,)' on rank 1" in first[1][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parted.safetensors", "plain.safetensors"]
    loaded = interop.load_safetensors(tmp_path / "parted.safetensors")
    assert list(tree.paths(loaded)) == list(tree.paths(whole()))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(loaded), tree.leaves(whole()), strict=True))
    assert interop.load_safetensors(tmp_path / "plain.safetensors")["rank"] == 0
