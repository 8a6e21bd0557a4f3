"""Matrices of derivatives as linear operators: products, traces, eigenvalues and solves, without the matrix.

Every operator has one interface, that of `LinearOperator`. The curvature operators take one batch, or a loader.

>>> from fnn.diff.operators import HessianOperator
>>> H = HessianOperator(lambda p: (p["w"] ** 4).sum(), {"w": torch.tensor([1.0, 2.0])})
>>> H.diag(), H.trace(), H @ {"w": torch.tensor([1.0, 0.0])}
(tensor([12., 48.]), tensor(60.), {'w': tensor([12.,  0.])})
"""

from fnn.diff.operators._algebra import IdentityOperator
from fnn.diff.operators._fisher import FisherOperator
from fnn.diff.operators._ggn import GGNOperator
from fnn.diff.operators._hessian import HessianOperator
from fnn.diff.operators._jacobian import JacobianOperator
from fnn.diff.operators._kfac import KFACOperator, KroneckerBlock
from fnn.diff.operators._lanczos import Eigenpairs
from fnn.diff.operators._ntk import NTKOperator
from fnn.diff.operators._operator import LinearOperator

__all__ = [
    "Eigenpairs",
    "FisherOperator",
    "GGNOperator",
    "HessianOperator",
    "IdentityOperator",
    "JacobianOperator",
    "KFACOperator",
    "KroneckerBlock",
    "LinearOperator",
    "NTKOperator",
]
