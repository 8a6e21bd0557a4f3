"""Runs that are saved and go on: bit for bit, from whatever is left of the files."""

import json
import math
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fnn import data, losses, nn, optim, random, train, tree

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(50, 4, generator=GENERATOR)
Y = (X.sum(1) > 0).long()
NET = nn.Sequential(nn.Linear(8), nn.BatchNorm(), nn.tanh, nn.Dropout(0.1), nn.Linear(2))
OPTIMIZER = optim.ema_params(optim.adam(optim.cosine(0.05, 12)), 0.9)
STEP_SECONDS = ("seconds", "examples_per_second")


def loss_fn(params, state, batch, key):
    x, labels = batch
    logits, state = NET.apply(params, state, x, key=key, train=True)
    return losses.cross_entropy(logits, labels), (state, {"accuracy": (logits.argmax(-1) == labels).float().mean()})


def start(seed=0, net=NET):
    params, state = net.init(random.key(seed), X)
    return train.TrainState.create(params, OPTIMIZER, random.key(1), state=state)


def evaluation(train_state):
    logits = NET(train_state.params, X, state=train_state.state)
    return {"loss": float(losses.cross_entropy(logits, Y))}


class Stop(train.Callback):
    """A signal after some step."""

    def __init__(self, step, number=signal.SIGTERM):
        self.at, self.number = step, number

    def step(self, run):
        if run.step == self.at:
            os.kill(os.getpid(), self.number)


def run(folder=None, *, callbacks=(), resume=False, loader=None, **options):
    step = train.make_step(loss_fn, OPTIMIZER, compile=False)
    checkpoints = folder if folder is None or isinstance(folder, train.Checkpointer) else train.Checkpointer(folder)
    loader = data.Loader((X, Y), 16, key=random.key(2)) if loader is None else loader
    options = {"epochs": 4, "eval": evaluation} | options
    return train.fit(
        step, start(), loader, callbacks=callbacks, checkpoints=checkpoints, resume=resume, log_every=2, **options
    )


def same(a, b):
    (state_a, history_a), (state_b, history_b) = a, b
    for path, leaf in tree.paths(state_a).items():
        assert torch.equal(leaf, tree.paths(state_b)[path]), path
    plain = [
        [{k: v for k, v in row.items() if k not in STEP_SECONDS} for row in h.rows] for h in (history_a, history_b)
    ]
    assert plain[0] == plain[1]
    return True


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6, 11, 12])
@pytest.mark.parametrize("eval_every", [None, 2])
def test_a_run_that_was_terminated_goes_on_bit_for_bit(tmp_path, stop, eval_every):
    whole = run(eval_every=eval_every)
    state, history = run(tmp_path, callbacks=[Stop(stop)], eval_every=eval_every)
    assert int(state.step) == stop
    assert history.stopped == "terminated"
    resumed = run(tmp_path, resume=True, eval_every=eval_every)
    assert same(whole, resumed)
    assert resumed[1].stopped is None


def test_a_run_may_be_broken_off_again_and_again(tmp_path):
    for stop in (1, 2, 5, 6, 7, 10):
        run(tmp_path, callbacks=[Stop(stop, signal.SIGINT)], resume=True)
    assert same(run(), run(tmp_path, resume=True))


def test_a_loader_without_length_goes_on_too(tmp_path):
    batches = list(data.Loader((X, Y), 16))

    class Stream:
        def __iter__(self):
            return iter(batches)

    whole = run(loader=Stream())
    run(tmp_path, callbacks=[Stop(5)], loader=Stream())
    assert same(whole, run(tmp_path, resume=True, loader=Stream()))


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    whole = run(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(whole, run(tmp_path, resume=True))
    with_more = run(tmp_path, resume=True, epochs=5)
    assert with_more[1]["epoch"] == [1, 2, 3, 4, 5]


def test_early_stopping_goes_on_with_its_best_state(tmp_path):
    def stopping():
        return train.EarlyStopping("eval_score", patience=2)

    scores = {3: 2.0, 6: 1.0, 9: 1.5, 12: 1.25, 15: 3.0}

    def score(train_state):
        return {"score": scores[int(train_state.step)]}

    whole = run(callbacks=[stopping()], eval=score, epochs=5)
    assert whole[1].stopped is not None
    for stop in (4, 8, 10):
        run(tmp_path / str(stop), callbacks=[stopping(), Stop(stop)], eval=score, epochs=5)
        resumed = run(tmp_path / str(stop), callbacks=[stopping()], resume=True, eval=score, epochs=5)
        assert same(whole, resumed)
        assert resumed[1].stopped == whole[1].stopped
        again = run(tmp_path / str(stop), callbacks=[stopping()], resume=True, eval=score, epochs=5)
        assert same(whole, again)
        assert again[1].stopped == whole[1].stopped


def test_the_newest_and_the_best_stay(tmp_path):
    scores = iter([4.0, 1.0, 3.0, 2.0, 5.0, 6.0])
    seen = []

    class Watch(train.Callback):
        def step(self, run):
            seen.append(len(list(tmp_path.glob("step_*"))))

    checkpoints = train.Checkpointer(tmp_path, keep=2, monitor="eval_score")
    run(checkpoints, callbacks=[Watch()], eval=lambda ts: {"score": next(scores)}, epochs=6)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [f"step_{n:08d}.safetensors" for n in (6, 18)]
    assert max(seen) == 2
    assert checkpoints.best == (6, 1.0)
    assert int(checkpoints.restore(start()).step) == 18
    assert int(checkpoints.restore(start(), best=True).step) == 6


@pytest.mark.parametrize("stop", [3, 6, 7, 9])
def test_the_best_is_that_of_an_undisturbed_run(tmp_path, stop):
    scores = {3: 4.0, 6: 1.0, 9: 3.0, 12: 2.0}
    options = {"eval": lambda ts: {"score": scores[int(ts.step)]}}
    run(train.Checkpointer(tmp_path, monitor="eval_score"), callbacks=[Stop(stop)], **options)
    checkpoints = train.Checkpointer(tmp_path, monitor="eval_score")
    run(checkpoints, resume=True, **options)
    assert checkpoints.best == (6, 1.0)
    assert int(checkpoints.restore(start(), best=True).step) == 6


def test_every_saves_between_the_rows(tmp_path):
    run(train.Checkpointer(tmp_path, every=2, keep=20))
    steps = [int(path.name[5:13]) for path in sorted(tmp_path.glob("step_*"))]
    assert steps == [2, 3, 4, 6, 8, 9, 10, 12]


def test_a_file_can_be_read_by_others(tmp_path):
    run(train.Checkpointer(tmp_path, config={"lr": 0.05}))
    with safe_open(tmp_path / "step_00000012.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["fnn.checkpoint"])
        rows = json.loads(file.get_tensor("history").numpy().tobytes())
        names = list(file.keys())
    assert facts["step"] == 12
    assert facts["config"] == {"lr": 0.05}
    assert facts["finished"] is True
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert "train_state.params.0.weight" in names


def damaged(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "tensor":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif how == "header":
        path.write_bytes(content.replace(b'step\\":12', b'step\\":13'))
    elif how == "foreign":
        path.write_bytes(b"not a checkpoint" * 10)
    assert path.read_bytes() != content


@pytest.mark.parametrize("how", ["truncated", "empty", "tensor", "header", "foreign"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, how):
    run(train.Checkpointer(tmp_path, keep=3))
    damaged(tmp_path / "step_00000012.safetensors", how)
    with pytest.warns(RuntimeWarning, match=r"damaged in .*step_00000012.*going on from step_00000009"):
        resumed = run(tmp_path, resume=True)
    assert same(run(), resumed)
    for path in tmp_path.glob("step_*"):
        damaged(path, "truncated")
    before = {path: path.read_bytes() for path in tmp_path.glob("step_*")}
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* is good: step_00000012.safetensors \(.*delete the folder"
    ):
        run(tmp_path, resume=True)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("step_*")}


def test_what_does_not_belong_to_the_run_is_refused(tmp_path):
    run(train.Checkpointer(tmp_path, config={"lr": 1, "widths": (8, 2)}), callbacks=[Stop(4)])
    other = train.Checkpointer(tmp_path, config={"lr": 2, "widths": (8, 2)})
    with pytest.raises(
        ValueError, match=r"config of .*step_00000004.* differs: lr was 1, is 2; go on with the options"
    ):
        run(other, resume=True)
    net = nn.Sequential(nn.Linear(9), nn.BatchNorm(), nn.tanh, nn.Dropout(0.1), nn.Linear(2))
    message = r"leaf 'params.0.weight' is float32 \(8, 4\) there, and float32 \(9, 4\) in this run"
    with pytest.raises(ValueError, match=message):
        train.Checkpointer(tmp_path).restore(start(net=net))
    plain = train.TrainState.create(start().params, optim.sgd(0.1), random.key(0), state=start().state)
    with pytest.raises(
        ValueError, match=r"another network or optimizer: leaf '(opt_state.*' is .* there, and absent|.*)"
    ):
        train.Checkpointer(tmp_path).restore(plain)
    with pytest.raises(ValueError, match="needs checkpoints="):
        run(resume=True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (data.Loader((X + 1, Y), 16, key=random.key(2)), "digest was"),
        (data.Loader((X, Y), 16, key=random.key(3)), r"key was \[0, 2\], is \[0, 3\]"),
        (data.Loader((X, Y), 10, key=random.key(2)), "batches was 3, is 5"),
        ([(X, Y)] * 3, "kind was 'memory', is None"),
    ],
)
def test_other_data_is_refused(tmp_path, other, message):
    run(tmp_path, callbacks=[Stop(4)])
    with pytest.raises(ValueError, match=rf"the data of .*step_00000004.* differs: .*{message}"):
        run(tmp_path, resume=True, loader=other)


def test_a_list_of_another_length_is_refused(tmp_path):
    run(tmp_path, callbacks=[Stop(4)], loader=[(X, Y)] * 3)
    with pytest.raises(ValueError, match=r"the data of .* differs: batches was 3, is 4"):
        run(tmp_path, resume=True, loader=[(X, Y)] * 4)


def test_a_config_is_compared_as_plain_values(tmp_path):
    config = {"lr": np.float64(0.1), "widths": (8, 2), "root": tmp_path, "dtype": torch.float32, "decay": math.nan}
    run(train.Checkpointer(tmp_path, config=config), callbacks=[Stop(4)])
    plain = {"lr": 0.1, "widths": [8, 2], "root": str(tmp_path), "dtype": "torch.float32", "decay": math.nan}
    run(train.Checkpointer(tmp_path, config=plain), callbacks=[Stop(5)], resume=True)
    with pytest.raises(ValueError, match=r"config of .* differs: lr was 0.1, is 0.2"):
        train.Checkpointer(tmp_path, config=plain | {"lr": 0.2}).restore(start())
    with pytest.raises(TypeError, match="config holds .*tanh"):
        train.Checkpointer(tmp_path, config={"activation": nn.tanh})
    with pytest.raises(TypeError, match="config is tuple, expected a dict"):
        train.Checkpointer(tmp_path, config=(1, 2))  # type: ignore[arg-type]


def test_a_run_that_is_further_than_it_was_to_go_says_so_and_changes_nothing(tmp_path):
    run(tmp_path, callbacks=[Stop(7)])
    before = {path: path.read_bytes() for path in tmp_path.glob("step_*")}
    with pytest.warns(RuntimeWarning, match="at step 7 and the run was to end at step 6"):
        train_state, _ = run(tmp_path, resume=True, epochs=2)
    assert int(train_state.step) == 7
    assert before == {path: path.read_bytes() for path in tmp_path.glob("step_*")}


def test_a_bad_step_near_the_end_counts_as_in_an_undisturbed_run(tmp_path):
    def last_is_bad(train_state, batch):
        def bad(params, state, batch, key):
            loss, aux = loss_fn(params, state, batch, key)
            return torch.where(train_state.step == 11, torch.inf, loss), aux

        return train.pure_step(bad, OPTIMIZER)(train_state, batch)

    def twelve(**options):
        step, loader = train.make_step(update=last_is_bad, compile=False), data.Loader((X, Y), 16)
        return train.fit(step, start(), loader, steps=12, **options)

    twelve(checkpoints=train.Checkpointer(tmp_path), callbacks=[Stop(11)])
    assert same(twelve(), twelve(checkpoints=train.Checkpointer(tmp_path), resume=True))


class Counts(train.Callback):
    """Keeps a number."""

    def __init__(self, kept=0):
        self.kept = kept

    def state(self):
        return {"kept": self.kept}

    def restore(self, saved):
        self.kept = saved["kept"]


def test_callbacks_may_come_and_go_unless_it_is_unclear_which_is_which(tmp_path):
    run(tmp_path, callbacks=[Counts(1), Counts(2), Stop(4)])
    with pytest.raises(ValueError, match="saved with 2 callbacks Counts, this run has 1"):
        run(tmp_path, callbacks=[Counts()], resume=True)
    again = [Counts(), Counts()]
    run(tmp_path, callbacks=[train.EarlyStopping(patience=9), *again, Stop(5)], resume=True)
    assert [callback.kept for callback in again] == [1, 2]
    assert run(tmp_path, resume=True)[1]["epoch"] == [1, 2, 3, 4]


def test_what_a_callback_cannot_keep_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"callbacks.Counts.kept is \{1, 2\}; the state\(\) of a callback can hold"):
        run(tmp_path, callbacks=[Counts({1, 2})])


def test_rows_may_hold_numbers_of_any_kind(tmp_path):
    class Adds(train.Callback):
        def epoch(self, run, row):
            row |= {"norm": torch.tensor(1.5), "count": np.float32(2)}

    run(tmp_path, callbacks=[Adds(), Stop(4)])
    _, history = run(tmp_path, callbacks=[Adds()], resume=True)
    assert history.rows[0]["norm"] == 1.5
    assert history.rows[0]["count"] == 2.0


def test_an_unfinished_run_is_not_overwritten_by_accident(tmp_path):
    run(tmp_path, callbacks=[Stop(4)])
    with pytest.raises(FileExistsError, match=r"holds an unfinished run, saved after step 4; go on with it \(resume,"):
        run(tmp_path)
    assert [path.name for path in tmp_path.glob("step_*")] != []
    run(train.Checkpointer(tmp_path, overwrite=True), epochs=1)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000003.safetensors"]
    run(tmp_path, epochs=2)  # a finished one is replaced
    assert [path.name for path in sorted(tmp_path.glob("step_*"))] == [f"step_{n:08d}.safetensors" for n in (3, 6)]


def test_a_loop_of_ones_own(tmp_path):
    step, checkpoints = train.make_step(loss_fn, OPTIMIZER, compile=False), train.Checkpointer(tmp_path)
    batches = list(data.Loader((X, Y), 16))

    def loop(until):
        train_state = checkpoints.restore(start())
        for number in range(int(train_state.step), until):
            train_state, _ = step(train_state, batches[number % 3])
            checkpoints.save(train_state)
        return train_state

    loop(2)
    resumed = loop(5)
    expected = start()
    for number in range(5):
        expected, _ = step(expected, batches[number % 3])
    assert tree.allclose(resumed, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"written by save\(train_state\), and has no run"):
        run(tmp_path, resume=True)


def test_layout_and_strides_come_back(tmp_path):
    weight = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    train_state = train.TrainState.create({"w": weight}, optim.sgd(0.1), random.key(0))
    checkpoints = train.Checkpointer(tmp_path)
    checkpoints.save(train_state)
    back = checkpoints.restore(train_state).params["w"]
    assert torch.equal(back, weight)
    assert back.stride() == train_state.params["w"].stride()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"keep": 0}, "keep is 0"),
        ({"keep": 1, "monitor": "loss"}, "keep is 1, expected at least 2 with monitor"),
        ({"mode": "best"}, "mode is 'best'"),
    ],
)
def test_arguments_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train.Checkpointer(tmp_path, **options)


def test_a_column_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'eval_f1' to monitor; its columns are"):
        run(train.Checkpointer(tmp_path, monitor="eval_f1"), epochs=1)
