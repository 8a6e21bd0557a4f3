"""Pixels made into a model's input, scikit-learn's digits, and the packages that are imported where they are used."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fnn import random
from fnn.data import ImageDataset, digits, preprocess
from fnn.data._torchvision import torchvision


def test_preprocess_is_its_own_formula():
    pixels = torch.randint(0, 256, (3, 2, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got = preprocess(pixels, scale=255, size=None, pad=1, mean=[0.2, 0.3], std=[0.5, 0.25])
    want = np.pad(pixels.numpy() / 255, ((0, 0), (0, 0), (1, 1), (1, 1)))
    want = (want - np.array([0.2, 0.3])[:, None, None]) / np.array([0.5, 0.25])[:, None, None]
    assert got.dtype == torch.float32
    assert np.allclose(got.numpy(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pixels", [torch.ones(4, 4), torch.ones(1, 3, 4, 4)])
def test_preprocess_refuses_other_shapes(pixels):
    with pytest.raises(ValueError, match="preprocess: "):
        preprocess(pixels, scale=1, size=None, pad=0, mean=[0.0], std=[1.0])


def check_dataset(data, sizes, image_shape):
    assert isinstance(data, ImageDataset)
    assert data.image_shape == image_shape
    assert data.classes == tuple("0123456789")
    for (images, labels), size in zip((data.train, data.test), sizes, strict=True):
        assert (images.shape, images.dtype) == ((size, *image_shape), torch.float32)
        assert (labels.shape, labels.dtype) == ((size,), torch.int64)
        assert labels.unique().tolist() == list(range(10))
    images = data.train[0].double()
    assert abs(images.mean()) < 1e-6
    assert abs(images.std(correction=0) - 1) < 1e-6
    assert json.loads(json.dumps(data.preprocessing)) == data.preprocessing


@pytest.mark.parametrize("size", [8, 32])
def test_digits_are_scikit_learn_s_in_a_stratified_split(size):
    data = digits(size=size)
    check_dataset(data, (1438, 359), (1, size, size))
    source = load_digits()
    counts, test_counts = np.bincount(source.target), data.test[1].bincount().numpy()
    assert np.all(np.abs(test_counts - 0.2 * counts) <= 1)
    # What config.json records makes the very same inputs from the raw pixels: every image is there exactly once.
    made = preprocess(torch.from_numpy(source.images), **json.loads(json.dumps(data.preprocessing)))
    original = {image.numpy().tobytes(): int(label) for image, label in zip(made, source.target, strict=True)}
    found = [
        (image.numpy().tobytes(), int(label))
        for images, labels in (data.train, data.test)
        for image, label in zip(images, labels, strict=True)
    ]
    assert len(found) == 1797
    assert dict(found) == original


def test_digits_are_enlarged_as_torchvision_does():
    torchvision()
    from torchvision.transforms import v2

    pixels = torch.from_numpy(load_digits().images[:20]).float()
    want = v2.functional.resize(pixels, [32, 32], v2.InterpolationMode.BILINEAR, antialias=False)[:, None] / 16
    got = preprocess(pixels, scale=16, size=(32, 32), pad=0, mean=[0.0], std=[1.0])
    assert torch.allclose(got, want, atol=1e-6)


def test_digits_split_is_reproducible_and_keyed():
    first, again, other = digits(), digits(key=random.key(0)), digits(key=random.key(1))
    for a, b in ((first.train, again.train), (first.test, again.test)):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert not torch.equal(first.test[1], other.test[1])
    assert len(digits(test_fraction=0.5).test[1]) in (898, 899)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"size": 4}, "size is 4"),
        ({"size": 8.5}, "size"),
        ({"test_fraction": 0}, "test_fraction"),
        ({"test_fraction": 1.5}, "1.5"),
    ],
)
def test_bad_digits(arguments, word):
    with pytest.raises(ValueError, match="digits: ") as error:
        digits(**arguments)
    assert word in str(error.value)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install .fnn\[examples\]"):
        digits()


# optional packages


def run(code, *, path=""):
    code = f"import sys\nsys.path.insert(0, {str(path)!r})\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_torchvision_imports_in_a_fresh_process_whatever_was_tried_before():
    run("""
        try:
            import torchvision  # beside a CPU build of torch, this import of the wheel from PyPI fails
        except RuntimeError:
            pass
        import fnn.data
        from fnn.data._torchvision import torchvision
        module = torchvision()
        assert torchvision() is module is sys.modules["torchvision"]
        import torch
        from torchvision.transforms import v2
        from torchvision.models import resnet18
        assert v2.functional.horizontal_flip(torch.arange(3.0).reshape(1, 1, 3)).tolist() == [[[2, 1, 0]]]
    """)


@pytest.mark.slow
def test_torchvision_that_loads_well_is_left_alone_and_one_that_is_absent_is_named(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("healthy = True")
    run(
        """
        import torch
        import fnn.data
        assert not {"torchvision", "sklearn"} & set(sys.modules), "optional packages come in where they are used"
        from fnn.data import _torchvision
        assert _torchvision.torchvision().healthy
        assert not hasattr(torch.ops.torchvision, "nms")
        _torchvision.torchvision.cache_clear()
        sys.modules["torchvision"] = None
        try:
            fnn.data.mnist("nowhere", download=True)
        except ImportError as error:
            assert 'pip install "fnn[examples]"' in str(error), error
        else:
            raise AssertionError("no error")
        """,
        path=tmp_path,
    )
