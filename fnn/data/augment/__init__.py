"""Random changes of images: batched, on the images' device, a pure function of a key.

Each name here makes a function `(key, images) -> images` of images (n, channels, height, width), floating; those of
`mixup` and `cutmix` take and return labels, too. Every image gets a draw of its own, and the same key gives the same
batch, eager or compiled, on any device; `torchvision` lends a key to transforms that have neither. Call it on the
batches of a loader, or inside the loss function, where it becomes part of the compiled step. Pixels outside an image
are found as in `torch.nn.functional.grid_sample`: ``padding_mode="zeros"``, ``"border"`` repeats the border, and
``"reflection"`` mirrors the image at the outer edge of its border; standardised images have no black at zero.

>>> from fnn import random
>>> from fnn.data import augment
>>> change = augment.compose(augment.flip(), augment.crop(padding=4), augment.rotate(10.0), augment.noise(0.1))
>>> change(random.key(0), torch.zeros(8, 3, 32, 32)).shape
torch.Size([8, 3, 32, 32])
"""

from fnn.data.augment._affine import affine, rotate, scale
from fnn.data.augment._compose import compose
from fnn.data.augment._mix import cutmix, mixup
from fnn.data.augment._move import crop, flip
from fnn.data.augment._pixels import cutout, noise, normalize
from fnn.data.augment._torchvision import torchvision

__all__ = [
    "affine",
    "compose",
    "crop",
    "cutmix",
    "cutout",
    "flip",
    "mixup",
    "noise",
    "normalize",
    "rotate",
    "scale",
    "torchvision",
]
