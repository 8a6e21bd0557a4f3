"""A `Dataset` of one's own and torchvision's transforms, through `data.Loader`; and what identifies its order."""

import json
import random as python_random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from fnn import random
from fnn.data import KFold, Loader, Windows
from fnn.data._torchvision import torchvision

torchvision()
from torchvision.transforms import v2  # noqa: E402


class Images(Dataset):
    """Grey images and labels from arrays, with a transform for each."""

    def __init__(self, images, labels, transform=None, target_transform=None):
        self.images, self.labels = images, labels
        self.transform, self.target_transform = transform, target_transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image, label = self.images[index], int(self.labels[index])
        image = self.transform(image) if self.transform else image
        return image, self.target_transform(label) if self.target_transform else label


PIXELS = np.random.default_rng(0).integers(0, 256, (150, 28, 28), dtype=np.uint8)
LABELS = np.arange(150) % 10


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_of_a_dataset_of_one_s_own(workers):
    loader = Loader(Images(PIXELS, LABELS), 64, key=random.key(0), workers=workers)
    images, labels = next(iter(loader))
    assert list(images.shape) == [64, 28, 28]
    assert (list(labels.shape), labels.dtype) == ([64], torch.int64)
    order = random.permutation(random.fold_in(random.key(0), 0), 150)[:128]
    for n, (images, labels) in enumerate(loader):  # the order depends on the key alone
        chosen = order[64 * n : 64 * n + 64].numpy()
        assert np.array_equal(images.numpy(), PIXELS[chosen])
        assert np.array_equal(labels.numpy(), LABELS[chosen])


def test_torchvision_s_transforms_run_in_the_loader():
    colour = np.random.default_rng(1).integers(0, 256, (5, 300, 400, 3), dtype=np.uint8)
    prepare = v2.Compose(
        [
            v2.ToImage(),  # ToTensor in two steps, as torchvision now recommends
            v2.Resize(256, antialias=True),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    one_hot = lambda label: torch.nn.functional.one_hot(torch.tensor(label), 10)
    images, labels = next(iter(Loader(Images(colour, LABELS, prepare, one_hot), 4)))
    assert (images.shape, images.dtype) == ((4, 3, 224, 224), torch.float32)
    assert torch.equal(images[2], prepare(colour[2]))
    assert torch.equal(labels, torch.eye(10, dtype=torch.int64)[:4])


def test_torchvision_s_transforms_take_whole_batches():
    images, _ = next(iter(Loader((torch.from_numpy(PIXELS)[:, None], torch.from_numpy(LABELS)), 8)))
    assert v2.functional.center_crop(v2.functional.resize(images, [16, 16]), [12, 12]).shape == (8, 1, 12, 12)


def jitter(image):
    """A random transform of torchvision's, and draws from numpy's and Python's generators beside it."""
    image = v2.functional.to_image(image)
    image = v2.RandomResizedCrop((12, 12), antialias=True)(v2.ToDtype(torch.float32, scale=True)(image))
    return v2.RandomErasing(0.5)(image) + np.random.rand() + 10 * python_random.random()


def images_of(loader, epoch, start=0):
    return torch.cat([images for images, _ in loader.epoch(epoch, start)])


def generator_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), python_random.getstate()


def test_random_transforms_do_not_depend_on_workers_or_where_an_epoch_starts():
    dataset = Images(PIXELS[:30], LABELS[:30], jitter)
    alone, one, two = (Loader(dataset, 4, key=random.key(5), workers=n) for n in (0, 1, 2))
    before = generator_states()
    whole = images_of(alone, 2)
    assert torch.equal(images_of(one, 2), whole)
    assert torch.equal(images_of(two, 2, start=3), whole[12:])
    assert torch.equal(images_of(alone, 2, start=6), whole[24:])
    assert generator_states() == before
    python_random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert torch.equal(images_of(alone, 2), whole)
    # What an example draws is its own: another in each epoch, and the same in a batch of another size.
    order = random.permutation(random.fold_in(random.key(5), 2), 30)[:28]
    other = images_of(Loader(dataset, 7, key=random.key(5)), 2)
    assert torch.equal(other[order.argsort()], whole[order.argsort()])
    assert len(whole.mean((1, 2, 3)).unique()) == 28
    assert not set(whole.mean((1, 2, 3)).tolist()) & set(images_of(alone, 3).mean((1, 2, 3)).tolist())


def test_random_transforms_of_data_in_order():
    loader = Loader(Images(PIXELS[:4], LABELS[:4], jitter), 4)
    assert torch.equal(images_of(loader, 0), images_of(loader, 0))
    assert not torch.equal(images_of(loader, 0), images_of(loader, 1))


def test_generators_are_left_alone_where_an_example_fails_or_the_loop_stops():
    before = generator_states()
    loader = Loader(Images(PIXELS, LABELS, jitter), 4, key=random.key(0))
    next(iter(loader))
    with pytest.raises(IndexError):
        list(Loader(Images(PIXELS[:2], LABELS, jitter), 4))
    assert generator_states() == before


def test_the_parts_of_a_dataset_by_folds():
    dataset = Images(PIXELS, LABELS)
    for training, validation in KFold(torch.arange(150), 3, key=random.key(0)):
        parts = [torch.utils.data.Subset(dataset, part.tolist()) for part in (training, validation)]
        (_, labels), *_ = Loader(parts[1], 50)
        assert torch.equal(labels, torch.from_numpy(LABELS)[validation])
        assert len(Loader(parts[0], 50)) == 2


def test_the_identity_changes_with_what_decides_the_order_and_with_nothing_else():
    x = torch.arange(12)
    loaders = [
        Loader(x, 4, key=random.key(1)),
        Loader(x, 4, key=random.key(2)),
        Loader(x, 4),
        Loader(x, 3, key=random.key(1)),
        Loader(x, 4, key=random.key(1), remainder="pad"),
        Loader(x[:11], 4, key=random.key(1)),
        Loader(Images(PIXELS[:12], LABELS[:12]), 4, key=random.key(1)),
        Loader(Windows(torch.arange(14), 2), 4, key=random.key(1)),
        Loader(Windows(torch.arange(15), 3), 4, key=random.key(1)),
        Loader(Windows(torch.arange(25), 2, 2), 4, key=random.key(1)),
    ]
    texts = [json.dumps(loader.identity) for loader in loaders]
    assert len(set(texts)) == len(texts)
    assert all(json.loads(text) == loader.identity for text, loader in zip(texts, loaders, strict=True))
    elsewhere = Loader(x, 4, key=random.key(1), device="meta").identity  # where no digest can be taken
    assert elsewhere == {k: v for k, v in loaders[0].identity.items() if k != "digest"}
    dataset = Loader(Images(PIXELS[:12], LABELS[:12]), 4, key=random.key(1), workers=3, device="meta")
    assert dataset.identity == loaders[6].identity
