"""`use`: the only setting there is."""

from __future__ import annotations

from typing import Literal

Backend = Literal["auto", "triton", "torch"]
BACKENDS = ("auto", "triton", "torch")


class _Setting:
    backend: str = "auto"


setting = _Setting()


class use:
    """Sets which kernels `fnn.ops` takes: from the call on, or inside of a `with` block only.

    "auto": the faster one by the fixed rule. "triton": the Triton kernels on CUDA, whatever the rule says, and on the
    CPU the operators around them. "torch": plain torch functions. A compiled function reads it while it is traced,
    and is traced again if it has changed. All threads of a process share the setting. It is no decorator.

    Example:
        >>> from fnn import ops
        >>> with ops.use("torch"):
        ...     print(ops.explain(ops.softmax, torch.ones(2, 3)))
        PyTorch: fnn.ops.use("torch")
    """

    def __init__(self, backend: Backend) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"use: backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        self.backend, self.before = backend, setting.backend
        setting.backend = backend

    def __enter__(self) -> None:
        setting.backend = self.backend

    def __exit__(self, *_: object) -> None:
        setting.backend = self.before
