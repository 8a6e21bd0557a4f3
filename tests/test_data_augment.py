"""`fnn.data.augment`: the same key, the same batch; equal to torchvision for the draws it documents."""

import math
import random as python_random
import re

import numpy as np
import pytest
import torch

from fnn import random
from fnn.data import augment
from fnn.data._torchvision import torchvision

torchvision()
from torchvision.transforms import v2  # noqa: E402
from torchvision.transforms.v2 import functional as F  # noqa: E402

KEY = random.key(3)
SHAPE = (6, 3, 8, 7)
IMAGES = random.normal(random.key(0), SHAPE, torch.float64)
MODES = ("zeros", "border", "reflection")

EVERY = {
    "flip": augment.flip(),
    "crop": augment.crop(2),
    "crop zeros": augment.crop(2, padding_mode="zeros"),
    "rotate": augment.rotate(30.0),
    "scale": augment.scale(0.7, 1.4),
    "affine": augment.affine(degrees=20, translate=0.2, scale=(0.8, 1.2), padding_mode="border"),
    "noise": augment.noise(0.3),
    "cutout": augment.cutout(3),
    "compose": augment.compose(
        augment.flip(), augment.crop(1), augment.rotate(10), augment.noise(0.1), augment.cutout(2)
    ),
}
every = pytest.mark.parametrize("change", EVERY.values(), ids=EVERY.keys())


# What holds for all


@every
def test_same_key_same_batch_and_another_key_another(change):
    before = torch.get_rng_state()
    first, again, other = (change(random.key(seed), IMAGES) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, IMAGES)
    assert torch.equal(torch.get_rng_state(), before)


@every
def test_images_of_a_batch_are_changed_each_in_its_own_way(change):
    changed = change(KEY, IMAGES[:1].expand(SHAPE))
    assert len({image.numpy().tobytes() for image in changed}) > 1


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shape_and_dtype_stay(change, dtype):
    images = IMAGES.to(dtype)
    changed = change(KEY, images)
    assert (changed.shape, changed.dtype) == (images.shape, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("noise", "compose")])
def test_half_precision_is_off_by_one_rounding(name, dtype):
    images = IMAGES.to(dtype)
    assert torch.equal(EVERY[name](KEY, images), EVERY[name](KEY, images.float()).to(dtype))


@every
def test_under_vmap_over_keys_and_batches(change):
    keys = random.split(KEY, 3)
    batches = random.normal(random.key(1), (3, *SHAPE), torch.float64)
    expected = torch.stack([change(key, images) for key, images in zip(keys, batches, strict=True)])
    assert torch.allclose(torch.vmap(change)(keys, batches), expected, atol=1e-12)
    expected = torch.stack([change(key, IMAGES) for key in keys])
    assert torch.allclose(torch.vmap(change, (0, None))(keys, IMAGES), expected, atol=1e-12)


@every
def test_derivatives_are_those_of_a_linear_map(change):
    """All are affine in the pixels, so the tangent is a difference and the gradient its transpose."""
    tangent = random.normal(random.key(5), SHAPE, torch.float64)
    _, pushed = torch.func.jvp(lambda x: change(KEY, x), (IMAGES,), (tangent,))
    assert torch.allclose(pushed, change(KEY, IMAGES + tangent) - change(KEY, IMAGES), atol=1e-10)
    pulled = torch.func.grad(lambda x: (change(KEY, x) * tangent).sum())(IMAGES)
    assert torch.allclose((pulled * tangent).sum(), (pushed * tangent).sum(), atol=1e-10)


def test_compiled_it_is_the_same(fast_compile):
    images, change = IMAGES.float(), augment.affine(degrees=20)
    compiled = torch.compile(lambda key, images: change(key, images), fullgraph=True)
    assert torch.allclose(compiled(KEY, images), change(KEY, images), atol=1e-6)


@pytest.mark.slow
def test_compiled_by_inductor_it_is_the_same():
    images, change = IMAGES.float(), augment.compose(augment.crop(2, padding_mode="zeros"), augment.rotate(20))
    compiled = torch.compile(lambda key, images: change(key, images), fullgraph=True)
    for seed in range(3):
        assert torch.allclose(compiled(random.key(seed), images), change(random.key(seed), images), atol=1e-5)


@pytest.mark.parametrize("padding_mode", MODES)
def test_no_strength_is_the_identity(padding_mode):
    for change in (
        augment.flip(0.0),
        augment.crop(0, padding_mode=padding_mode),
        augment.rotate(0, padding_mode=padding_mode),
        augment.scale(1, 1, padding_mode=padding_mode),
        augment.affine(padding_mode=padding_mode),
        augment.noise(0),
        augment.compose(),
    ):
        assert torch.equal(change(KEY, IMAGES), IMAGES)


# Each against torchvision or a closed form


def test_flip_mirrors_the_images_that_its_draw_says():
    images = random.normal(random.key(0), (200, 1, 2, 3))
    mirrored = random.bernoulli(KEY, 0.3, (200,))
    flipped = augment.flip(0.3)(KEY, images)
    assert torch.equal(flipped[mirrored], F.horizontal_flip(images[mirrored]))
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    assert 35 < mirrored.sum() < 85
    assert torch.equal(augment.flip(1.0)(KEY, images), F.horizontal_flip(images))


@pytest.mark.parametrize("padding_mode", MODES)
def test_crop_is_a_window_of_the_padded_image(padding_mode):
    padding = 3
    starts = (random.uniform(KEY, (len(IMAGES), 2)) * (2 * padding + 1)).floor()
    fill = {"zeros": "constant", "border": "edge", "reflection": "symmetric"}[padding_mode]
    padded = F.pad(IMAGES, [padding] * 4, padding_mode=fill)
    height, width = SHAPE[2:]
    expected = [F.crop(x, int(y0), int(x0), height, width) for x, (y0, x0) in zip(padded, starts, strict=True)]
    assert torch.equal(augment.crop(padding, padding_mode=padding_mode)(KEY, IMAGES), torch.stack(expected))


def test_crop_reaches_every_place_and_reflects_as_often_as_needed():
    image = torch.arange(4.0).reshape(1, 1, 2, 2).expand(500, 1, 2, 2)
    moved = augment.crop(1, padding_mode="zeros")(KEY, image)
    assert len({x.numpy().tobytes() for x in moved}) == 9
    line = torch.arange(3.0).expand(400, 1, 1, 3)
    rows = {tuple(x.flatten().tolist()) for x in augment.crop(9)(KEY, line)}
    assert rows == {(0, 1, 2), (1, 2, 2), (2, 2, 1), (2, 1, 0), (1, 0, 0), (0, 0, 1)}


def draws(key, n, degrees=0.0, translate=0.0, scale=(1.0, 1.0), dtype=torch.float64):
    """What `affine` documents that it draws."""
    u = random.uniform(key, (n, 4), dtype)
    return degrees * (2 * u[:, 0] - 1), translate * (2 * u[:, 1:3] - 1), scale[0] + (scale[1] - scale[0]) * u[:, 3]


def test_rotate_is_torchvision_s():
    angles, _, _ = draws(KEY, len(IMAGES), degrees=170)
    rotated = augment.rotate(170, padding_mode="zeros")(KEY, IMAGES)
    for image, angle, found in zip(IMAGES, angles, rotated, strict=True):
        expected = F.rotate(image, float(angle), F.InterpolationMode.BILINEAR)
        assert torch.allclose(found, expected, atol=1e-10)


def test_scale_is_torchvision_s():
    _, _, factors = draws(KEY, len(IMAGES), scale=(0.5, 2.0))
    scaled = augment.scale(0.5, 2.0, padding_mode="zeros")(KEY, IMAGES)
    for image, factor, found in zip(IMAGES, factors, scaled, strict=True):
        expected = F.affine(image, 0.0, [0, 0], float(factor), [0.0, 0.0], v2.InterpolationMode.BILINEAR)
        assert torch.allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("padding_mode", MODES)
def test_affine_is_grid_sample_with_its_matrix(padding_mode):
    """The matrix torch documents for `affine_grid`: from places in the result to places in the image, in half sides."""
    options = {"degrees": 60, "translate": 0.4, "scale": (0.6, 1.7)}
    angles, shifts, factors = draws(KEY, len(IMAGES), **options)
    height, width = SHAPE[2:]
    matrices = []
    for angle, (down, right), factor in zip(angles.tolist(), shifts.tolist(), factors.tolist(), strict=True):
        cos, sin = math.cos(math.radians(angle)) / factor, math.sin(math.radians(angle)) / factor
        pixels = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
        half = torch.tensor([width / 2, height / 2], dtype=torch.float64)
        shift = torch.tensor([right * width, down * height], dtype=torch.float64)
        matrices.append(torch.cat([pixels * half / half[:, None], -(pixels @ shift / half)[:, None]], 1))
    grid = torch.nn.functional.affine_grid(torch.stack(matrices), list(SHAPE), align_corners=False)
    expected = torch.nn.functional.grid_sample(IMAGES, grid, padding_mode=padding_mode, align_corners=False)
    found = augment.affine(**options, padding_mode=padding_mode)(KEY, IMAGES)
    assert torch.allclose(found, expected, atol=1e-10)


def test_affine_moves_whole_pixels_down_and_to_the_right(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda key, shape, dtype: torch.ones(shape, dtype=dtype))
    moved = augment.affine(translate=0.25, padding_mode="zeros")(KEY, IMAGES[..., :4])
    assert torch.allclose(moved[:, :, 2:, 1:], IMAGES[:, :, :-2, :3])
    assert not moved[:, :, :2].any()
    quarter = augment.rotate(90)(KEY, IMAGES[..., :7, :])
    assert torch.allclose(quarter, IMAGES[..., :7, :].rot90(1, (-2, -1)), atol=1e-12)
    double = augment.scale(2, 2)(KEY, torch.arange(8.0).expand(1, 1, 8, 8))
    assert double[0, 0, 0].tolist() == [1.75, 2.25, 2.75, 3.25, 3.75, 4.25, 4.75, 5.25]


def test_bfloat16_images_are_read_in_the_right_place():
    images = torch.arange(300.0).expand(4, 1, 2, 300).bfloat16()
    shifts = draws(KEY, 4, translate=0.1, dtype=torch.float32)[1][:, 1] * 300
    moved = augment.affine(translate=0.1, padding_mode="border")(KEY, images)[:, 0, 0, 150]
    assert torch.allclose(moved.float(), 150 - shifts, atol=1.5)


def test_noise_is_normal_of_the_deviation_asked_for():
    noisy = augment.noise(0.3)(KEY, IMAGES)
    assert torch.equal(noisy, IMAGES + 0.3 * random.normal(KEY, SHAPE, torch.float64))
    added = augment.noise(0.3)(KEY, torch.zeros(64, 1, 32, 32))
    assert abs(float(added.mean())) < 5 * 0.3 / 256
    assert float(added.std()) == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_cutout_zeroes_one_square_around_its_draw(size):
    images = torch.ones(40, 2, 8, 7)
    rows, columns = (random.uniform(KEY, (40, 2)) * torch.tensor([8, 7])).long().unbind(1)
    expected = images.clone()
    for image, row, column in zip(expected, rows.tolist(), columns.tolist(), strict=True):
        top, left = row - size // 2, column - size // 2
        image[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
    assert torch.equal(augment.cutout(size)(KEY, images), expected)


def test_compose_gives_each_its_own_key():
    first, second = augment.noise(0.3), augment.noise(0.1)
    expected = second(random.fold_in(KEY, 1), first(random.fold_in(KEY, 0), IMAGES))
    assert torch.equal(augment.compose(first, second)(KEY, IMAGES), expected)


def test_normalize_is_torchvision_s():
    mean, std = [0.5, -1.0, 0.0], [0.25, 2.0, 1.0]
    assert torch.allclose(augment.normalize(mean, std)(KEY, IMAGES), F.normalize(IMAGES, mean, std), atol=1e-12)
    with pytest.raises(ValueError, match=r"augment\.normalize: images have 2 channels, mean and std are of 3"):
        augment.normalize(mean, std)(KEY, IMAGES[:, :2])


# torchvision's transforms


@pytest.mark.parametrize(
    "transform",
    [
        v2.ColorJitter(brightness=0.5, hue=0.1),
        v2.RandomResizedCrop((8, 7), antialias=True),
        v2.RandAugment(),
        v2.RandomApply([v2.RandomErasing(1.0)], p=0.9),
        lambda images: images + np.random.normal() + python_random.random(),
    ],
)
def test_torchvision_s_transforms_are_governed_by_the_key(transform):
    change, images = augment.torchvision(transform), torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), python_random.getstate()
    first = [change(random.key(seed), images) for seed in range(4)]
    torch.manual_seed(7)
    assert all(torch.equal(a, change(random.key(seed), images)) for seed, a in enumerate(first))
    assert len({a.numpy().tobytes() for a in first}) > 1
    torch.set_rng_state(before[0])
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), python_random.getstate()
    assert (before[1:], first[0].shape) == (after[1:], images.shape)


def test_generators_are_left_alone_by_a_transform_even_where_it_fails():
    before = torch.get_rng_state()

    def fails(images):
        torch.rand(3)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        augment.torchvision(fails)(KEY, IMAGES)
    augment.torchvision(v2.RandomHorizontalFlip())(KEY, IMAGES)
    assert torch.equal(torch.get_rng_state(), before)


def test_torchvision_s_transforms_inside_a_step_are_an_error(fast_compile):
    change = augment.torchvision(v2.RandomHorizontalFlip())
    both = augment.compose(augment.noise(0.1), change)
    for call in (torch.compile(lambda key, x: both(key, x), fullgraph=True), torch.func.grad(both, argnums=1)):
        with pytest.raises(RuntimeError, match=r"augment\.torchvision: .* before the step"):
            call(KEY, IMAGES)
    with pytest.raises(RuntimeError, match=r"nor under torch\.func"):
        torch.vmap(change)(random.split(KEY, len(IMAGES)), IMAGES)
    with pytest.raises(TypeError, match=r"augment\.torchvision: transform is float"):
        augment.torchvision(0.5)


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: augment.flip(1.5), "flip: p is 1.5, expected a number from 0 to 1"),
        (lambda: augment.flip(float("nan")), "flip: p is nan"),
        (lambda: augment.crop(-1), "crop: padding is -1"),
        (lambda: augment.crop(1.5), "crop: padding is 1.5"),
        (lambda: augment.crop(1, padding_mode="edge"), "crop: padding_mode is 'edge', expected one of ('zeros', "),
        (lambda: augment.rotate(-3), "rotate: degrees is -3, expected a number at least 0"),
        (lambda: augment.rotate(3, padding_mode="edge"), "rotate: padding_mode is 'edge'"),
        (lambda: augment.scale(0, 1), "scale: the factors are (0, 1), expected 0 < low <= high"),
        (lambda: augment.affine(scale=(1.2, 0.8)), "affine: the factors are (1.2, 0.8)"),
        (lambda: augment.affine(translate="far"), "affine: translate is 'far'"),
        (lambda: augment.scale(1, float("inf")), "scale: the factors are (1, inf)"),
        (lambda: augment.noise(-1), "noise: std is -1"),
        (lambda: augment.noise(float("inf")), "noise: std is inf"),
        (lambda: augment.cutout(0), "cutout: size is 0"),
        (lambda: augment.normalize([0.5], [0]), "normalize: mean is [0.5] and std [0.0], expected one finite"),
        (lambda: augment.normalize([0.5], [1, 1]), "normalize: mean is [0.5] and std [1.0, 1.0]"),
        (lambda: augment.normalize([math.nan], [1]), "normalize: mean is [nan]"),
        (lambda: augment.normalize([], []), "normalize: mean is []"),
        (lambda: augment.normalize(0.5, 0.25), "normalize: mean is 0.5 and std 0.25, expected a list"),
        (lambda: augment.affine(scale=0.5), "affine: the factors are 0.5, expected 0 < low <= high"),
        (lambda: augment.scale("a", "b"), "scale: the factors are ('a', 'b')"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=re.escape(f"augment.{message}")):
        make()


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("compose", "crop zeros")])
def test_what_are_no_images_is_named(name):
    with pytest.raises(TypeError, match=rf"augment\.{name}: images are torch.uint8, .*data\.preprocess"):
        EVERY[name](KEY, torch.zeros(SHAPE, dtype=torch.uint8))
    with pytest.raises(ValueError, match=rf"augment\.{name}: images are of shape \(3, 8, 7\), .*images\[None\]"):
        EVERY[name](KEY, IMAGES[0])
    with pytest.raises(ValueError, match=rf"augment\.{name}: images are list"):
        EVERY[name](KEY, [IMAGES])
    with pytest.raises((TypeError, ValueError), match="key"):
        EVERY[name](7, IMAGES)


def test_compose_takes_functions():
    with pytest.raises(TypeError, match=r"augment\.compose: argument 1 is float"):
        augment.compose(augment.flip(), 0.5)
