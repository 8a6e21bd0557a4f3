"""Data: images and text as tensors, keyed splits and augmentation, and batches in an order that a run can resume."""

from fnn.data import augment
from fnn.data._cifar10 import cifar10
from fnn.data._digits import digits
from fnn.data._images import ImageDataset, preprocess
from fnn.data._kfold import KFold
from fnn.data._loader import Loader
from fnn.data._mnist import fashion_mnist, mnist
from fnn.data._split import split
from fnn.data._text import TextDataset, text
from fnn.data._torchvision import torchvision
from fnn.data._windows import Windows

__all__ = [
    "ImageDataset",
    "KFold",
    "Loader",
    "TextDataset",
    "Windows",
    "augment",
    "cifar10",
    "digits",
    "fashion_mnist",
    "mnist",
    "preprocess",
    "split",
    "text",
    "torchvision",
]
