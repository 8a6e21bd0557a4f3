"""`augment.mixup` and `cutmix` against torchvision's formulas, for the weights and boxes that they draw."""

import re

import pytest
import torch
from scipy import stats

from fnn import losses, random
from fnn.data import augment
from fnn.data._torchvision import torchvision
from fnn.data.augment import _mix

torchvision()
from torchvision.transforms import v2  # noqa: E402

KEY = random.key(3)
IMAGES = random.normal(random.key(0), (12, 3, 9, 7), torch.float64)
LABELS = torch.arange(12) % 4  # each differs from the label before it
BOTH = {"mixup": augment.mixup(0.4, 4), "cutmix": augment.cutmix(1.0, 4)}
both = pytest.mark.parametrize("mix", BOTH.values(), ids=BOTH.keys())


@both
def test_a_function_of_its_key_with_a_draw_for_each_example(mix):
    before = torch.get_rng_state()
    first, again, other = (mix(random.key(seed), IMAGES, LABELS) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(first[1].max(1).values.unique()) > 8


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_labels_are_probabilities_that_the_loss_takes(mix, dtype):
    x, labels = mix(KEY, IMAGES.to(dtype), LABELS)
    assert (x.shape, x.dtype) == (IMAGES.shape, dtype)
    assert (labels.shape, labels.dtype) == ((12, 4), torch.promote_types(dtype, torch.float32))
    assert torch.allclose(labels.sum(1), torch.ones(12, dtype=labels.dtype))
    logits = random.normal(random.key(7), (12, 4), labels.dtype)
    own = labels[torch.arange(12), LABELS]
    each = [losses.cross_entropy(logits, y, reduction="none") for y in (LABELS, LABELS.roll(1))]
    expected = own * each[0] + (1 - own) * each[1]
    assert torch.allclose(losses.cross_entropy(logits, labels, reduction="none"), expected, atol=1e-5)


def test_mixup_is_torchvision_s_for_the_weights_drawn():
    mixed, labels = augment.mixup(0.4, 4)(KEY, IMAGES, LABELS)
    for n, weight in enumerate(labels[torch.arange(12), LABELS].tolist()):
        theirs = v2.MixUp(num_classes=4)
        params = {"labels": LABELS, "batch_size": 12, "lam": weight}
        assert torch.allclose(mixed[n], theirs.transform(IMAGES.clone(), params)[n], atol=1e-12)
        assert torch.allclose(labels[n], theirs.transform(LABELS, params)[n].double(), atol=1e-6)


def test_mixup_takes_examples_of_any_shape():
    rows = IMAGES.reshape(12, -1)
    assert torch.equal(BOTH["mixup"](KEY, rows, LABELS)[0], BOTH["mixup"](KEY, IMAGES, LABELS)[0].reshape(12, -1))


@pytest.mark.parametrize("size", [(9, 7), (32, 32)])
def test_cutmix_is_torchvision_s_for_the_boxes_drawn(size, monkeypatch):
    images = random.normal(random.key(0), (12, 2, *size), torch.float64)
    shares = torch.linspace(0.0, 1.0, 12, dtype=torch.float64)
    monkeypatch.setattr(_mix, "_beta", lambda key, alpha, n, dtype: shares)
    mixed, labels = augment.cutmix(1.0, 4)(KEY, images, LABELS)
    centres = random.uniform(random.split(KEY)[1], (12, 2)) * torch.tensor(size)
    for n, (share, (row, column)) in enumerate(zip(shares, centres.long(), strict=True)):
        theirs = v2.CutMix(num_classes=4)
        with monkeypatch.context() as patch:
            patch.setattr(theirs._dist, "sample", lambda shape, share=share: share)
            drawn = iter([column.reshape(1), row.reshape(1)])
            patch.setattr(torch, "randint", lambda high, size, drawn=drawn: next(drawn))
            params = {"labels": LABELS, "batch_size": 12, **theirs.make_params([images])}
        assert torch.equal(mixed[n], theirs.transform(images, params)[n])
        assert torch.allclose(labels[n], theirs.transform(LABELS, params)[n].double(), atol=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_follow_the_beta_distribution(alpha, dtype):
    weights = _mix._beta(random.key(1), alpha, 20000, dtype).double()
    assert bool(torch.isfinite(weights).all())
    grid = torch.tensor([1e-6, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
    found = (weights[:, None] <= grid).double().mean(0).numpy()
    assert abs(found - stats.beta(alpha, alpha).cdf(grid.numpy())).max() < 1.95 / 20000**0.5  # Kolmogorov, 0.1 %


@pytest.mark.slow
def test_compiled_it_is_the_same(fast_compile):
    compiled = torch.compile(lambda *arguments: [mix(*arguments) for mix in BOTH.values()], fullgraph=True)
    found = compiled(KEY, IMAGES, LABELS)
    for (x, labels), mix in zip(found, BOTH.values(), strict=True):
        expected = mix(KEY, IMAGES, LABELS)
        assert torch.allclose(x, expected[0], atol=1e-12)
        assert torch.allclose(labels, expected[1], atol=1e-12)


@both
def test_under_vmap_over_keys_and_batches(mix):
    keys = random.split(KEY, 3)
    batches = random.normal(random.key(1), (3, *IMAGES.shape), torch.float64)
    labels = torch.stack([LABELS, LABELS.flip(0), LABELS.roll(2)])
    expected = [mix(*arguments) for arguments in zip(keys, batches, labels, strict=True)]
    found = torch.vmap(mix)(keys, batches, labels)
    for a, b in zip(found, zip(*expected, strict=True), strict=True):
        assert torch.allclose(a, torch.stack(b), atol=1e-12)


@both
def test_labels_out_of_range_never_give_a_number(mix):
    for wrong in (-1, 4):
        labels = LABELS.clone()
        labels[5] = wrong
        _, mixed = mix(KEY, IMAGES, labels)
        assert bool(mixed[5:7].isnan().all())
        assert not bool(mixed[:5].isnan().any())
        assert bool(losses.cross_entropy(torch.zeros(12, 4), mixed.float()).isnan())


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 4), "alpha is 0, expected a number over 0"),
        ((-1.0, 4), "alpha is -1.0"),
        ((float("inf"), 4), "alpha is inf"),
        ((1.0, 0), "classes is 0"),
        ((1.0, 4.0), "classes is 4.0"),
    ],
)
def test_bad_arguments_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=re.escape(f"augment.{name}: {message}")):
        getattr(augment, name)(*arguments)


@pytest.mark.parametrize("name", BOTH)
def test_batches_that_do_not_fit_are_named(name):
    mix = BOTH[name]
    with pytest.raises(TypeError, match=rf"augment\.{name}: .* torch.uint8"):
        mix(KEY, torch.zeros(12, 3, 4, 4, dtype=torch.uint8), LABELS)
    for labels in (LABELS[:5], LABELS.float(), torch.eye(12), [0, 1]):
        with pytest.raises(ValueError, match=rf"augment\.{name}: labels are .*, expected one integer .*\(12,\)"):
            mix(KEY, IMAGES, labels)
