"""fnn: JAX-style functional deep learning for PyTorch.

Models are pure functions over parameter pytrees, gradients are function transforms, and one `torch.compile` holds
the whole training step.
"""

from torch.func import vmap as vmap

from fnn import data as data
from fnn import interop as interop
from fnn import losses as losses
from fnn import models as models
from fnn import nn as nn
from fnn import ops as ops
from fnn import optim as optim
from fnn import random as random
from fnn import train as train
from fnn import tree as tree
from fnn._summary import summary as summary

__version__ = "0.1.0"
