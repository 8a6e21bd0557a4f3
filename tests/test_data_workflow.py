"""A `Dataset` of one's own and torchvision's transforms, through `data.Loader`."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from fnn import random
from fnn.data import Loader
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
