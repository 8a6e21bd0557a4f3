"""The forward Laplacian: one pass in which each value carries its Jacobian and its Laplacian along.

Functions without a rule raise `Unsupported`, and the caller takes another way.
"""

from fnn.diff._forward_laplacian._carried import Unsupported as Unsupported
from fnn.diff._forward_laplacian._interpreter import forward_laplacian as forward_laplacian
