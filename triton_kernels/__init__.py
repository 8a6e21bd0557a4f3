"""Triton kernels (torch and triton only); none is here yet, and nothing in `fnn` needs them."""
