"""`data.KFold` against scikit-learn's folds."""

import re

import numpy as np
import pytest
import torch
from sklearn import model_selection

from fnn import data, random


@pytest.mark.parametrize("key", [None, 0, 1])
@pytest.mark.parametrize("stratify", [False, True])
@pytest.mark.parametrize(("n", "k"), [(10, 5), (11, 3), (7, 7), (23, 2)])
def test_folds_are_disjoint_and_cover_everything(n, k, stratify, key):
    labels = torch.arange(n) % 3 if stratify else None
    folds = data.KFold(torch.arange(n), k, key=None if key is None else random.key(key), stratify=labels)
    pairs = list(folds)
    assert len(pairs) == len(folds) == k
    assert torch.equal(torch.cat([validation for _, validation in pairs]).sort().values, torch.arange(n))
    for fold, (training, validation) in enumerate(pairs):
        assert torch.equal(torch.cat([training, validation]).sort().values, torch.arange(n))
        assert len(validation) in (n // k, -(-n // k))
        assert all(torch.equal(a, b) for a, b in zip(folds[fold], (training, validation), strict=True))
    assert torch.equal(folds[-1][1], pairs[-1][1])


@pytest.mark.parametrize(("n", "k"), [(10, 5), (11, 3), (7, 2)])
def test_without_a_key_the_folds_are_scikit_learn_s(n, k):
    expected = model_selection.KFold(k).split(np.zeros(n))
    for ours, theirs in zip(data.KFold(np.arange(n), k), expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("key", [None, 0])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_stratified_folds_hold_of_each_label_what_scikit_learn_s_do(k, key):
    labels = np.repeat([4, 0, -2], [50, 23, 6])[np.random.default_rng(0).permutation(79)]
    folds = data.KFold(labels, k, key=None if key is None else random.key(key), stratify=labels)
    theirs = model_selection.StratifiedKFold(k).split(labels, labels)
    for label in (4, 0, -2):
        ours = [int((validation == label).sum()) for _, validation in folds]
        assert max(ours) - min(ours) <= 1
    ours = sorted(len(validation) for _, validation in folds)
    assert ours == sorted(len(validation) for _, validation in theirs)


def test_folds_are_a_function_of_the_key():
    first, again, other = (list(data.KFold(torch.arange(20), 4, key=random.key(seed))) for seed in (0, 0, 1))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[1].sort().values, b[1].sort().values) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.cat([validation for _, validation in first]), random.permutation(random.key(0), 20))


def test_the_parts_are_trees_like_the_data_and_a_loader_takes_them():
    tensors = {"x": torch.arange(12.0).reshape(6, 2), "y": np.arange(6)}
    for training, validation in data.KFold(tensors, 3, key=random.key(0)):
        assert isinstance(training["y"], np.ndarray)
        assert torch.equal(validation["x"][:, 0], 2.0 * torch.from_numpy(validation["y"]))
        assert next(iter(data.Loader(training, 4)))["x"].shape == (4, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((torch.arange(6), 1), {}, ValueError, "k is 1, expected a whole number from 2 to 6"),
        ((torch.arange(6), 7), {}, ValueError, "k is 7"),
        ((torch.arange(6), 2.0), {}, ValueError, "k is 2.0"),
        ((6, 2), {}, TypeError, "data is int, expected a tensor or numpy array"),
        (((torch.arange(6), torch.arange(5)), 2), {}, ValueError, "differ in length along the first axis ('0': 6, '1'"),
        (({"x": torch.tensor(1.0)}, 2), {}, ValueError, "leaf 'x' of data is a single number"),
        (((), 2), {}, ValueError, "data has no leaves"),
        ((torch.arange(6), 2), {"stratify": torch.zeros(6)}, ValueError, "stratify has shape (6,) and dtype"),
        ((torch.arange(6), 2), {"stratify": torch.arange(5)}, ValueError, "stratify has shape (5,)"),
        ((torch.arange(6), 2), {"stratify": np.array(["a", "b"] * 3)}, TypeError, "return_inverse"),
        ((torch.arange(6), 2), {"key": 0}, TypeError, "key"),
    ],
)
def test_bad_arguments_of_kfold(arguments, options, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        data.KFold(*arguments, **options)
    with pytest.raises(IndexError, match="no fold 2, expected 0 to 1"):
        data.KFold(torch.arange(6), 2)[2]


@pytest.mark.parametrize("labels", [(np.arange(6) % 2).astype(">i4"), (np.arange(6) % 2)[::-1]])
def test_labels_of_any_memory_layout(labels):
    found = data.KFold(torch.arange(6), 2, stratify=labels)
    expected = data.KFold(torch.arange(6), 2, stratify=torch.tensor(labels.tolist()))
    assert [v.tolist() for _, v in found] == [v.tolist() for _, v in expected]


def test_labels_of_one_example_each():
    labels = torch.tensor([7, 0, 3, 0, 9, 0, 0])  # three of them rarer than there are folds
    folds = [validation for _, validation in data.KFold(torch.arange(7), 3, stratify=labels)]
    assert sorted(torch.cat(folds).tolist()) == list(range(7))
    assert sorted(map(len, folds)) == [2, 2, 3]
    assert all(1 <= int((labels[fold] == 0).sum()) <= 2 for fold in folds)
