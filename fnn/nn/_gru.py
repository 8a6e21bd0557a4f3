"""`GRU`."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fnn.nn._layer import layer
from fnn.nn._recurrent import Carry, Recurrent


@layer
class GRU(Recurrent):
    """Gated recurrent unit; `torch.nn.GRU`, batch first.

    x: (..., T, features) -> ((..., T, directions * hidden_size), h), h: (layers * directions, ..., hidden_size).
    params as those of `LSTM`, with 3 hidden_size rows: reset, update, new. The carry is one tensor; all else is as in
    `LSTM`.

    Example:
        >>> from fnn import nn, random
        >>> gru = nn.GRU(8, num_layers=2, bidirectional=True)
        >>> params, _ = gru.init(random.key(0), torch.zeros(2, 5, 3))
        >>> y, h = gru(params, torch.zeros(2, 5, 3))
        >>> y.shape, h.shape
        (torch.Size([2, 5, 16]), torch.Size([4, 2, 8]))

    Source: Cho et al., 2014, in the form of `torch.nn.GRU`, which resets after the product.
    """

    gates: ClassVar[int] = 3
    adds_biases: ClassVar[bool] = False

    def step(self, inputs: Tensor, carry: Carry, weight: Tensor, bias: Tensor | None) -> Carry:
        (hidden,) = carry
        reset, update, new = inputs.chunk(3, -1)
        reset_hidden, update_hidden, new_hidden = F.linear(hidden, weight, bias).chunk(3, -1)
        new = torch.tanh(new + torch.sigmoid(reset + reset_hidden) * new_hidden)
        return (new + torch.sigmoid(update + update_hidden) * (hidden - new),)
