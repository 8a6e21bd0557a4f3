"""The optimizers under test, their counterparts in torch, and the function that they minimize.

To add an optimizer: a row in OPTIMIZERS, one in HYPERPARAMETERS, and one in OPTAX of test_optim.py where torch does not
have it.
"""

from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.func import grad

from fnn import optim, tree

GOLDEN = np.load(Path(__file__).parent / "golden" / "optax.npz")
TARGET = torch.from_numpy(GOLDEN["target"])


class Row(NamedTuple):
    make: object  # (lr) -> optimizer
    torch: object = None  # (parameters, lr) -> torch.optim.Optimizer
    lr: float = 0.05
    moments: int = 0  # how many numbers of state for each one of the parameters
    single: float = 1e-7  # how much farther than torch's a float32 run may be from a float64 one
    half: float = 2**-7  # how far rounding of half-precision moments moves an update, and
    stored: float = 0.0  # a moment that is made of updates
    elementwise: bool = True  # whether each element is updated for itself


class MuonAndAdamW:
    """torch.optim.Muon for matrices, iterating in their own dtype where it has bfloat16, and AdamW for the others."""

    def __init__(self, parameters, lr, **options):
        matrices, others = [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]
        self.parts = torch.optim.Muon(matrices, lr, **options), torch.optim.AdamW(others, lr)

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def step(self, closure):
        closure()
        # torch 2.15 casts with the second
        with (
            mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone),
            mock.patch.object(torch.Tensor, "to", lambda x, dtype, copy: x.clone()),
        ):
            self.parts[0].step()
        self.parts[1].step()


def muon_and_adamw(lr, **options):
    matrices = optim.muon(lr, compute_dtype=None, **options)
    return optim.by_label(
        {"muon": matrices, "adamw": optim.adamw(lr)}, lambda path, leaf: "muon" if leaf.ndim == 2 else "adamw"
    )


def decayed(**options):
    return {"weight_decay": 0.1, **options}


OPTIMIZERS = {
    "sgd": Row(lambda lr: optim.sgd(lr), lambda p, lr: torch.optim.SGD(p, lr)),
    "sgd_decay": Row(lambda lr: optim.sgd(lr, **decayed()), lambda p, lr: torch.optim.SGD(p, lr, **decayed())),
    "momentum": Row(lambda lr: optim.sgd(lr, 0.9), lambda p, lr: torch.optim.SGD(p, lr, 0.9), 0.02, 1),
    "momentum_decay": Row(
        lambda lr: optim.sgd(lr, 0.8, **decayed()), lambda p, lr: torch.optim.SGD(p, lr, 0.8, **decayed()), moments=1
    ),
    "nesterov": Row(
        lambda lr: optim.sgd(lr, 0.9, nesterov=True, weight_decay=0.01),
        lambda p, lr: torch.optim.SGD(p, lr, 0.9, nesterov=True, weight_decay=0.01),
        0.02,
        1,
    ),
    "dampening": Row(
        lambda lr: optim.sgd(lr, 0.9, dampening=0.4),
        lambda p, lr: torch.optim.SGD(p, lr, 0.9, dampening=0.4),
        moments=1,
    ),
    "adam": Row(lambda lr: optim.adam(lr), lambda p, lr: torch.optim.Adam(p, lr), moments=2),
    "adam_options": Row(
        lambda lr: optim.adam(lr, 0.7, 0.95, 1e-3, **decayed()),
        lambda p, lr: torch.optim.Adam(p, lr, (0.7, 0.95), 1e-3, **decayed()),
        moments=2,
    ),
    "adam_no_average": Row(
        lambda lr: optim.adam(lr, 0.0, 0.9), lambda p, lr: torch.optim.Adam(p, lr, (0.0, 0.9)), moments=1
    ),
    "adamw": Row(lambda lr: optim.adamw(lr), lambda p, lr: torch.optim.AdamW(p, lr), moments=2),
    "adamw_options": Row(
        lambda lr: optim.adamw(lr, 0.85, 0.98, 1e-6, **decayed()),
        lambda p, lr: torch.optim.AdamW(p, lr, (0.85, 0.98), 1e-6, **decayed()),
        moments=2,
    ),
    # alpha is float32 in the state, so that 1 - alpha has 17 bits; torch subtracts in float64
    "rmsprop": Row(lambda lr: optim.rmsprop(lr), lambda p, lr: torch.optim.RMSprop(p, lr), 0.02, 1, single=1e-6),
    "rmsprop_options": Row(
        lambda lr: optim.rmsprop(lr, 0.9, 1e-3, 0.8, centered=True, **decayed()),
        lambda p, lr: torch.optim.RMSprop(p, lr, 0.9, 1e-3, momentum=0.8, centered=True, **decayed()),
        0.01,
        3,
        half=2**-5,
        stored=2**-5,
    ),
    "adagrad": Row(lambda lr: optim.adagrad(lr), lambda p, lr: torch.optim.Adagrad(p, lr), 0.3, 1),
    "adagrad_options": Row(
        lambda lr: optim.adagrad(lr, 1e-3, lr_decay=0.01, initial_accumulator_value=0.2, **decayed()),
        lambda p, lr: torch.optim.Adagrad(p, lr, eps=1e-3, lr_decay=0.01, initial_accumulator_value=0.2, **decayed()),
        0.3,
        1,
    ),
    "adadelta": Row(
        lambda lr: optim.adadelta(lr, eps=1e-3),
        lambda p, lr: torch.optim.Adadelta(p, lr, eps=1e-3),
        1.0,
        2,
        stored=2**-6,
    ),
    "adadelta_options": Row(
        lambda lr: optim.adadelta(lr, 0.8, 1e-2, **decayed()),
        lambda p, lr: torch.optim.Adadelta(p, lr, 0.8, 1e-2, **decayed()),
        0.8,
        2,
        stored=2**-6,
    ),
    "adamax": Row(lambda lr: optim.adamax(lr), lambda p, lr: torch.optim.Adamax(p, lr), moments=2),
    "adamax_options": Row(
        lambda lr: optim.adamax(lr, 0.7, 0.95, 1e-3, **decayed()),
        lambda p, lr: torch.optim.Adamax(p, lr, (0.7, 0.95), 1e-3, **decayed()),
        moments=2,
    ),
    "nadam": Row(lambda lr: optim.nadam(lr), lambda p, lr: torch.optim.NAdam(p, lr), moments=2),
    "nadam_options": Row(
        lambda lr: optim.nadam(lr, 0.7, 0.95, 1e-3, 0.02, **decayed()),
        lambda p, lr: torch.optim.NAdam(p, lr, (0.7, 0.95), 1e-3, momentum_decay=0.02, **decayed()),
        moments=2,
    ),
    "nadam_decoupled": Row(
        lambda lr: optim.nadam(lr, **decayed(decoupled_weight_decay=True)),
        lambda p, lr: torch.optim.NAdam(p, lr, **decayed(decoupled_weight_decay=True)),
        moments=2,
    ),
    # the factor is in 1 - b2, which is as for rmsprop
    "radam": Row(lambda lr: optim.radam(lr), lambda p, lr: torch.optim.RAdam(p, lr), moments=2, single=1e-6),
    "radam_options": Row(
        lambda lr: optim.radam(lr, 0.7, 0.95, 1e-3, **decayed()),
        lambda p, lr: torch.optim.RAdam(p, lr, (0.7, 0.95), 1e-3, **decayed()),
        moments=2,
    ),
    "radam_decoupled": Row(
        lambda lr: optim.radam(lr, **decayed(decoupled_weight_decay=True)),
        lambda p, lr: torch.optim.RAdam(p, lr, **decayed(decoupled_weight_decay=True)),
        moments=2,
    ),
    "muon": Row(lambda lr: muon_and_adamw(lr), MuonAndAdamW, 0.02, half=2**-4, elementwise=False),
    "muon_options": Row(
        lambda lr: muon_and_adamw(
            lr, momentum=0.9, nesterov=False, adjust_lr="match_rms_adamw", ns_steps=4, weight_decay=0.01
        ),
        lambda p, lr: MuonAndAdamW(
            p, lr, momentum=0.9, nesterov=False, adjust_lr_fn="match_rms_adamw", ns_steps=4, weight_decay=0.01
        ),
        half=2**-4,
        elementwise=False,
    ),
    "lbfgs": Row(
        lambda lr: optim.lbfgs(lr, 4),
        lambda p, lr: torch.optim.LBFGS(p, lr, 1, tolerance_grad=0, tolerance_change=0, history_size=4),
        0.3,
        10,
        elementwise=False,
    ),
    "lion": Row(lambda lr: optim.lion(lr, **decayed()), lr=0.02, moments=1),
    "lars": Row(lambda lr: optim.lars(lr, 0.5, trust_coefficient=0.1, eps=0.1), lr=0.5, moments=1, elementwise=False),
    "lamb": Row(lambda lr: optim.lamb(lr, **decayed()), moments=2, elementwise=False),
    "schedule_free_sgd": Row(lambda lr: optim.schedule_free_sgd(lr), lr=0.2, moments=1, half=2**-2, stored=2**-6),
    "schedule_free_adamw": Row(lambda lr: optim.schedule_free_adamw(lr), moments=2, half=2**-2, stored=2**-6),
}

# the optimizers by the numbers that they take, for the tests that change these
HYPERPARAMETERS = {
    "sgd": (optim.sgd, {"lr": 0.05, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.1}),
    "adam": (optim.adam, {"lr": 0.05, "b1": 0.8, "b2": 0.9, "eps": 0.1, "weight_decay": 0.1}),
    "adamw": (optim.adamw, {"lr": 0.05, "b1": 0.8, "b2": 0.9, "eps": 0.1, "weight_decay": 0.1}),
    "rmsprop": (optim.rmsprop, {"lr": 0.05, "alpha": 0.9, "eps": 0.1, "momentum": 0.5, "weight_decay": 0.1}),
    "adagrad": (optim.adagrad, {"lr": 0.3, "eps": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
    "adadelta": (optim.adadelta, {"lr": 0.3, "rho": 0.8, "eps": 0.1, "weight_decay": 0.1}),
    "adamax": (optim.adamax, {"lr": 0.05, "b1": 0.8, "b2": 0.9, "eps": 0.1, "weight_decay": 0.1}),
    "nadam": (
        optim.nadam,
        {"lr": 0.05, "b1": 0.8, "b2": 0.9, "eps": 0.1, "momentum_decay": 0.1, "weight_decay": 0.1},
    ),
    "radam": (optim.radam, {"lr": 0.05, "b1": 0.8, "b2": 0.99, "eps": 0.1, "weight_decay": 0.1}),
    "lion": (optim.lion, {"lr": 0.5, "b1": 0.7, "b2": 0.8, "weight_decay": 0.1}),
    "lars": (
        optim.lars,
        {"lr": 0.3, "momentum": 0.8, "trust_coefficient": 0.1, "eps": 0.1, "weight_decay": 0.1},
    ),
    "lamb": (optim.lamb, {"lr": 0.05, "b1": 0.8, "b2": 0.9, "eps": 0.1, "weight_decay": 0.1}),
    "muon": (
        lambda **options: optim.freeze(optim.muon(compute_dtype=None, **options), "bias"),
        {"lr": 0.05, "momentum": 0.8, "eps": 5.0, "weight_decay": 0.1},
    ),
    "schedule_free_sgd": (
        optim.schedule_free_sgd,
        {"lr": 0.1, "b1": 0.8, "weight_lr_power": 1.0, "weight_decay": 0.1},
    ),
    "schedule_free_adamw": (
        optim.schedule_free_adamw,
        {"lr": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.1, "weight_lr_power": 1.0, "weight_decay": 0.1},
    ),
    "lbfgs": (optim.lbfgs, {"lr": 0.3}),
}


def start(dtype=torch.float64):
    return {name: torch.from_numpy(GOLDEN[name].copy()).to(dtype) for name in ("weight", "bias")}


def loss(params, target=TARGET):
    """The function of tests/golden/record_optax.py."""
    weight, bias = params["weight"], params["bias"]
    error = weight - target.to(weight.dtype)
    return error.square().sum() + 0.1 * (weight.sin().sum(1) * bias).sum() + (bias**4).sum()


def step(opt, params, opt_state, f=loss):
    updates, opt_state = opt.update(grad(f)(params), opt_state, params)
    return optim.apply_updates(params, updates), opt_state


def run(opt, params, steps, opt_state=None, f=loss):
    opt_state = opt.init(params) if opt_state is None else opt_state
    for _ in range(steps):
        params, opt_state = step(opt, params, opt_state, f)
    return params, opt_state


def flat(params):
    return torch.cat([params["weight"].reshape(-1), params["bias"]])


def layout(opt_state):
    leaves, structure = tree.flatten(opt_state)
    return structure, [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]


def compiled_step(opt, **options):
    torch._dynamo.reset()
    return torch.compile(lambda params, opt_state: step(opt, params, opt_state), fullgraph=True, **options)


def torch_run(make, steps, dtype=torch.float64, before=lambda p: None, each=lambda k, o: None):
    params = {name: leaf.requires_grad_() for name, leaf in start(dtype).items()}
    # torch.optim.NAdam keeps a product in the default dtype
    with mock.patch.object(torch, "get_default_dtype", return_value=dtype):
        optimizer = make(list(params.values()))

        def closure():
            optimizer.zero_grad()
            value = loss(params)
            value.backward()
            before(params.values())
            return value

        for k in range(steps):
            each(k, optimizer)
            optimizer.step(closure)
    return {name: leaf.detach() for name, leaf in params.items()}
