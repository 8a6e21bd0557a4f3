"""fnn: JAX-style functional deep learning for PyTorch.

Models are pure functions over parameter pytrees, gradients are function transforms, and one `torch.compile` holds
the whole training step.
"""

from torch.func import vmap as vmap

from fnn import data as data
from fnn import diff as diff
from fnn import distributed as distributed
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
from fnn._tune_cpu import tune_cpu as tune_cpu
from fnn.diff import FisherOperator as FisherOperator
from fnn.diff import GGNOperator as GGNOperator
from fnn.diff import HessianOperator as HessianOperator
from fnn.diff import IdentityOperator as IdentityOperator
from fnn.diff import JacobianOperator as JacobianOperator
from fnn.diff import KFACOperator as KFACOperator
from fnn.diff import LinearOperator as LinearOperator
from fnn.diff import NTKOperator as NTKOperator
from fnn.diff import PreparedDerivative as PreparedDerivative
from fnn.diff import SparsityPattern as SparsityPattern
from fnn.diff import auto_chunk_size as auto_chunk_size
from fnn.diff import bilaplacian as bilaplacian
from fnn.diff import cg as cg
from fnn.diff import check_grads as check_grads
from fnn.diff import clipped_grad as clipped_grad
from fnn.diff import custom_jvp as custom_jvp
from fnn.diff import custom_vjp as custom_vjp
from fnn.diff import divergence as divergence
from fnn.diff import explain_laplacian as explain_laplacian
from fnn.diff import gnvp as gnvp
from fnn.diff import grad as grad
from fnn.diff import hessian as hessian
from fnn.diff import hessian_diagonal as hessian_diagonal
from fnn.diff import hessian_sparsity as hessian_sparsity
from fnn.diff import hvp as hvp
from fnn.diff import implicit_diff as implicit_diff
from fnn.diff import jacobian as jacobian
from fnn.diff import jacobian_sparsity as jacobian_sparsity
from fnn.diff import jvp as jvp
from fnn.diff import laplacian as laplacian
from fnn.diff import linearize as linearize
from fnn.diff import ntk as ntk
from fnn.diff import ntk_cost as ntk_cost
from fnn.diff import per_sample_grad as per_sample_grad
from fnn.diff import per_sample_grad_norm as per_sample_grad_norm
from fnn.diff import remat as remat
from fnn.diff import sparse_hessian as sparse_hessian
from fnn.diff import sparse_jacobian as sparse_jacobian
from fnn.diff import stop_gradient as stop_gradient
from fnn.diff import tap as tap
from fnn.diff import tap_grads as tap_grads
from fnn.diff import unravel_jacobian as unravel_jacobian
from fnn.diff import value_and_grad as value_and_grad
from fnn.diff import vjp as vjp

__version__ = "0.1.0"
