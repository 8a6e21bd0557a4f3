"""Jacobians and Hessians with few nonzeros: detection, coloring, and evaluation by few products."""

from fnn.diff._sparse.detect import hessian_sparsity as hessian_sparsity
from fnn.diff._sparse.detect import jacobian_sparsity as jacobian_sparsity
from fnn.diff._sparse.functions import sparse_hessian as sparse_hessian
from fnn.diff._sparse.functions import sparse_jacobian as sparse_jacobian
from fnn.diff._sparse.pattern import SparsityPattern as SparsityPattern
from fnn.diff._sparse.prepared import PreparedDerivative as PreparedDerivative
