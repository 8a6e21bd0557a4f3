"""`LSTM`."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fnn.nn._layer import layer
from fnn.nn._recurrent import Carry, Recurrent


@layer
class LSTM(Recurrent):
    """Long short-term memory; `torch.nn.LSTM`, batch first.

    x: (..., T, features) -> ((..., T, directions * hidden_size), (h, c)): the outputs and the carry.
    `(y, carry), state = lstm.apply(params, state, x, carry)`; h and c are (layers * directions, ..., hidden_size), as
    torch's h_n and c_n, and start from zeros without a carry. The carry is data: give it on to continue a sequence.
    `Sequential` drops it.

    params, by torch's names and shapes: `weight_ih_l0` (4 hidden_size, features), `weight_hh_l0` (4 hidden_size,
    hidden_size), `bias_ih_l0`, `bias_hh_l0` (4 hidden_size,), `..._l1` for the next layer, `..._reverse` for the
    second direction; the gates in the order input, forget, cell, output. All start uniform within
    1 / sqrt(hidden_size), as in torch.

    The steps are unrolled, so compiling grows with T: a gradient of 16 steps took 35 s in Inductor on two busy cores,
    one of 64 steps 230 s. Cut long sequences into chunks of one length, compile the chunk, and hand the carry on
    (detached, for truncated back-propagation).

    dropout: between layers, in training. Named input `lengths`, integers (...): the steps of each sequence that
    count; y is zero after them and the carry is that of the last, as of torch's packed sequences (more than T count
    as T; the padding must be finite).

    Raises ValueError for a carry or lengths of other shapes, TypeError for a carry of another dtype than the params.

    Example:
        >>> from fnn import nn, random
        >>> lstm = nn.LSTM(8)
        >>> params, _ = lstm.init(random.key(0), torch.zeros(2, 5, 3))
        >>> y, (h, c) = lstm(params, torch.zeros(2, 5, 3))
        >>> y.shape, h.shape
        (torch.Size([2, 5, 8]), torch.Size([1, 2, 8]))

    Source: Hochreiter and Schmidhuber, 1997.
    """

    gates: ClassVar[int] = 4
    carried: ClassVar[int] = 2

    def step(self, inputs: Tensor, carry: Carry, weight: Tensor, bias: Tensor | None) -> Carry:
        hidden, cell = carry
        enter, forget, new, leave = (inputs + F.linear(hidden, weight, bias)).chunk(4, -1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
        return torch.sigmoid(leave) * torch.tanh(cell), cell
