"""Stretches of one long sequence, as examples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fnn.data._arrays import to_tensor


class Windows:
    """The windows of a sequence of tokens, each with the token that follows every one of its tokens.

    tokens: (n,) integers, a tensor or numpy array, such as the train part of `text`
    context: tokens in a window
    stride: tokens from the start of a window to that of the next; 1 gives one at every position, `context`
        windows that follow each other without overlap

    Window i is ``x = tokens[i * stride : i * stride + context]`` and ``y``, the same moved on by one token. A `Loader`
    takes windows as data in memory and gathers its batches (x, y), int64 and each (batch, context), from the tokens
    on its device: nothing but the tokens is stored. What is left over at the end is in no window.

    ``len(windows)`` is ``(n - 1 - context) // stride + 1``.

    Raises `TypeError` or `ValueError` for tokens that are not integers in one row, and for too few of them.

    Example:
        >>> windows = Windows(torch.arange(10), context=3, stride=3)
        >>> x, y = windows.gather(torch.tensor([0, 2]))
        >>> x.tolist(), y.tolist()
        ([[0, 1, 2], [6, 7, 8]], [[1, 2, 3], [7, 8, 9]])
    """

    def __init__(self, tokens: Tensor | np.ndarray, context: int, stride: int = 1):
        if not isinstance(tokens, Tensor | np.ndarray):
            raise TypeError(f"Windows: tokens are {type(tokens).__name__}, expected a tensor or numpy array")
        tokens = to_tensor(tokens, "", "Windows")
        if tokens.ndim != 1 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(
                f"Windows: tokens have shape {tuple(tokens.shape)} and dtype {tokens.dtype}, expected integers in one "
                f"row, (n,)"
            )
        for name, value in (("context", context), ("stride", stride)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Windows: {name} is {value!r}, expected a whole number of tokens from 1 on")
        if len(tokens) <= context:
            raise ValueError(
                f"Windows: {len(tokens)} tokens hold no window of {context} and the token after it; expected at least "
                f"{context + 1}, or a smaller context"
            )
        self.tokens, self.context, self.stride = tokens, context, stride

    def __len__(self) -> int:
        return (len(self.tokens) - 1 - self.context) // self.stride + 1

    def to(self, device: torch.device | str) -> Windows:
        """The same windows with their tokens on `device`."""
        return Windows(self.tokens.to(device), self.context, self.stride)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """x and y, each (batch, context) int64, of the windows `index`: (batch,) integers on the tokens' device."""
        places = (index * self.stride).unsqueeze(1) + torch.arange(self.context, device=index.device)
        return self.tokens[places].long(), self.tokens[places + 1].long()

    def __repr__(self) -> str:
        return f"Windows({len(self)} of {self.context} tokens, stride {self.stride})"
