"""Derivatives of pure functions: gradients, Jacobians, Hessians, kernels, operators, with one vocabulary."""
