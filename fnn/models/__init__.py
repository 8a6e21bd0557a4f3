"""Networks as expressions of containers and blocks."""

from fnn.models._lenet import lenet5 as lenet5
from fnn.models._mlp import mlp as mlp
