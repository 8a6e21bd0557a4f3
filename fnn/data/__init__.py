"""Data: real images as tensors, keyed splits and augmentation, and batches in an order that a run can resume."""

from fnn.data import augment
from fnn.data._cifar10 import cifar10
from fnn.data._digits import digits
from fnn.data._images import ImageDataset, preprocess
from fnn.data._loader import Loader
from fnn.data._mnist import mnist
from fnn.data._split import split
from fnn.data._torchvision import torchvision

__all__ = ["ImageDataset", "Loader", "augment", "cifar10", "digits", "mnist", "preprocess", "split", "torchvision"]
