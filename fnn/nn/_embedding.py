"""`Embedding`."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fnn import random
from fnn.nn._inference import inferring
from fnn.nn._layer import Layer, Params, State, expect, layer
from fnn.nn._window import check_count
from fnn.nn.initializers import Initializer


@layer
class Embedding(Layer):
    """A row of the table for each id, ids: (...) integers -> (..., features); as `torch.nn.Embedding`.

    params: `weight` (num_embeddings, features), drawn from the standard normal distribution. `padding_idx`: the id
    that fills short sequences; its row starts at zero and looking it up has no derivative, in forward mode either.
    Inside a `Block` the table is `m.name.params["weight"]`, for a head that shares it.

    Raises TypeError for ids that are not integers. An id out of [0, num_embeddings) raises IndexError where the ids
    can be read: on the CPU, eager, under transforms too. Elsewhere, compiled or on CUDA, its row is NaN.

    Example:
        >>> from fnn import nn, random
        >>> words = nn.Embedding(10_000, 3, padding_idx=0)
        >>> ids = torch.tensor([[5, 7, 0]])
        >>> params, _ = words.init(random.key(0), ids)
        >>> words(params, ids)[0, 2]
        tensor([0., 0., 0.])
    """

    num_embeddings: int
    features: int
    padding_idx: int | None = None
    weight_init: Initializer = random.normal
    uses_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count(self, num_embeddings=self.num_embeddings, features=self.features)
        if self.padding_idx is not None and not -self.num_embeddings <= self.padding_idx < self.num_embeddings:
            raise ValueError(
                f"Embedding: padding_idx must be one of the {self.num_embeddings} ids, got {self.padding_idx!r}"
            )

    def init(self, key: Tensor, ids: Tensor) -> tuple[Params, State]:  # type: ignore[override]
        _integers(ids)
        weight = self.weight_init(key, (self.num_embeddings, self.features), torch.float32)
        expect(self, {"weight": weight}, {"weight": (self.num_embeddings, self.features)})
        if self.padding_idx is not None:
            rows = torch.arange(self.num_embeddings, device=weight.device)[:, None]
            weight = torch.where(rows == self.padding_idx % self.num_embeddings, 0, weight)
        return {"weight": weight}, {}

    def apply(  # type: ignore[override]
        self, params: Params, state: State, ids: Tensor, *, key: Tensor | None = None, train: bool = False
    ) -> tuple[Tensor, State]:
        (weight,) = expect(self, params, {"weight": (self.num_embeddings, self.features)})
        ids = _integers(ids)
        known = None
        if not self._check(ids):
            # Left alone, a `vmap` over tables and ids would read a wrong id from the next table.
            known = (ids >= 0) & (ids < self.num_embeddings)
            ids = torch.where(known, ids, 0)
        y = F.embedding(ids, weight)
        if self.padding_idx is not None:  # torch's own padding_idx has a derivative in forward mode
            padding = ids == self.padding_idx % self.num_embeddings
            y = torch.where(padding.unsqueeze(-1), y.detach(), y)
        return (y if known is None else torch.where(known.unsqueeze(-1), y, torch.nan)), state

    def _check(self, ids: Tensor) -> bool:
        """Raise for ids that have no row; False where the ids cannot be read, or not without waiting for them."""
        if torch.compiler.is_compiling() or inferring():
            return False
        functorch = torch._C._functorch  # type: ignore[attr-defined]
        while functorch.is_functorch_wrapped_tensor(ids):
            ids = functorch.get_unwrapped(ids)
        if type(ids) not in (Tensor, torch.nn.Parameter) or ids.device.type != "cpu":
            return False
        wrong = (ids < 0) | (ids >= self.num_embeddings)
        if bool(wrong.any()):
            shown = ids[wrong]
            raise IndexError(
                f"Embedding: ids must be in [0, {self.num_embeddings}), got ids from {int(shown.min())} "
                f"to {int(shown.max())}"
            )
        return True


def _integers(ids: Tensor) -> Tensor:
    """The ids as int64 or int32."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"Embedding: ids must be integers, got {ids.dtype}; convert them first, ids.long()")
    return ids if ids.dtype in (torch.int64, torch.int32) else ids.long()
