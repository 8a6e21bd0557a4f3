"""Data: real images as tensors, keyed splits, and batches in an order that a run can resume."""

from fnn.data._digits import digits
from fnn.data._images import ImageDataset, preprocess
from fnn.data._loader import Loader
from fnn.data._mnist import mnist
from fnn.data._split import split

__all__ = ["ImageDataset", "Loader", "digits", "mnist", "preprocess", "split"]
