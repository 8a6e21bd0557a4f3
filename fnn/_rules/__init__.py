"""Functions with derivatives of their own, seen by every transform, compiled or not.

`fnn.diff` makes `custom_vjp`, `custom_jvp` and `implicit_diff` of them; `fnn.diff` and `fnn.nn` share `remat`.
"""
