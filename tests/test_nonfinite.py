"""Who is to blame for a step that is not finite: the batch or the training."""

import pytest
import torch

from fnn import data, losses, nn, optim, random, train

NET = nn.Linear(2)
OPTIMIZER = optim.sgd(0.1)
X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def start():
    params, state = NET.init(random.key(0), X)
    return train.TrainState.create(params, OPTIMIZER, random.key(1), state=state)


def step_with(*bad, read_labels=True):
    """A step whose loss is not finite at these steps, and at labels out of range, as where those cannot be read."""

    def update(train_state, batch):
        at = torch.stack([train_state.step == step for step in bad]).any() if bad else torch.tensor(False)

        def loss_fn(params, state, batch, key):
            x, labels = batch
            loss = losses.cross_entropy(NET(params, x), labels if read_labels else labels.clamp(0, 1))
            return torch.where(at, torch.inf, loss), (state, {})

        return train.pure_step(loss_fn, OPTIMIZER)(train_state, batch)

    return train.make_step(update=update, compile=False)


def fit(step, x=X, y=Y, **options):
    loader = data.Loader((x, y), 4)
    return train.fit(step, start(), loader, **{"epochs": 2, "log_every": 10, **options})


def with_nan(example):
    x = X.clone()
    x[example, 1] = torch.nan
    return x


@pytest.mark.parametrize("log_every", [1, 3, 10, 50])
def test_the_batch_is_found_among_other_bad_steps(log_every):
    with pytest.raises(
        train.NonFiniteError, match="in step 7; its batch holds values that are not finite, in leaf '0'"
    ):
        fit(step_with(5), with_nan(30), log_every=log_every)


def test_a_loader_without_positions_shows_its_last_batch():
    with pytest.raises(
        train.NonFiniteError, match="in step 0; its batch holds values that are not finite, in leaf '0'"
    ):
        train.fit(step_with(), start(), [(with_nan(0), Y)], epochs=3, nonfinite_limit=3)


def test_a_label_is_found_among_other_bad_steps():
    """Compiled, the loss of a label out of range is NaN."""
    labels = Y.clone()
    labels[30] = 9
    compiled = step_with(5, 7, read_labels=False)
    compiled.update = step_with(5).update
    with pytest.raises(train.NonFiniteError, match="in step 7; run eagerly, it says: .*9"):
        fit(compiled, y=labels)


def test_a_second_run_that_fails_for_its_own_reasons_blames_nobody():
    calls = []

    def no_memory(train_state, batch):
        calls.append(int(train_state.step))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    step = step_with(5)
    step.update = no_memory
    _, history = fit(step)
    assert history["skipped"] == [1]
    assert len(calls) == 1


def test_metrics_that_are_not_finite_spoil_their_own_mean_only():
    def loss_fn(params, state, batch, key):
        loss = losses.cross_entropy(NET(params, batch[0]), batch[1])
        return loss, (state, {"f1": torch.where((batch[0] == X[0]).any(), torch.nan, 1.0)})

    _, history = fit(train.make_step(loss_fn, OPTIMIZER, compile=False), epochs=1, eval_every=5)
    assert [value == value for value in history["f1"]] == [False, True]
    assert all(loss == loss for loss in history["loss"])
    assert "skipped" not in history.columns


def test_a_bare_tensor_has_an_empty_path():
    def loss_fn(params, state, batch, key):
        return (params * batch).sum(), (state, {})

    train_state = train.TrainState.create(torch.ones(4), OPTIMIZER, random.key(1))
    step = train.make_step(loss_fn, OPTIMIZER, compile=False)
    with pytest.raises(train.NonFiniteError, match="its batch holds values that are not finite, in leaf ''"):
        train.fit(step, train_state, [with_nan(0)], epochs=1)
    train_state = train.TrainState.create(torch.full((4,), torch.inf), OPTIMIZER, random.key(1))
    with pytest.raises(train.NonFiniteError, match=r"the loss is (nan|-?inf).*learning rate"):
        train.fit(step, train_state, [X], epochs=1)
