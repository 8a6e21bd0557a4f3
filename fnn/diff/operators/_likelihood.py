"""Likelihoods of outputs: the Fisher information in the outputs, as products and as square roots."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fnn import random

Likelihood = Literal["categorical", "bernoulli", "gaussian"]
Kind = Literal["exact", "empirical", "sampled"]


def check_likelihood(name: str, likelihood: str, kind: str, key: Tensor | None, samples: int) -> None:
    """Raise `ValueError` for names and options that do not fit together."""
    if likelihood not in ("categorical", "bernoulli", "gaussian"):
        raise ValueError(f"{name}: likelihood must be 'categorical', 'bernoulli' or 'gaussian', got {likelihood!r}")
    if kind not in ("exact", "empirical", "sampled"):
        raise ValueError(f"{name}: kind must be 'exact', 'empirical' or 'sampled', got {kind!r}")
    if kind == "sampled":
        if key is None:
            raise ValueError(f"{name}: kind='sampled' draws targets and needs a key: key=fnn.random.key(0)")
        random.check_key(key)
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"{name}: samples must be a positive int, got {samples!r}")


def check_outputs(name: str, outputs: object, targets: Tensor | None, likelihood: str, kind: str) -> None:
    """Raise unless outputs are one tensor that the likelihood and the targets fit."""
    if not isinstance(outputs, Tensor) or outputs.ndim == 0:
        raise TypeError(f"{name}: the model's outputs must be one tensor with a leading axis of examples")
    if likelihood == "categorical" and outputs.ndim < 2:
        raise ValueError(f"{name}: categorical outputs are (batch, classes, ...), got shape {tuple(outputs.shape)}")
    if kind != "empirical":
        return
    if not isinstance(targets, Tensor):
        raise ValueError(f"{name}: kind='empirical' needs the targets y, got {type(targets).__name__}")
    shape = outputs.shape[:1] + outputs.shape[2:] if likelihood == "categorical" else outputs.shape
    if targets.shape != shape:
        raise ValueError(f"{name}: expected targets of shape {tuple(shape)}, got {tuple(targets.shape)}")
    if likelihood == "categorical" and targets.is_floating_point():
        raise TypeError(f"{name}: categorical targets are integer classes, got {targets.dtype}")


def information_product(outputs: Tensor, tangent: Tensor, likelihood: str) -> Tensor:
    """The exact Fisher information in the outputs times a tangent of the outputs, example by example."""
    if likelihood == "categorical":
        p = outputs.softmax(1)
        return p * (tangent - (p * tangent).sum(1, keepdim=True))
    if likelihood == "bernoulli":
        p = outputs.sigmoid()
        return p * (1 - p) * tangent
    return tangent


def score(outputs: Tensor, targets: Tensor, likelihood: str) -> Tensor:
    """The gradient of each example's negative log-likelihood in its outputs."""
    if likelihood == "categorical":
        hits = torch.nn.functional.one_hot(targets.to(torch.int64), outputs.shape[1]).movedim(-1, 1)
        return outputs.softmax(1) - hits.to(outputs.dtype)
    if likelihood == "bernoulli":
        return outputs.sigmoid() - targets.to(outputs.dtype)
    return outputs - targets.to(outputs.dtype)


def sampled_scores(outputs: Tensor, likelihood: str, key: Tensor, samples: int) -> Tensor:
    """`(samples, *outputs.shape)`: scores for targets drawn from the model's own distribution."""
    outputs, shape = outputs.detach(), (samples, *outputs.shape)
    if likelihood == "gaussian":
        return random.normal(key, shape, outputs.dtype).to(outputs.device)
    if likelihood == "bernoulli":
        p = outputs.sigmoid()
        return p - random.bernoulli(key, p.expand(shape)).to(outputs.dtype)
    last = outputs.movedim(1, -1)
    targets = random.categorical(key, last, shape=(samples, *last.shape[:-1]))
    return torch.vmap(lambda drawn: score(outputs, drawn, likelihood))(targets)


def mean_outer_product(scores: Tensor, tangent: Tensor) -> Tensor:
    """The mean of g <g, tangent> over scores g, example by example. scores: (samples, *outputs), tangent: outputs."""
    flat, along = scores.flatten(2) if scores.ndim > 2 else scores[:, :, None], tangent.flatten(1)
    if tangent.ndim == 1:
        along = tangent[:, None]
    weights = (flat * along).sum(2, keepdim=True)
    return (flat * weights).mean(0).reshape(tangent.shape)


def square_root(
    outputs: Tensor, targets: Tensor | None, likelihood: str, kind: str, key: Tensor | None, samples: int
) -> Tensor:
    """Vectors r with sum r r.T = the information in each example's outputs; `(batch, draws, *outputs of one)`."""
    if kind == "empirical":
        assert targets is not None
        return score(outputs, targets, likelihood)[:, None]
    if kind == "sampled":
        assert key is not None
        return sampled_scores(outputs, likelihood, key, samples).movedim(0, 1) / samples**0.5
    one = outputs[0]
    units = torch.eye(one.numel(), dtype=outputs.dtype, device=outputs.device).reshape(-1, *one.shape)
    if likelihood == "gaussian":
        return units.expand(len(outputs), *units.shape)
    if likelihood == "bernoulli":
        p = outputs.sigmoid()
        return (p * (1 - p)).sqrt()[:, None] * units
    # For each class c (and position): sqrt(p_c) (e_c - p), whose squares add up to diag(p) - p p.T.
    p = outputs.softmax(1)[:, None]
    chosen = (p.sqrt() * units).sum(2, keepdim=True)
    return chosen * (units - p * units.sum(1, keepdim=True))
