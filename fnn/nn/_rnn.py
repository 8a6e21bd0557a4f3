"""`RNN`."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fnn.nn._layer import layer
from fnn.nn._recurrent import Carry, Recurrent


@layer
class RNN(Recurrent):
    """`h = tanh(weight_ih @ x + bias_ih + weight_hh @ h + bias_hh)` at each step; `torch.nn.RNN`, batch first.

    x: (..., T, features) -> ((..., T, directions * hidden_size), h), h: (layers * directions, ..., hidden_size).
    nonlinearity: "tanh" or "relu". params as those of `LSTM`, with hidden_size rows. The carry is one tensor; all else
    is as in `LSTM`.

    Example:
        >>> from fnn import nn, random
        >>> rnn = nn.RNN(8, nonlinearity="relu")
        >>> params, _ = rnn.init(random.key(0), torch.zeros(5, 3))
        >>> y, h = rnn(params, torch.zeros(5, 3))
        >>> y.shape, h.shape
        (torch.Size([5, 8]), torch.Size([1, 8]))

    Source: Elman, 1990.
    """

    _: KW_ONLY
    nonlinearity: str = "tanh"

    gates: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"RNN: nonlinearity must be 'tanh' or 'relu', got {self.nonlinearity!r}")

    def step(self, inputs: Tensor, carry: Carry, weight: Tensor, bias: Tensor | None) -> Carry:
        activate = torch.tanh if self.nonlinearity == "tanh" else torch.relu
        return (activate(inputs + F.linear(carry[0], weight, bias)),)
