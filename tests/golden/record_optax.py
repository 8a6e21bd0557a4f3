"""Record what Optax computes, for tests/test_optim.py: schedules, and trajectories of optimizers in float64.

Run by `make golden` in the environment of the peers; writes optax.npz beside itself.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

jax.config.update("jax_enable_x64", True)

STEPS = 60
SCHEDULES = {
    "constant": optax.constant_schedule(0.3),
    "linear": optax.linear_schedule(1.0, 0.1, 20),
    "linear_begin": optax.linear_schedule(0.0, 2.0, 15, 7),
    "cosine": optax.cosine_decay_schedule(0.5, 30),
    "cosine_alpha": optax.cosine_decay_schedule(0.5, 30, 0.1, 2.0),
    "warmup_cosine": optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 40),
    "warmup_cosine_end": optax.warmup_cosine_decay_schedule(0.2, 1.0, 7, 33, 0.05, 1.5),
    "warmup_cosine_none": optax.warmup_cosine_decay_schedule(0.2, 1.0, 0, 25, 0.5),
}


def warmup_cosine(count):
    """In float64: of its int32 count Optax makes float32 values."""
    return optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 50)(count.astype(jnp.float64))


OPTIMIZERS = {
    "sgd": optax.sgd(0.02),
    "sgd_momentum": optax.sgd(0.02, momentum=0.9),
    "sgd_nesterov": optax.sgd(0.02, momentum=0.8, nesterov=True),
    "adam": optax.adam(0.05, b1=0.8, b2=0.95, eps=1e-6),
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "adamw_mask": optax.adamw(0.05, weight_decay=0.1, mask={"weight": True, "bias": False}),
    "adamw_scheduled": optax.adamw(warmup_cosine, weight_decay=0.1),
    "clipped_sgd": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)),
    "clipped_values": optax.chain(optax.clip(0.3), optax.sgd(0.05)),
    "lion": optax.lion(0.02, b1=0.8, b2=0.95, weight_decay=0.1),
    "lion_mask": optax.lion(0.02, weight_decay=0.3, mask={"weight": True, "bias": False}),
    "lars": optax.lars(0.5, weight_decay=0.1, trust_coefficient=0.05),
    "lars_options": optax.lars(
        0.02,
        weight_decay=0.1,
        weight_decay_mask={"weight": True, "bias": False},
        trust_coefficient=3.0,
        trust_ratio_mask={"weight": True, "bias": False},
        eps=0.01,
        momentum=0.6,
        nesterov=True,
    ),
    "lamb": optax.lamb(0.02),
    "lamb_decay": optax.lamb(0.02, b1=0.8, b2=0.95, eps=1e-4, weight_decay=0.1, mask={"weight": True, "bias": False}),
    "schedule_free_sgd": contrib.schedule_free_sgd(0.05, b1=0.8, weight_decay=0.1),
    "schedule_free_adamw": contrib.schedule_free_adamw(0.05, b2=0.95, eps=1e-6, weight_decay=0.1),
    # the weights of Optax are those of its schedule one step later
    "schedule_free_warmup": contrib.schedule_free(
        optax.sgd(warmup_cosine), lambda count: warmup_cosine(count - 1), b1=0.7, weight_lr_power=1.5
    ),
}


def loss(params, target):
    """A quadratic with a curved coupling between the two leaves, the same in tests/test_optim.py."""
    error = params["weight"] - target
    return (
        jnp.sum(error**2)
        + 0.1 * jnp.sum(jnp.sin(params["weight"]).sum(1) * params["bias"])
        + jnp.sum(params["bias"] ** 4)
    )


def trajectory(optimizer, params, target, evaluated=lambda state, params: params):
    state = optimizer.init(params)
    path = []
    for _ in range(STEPS):
        updates, state = optimizer.update(jax.grad(loss)(params, target), state, params)
        params = optax.apply_updates(params, updates)
        shown = evaluated(state, params)
        path.append(np.concatenate([shown["weight"].reshape(-1), shown["bias"]]))
    return np.stack(path)


def main():
    rng = np.random.default_rng(0)
    weight, bias, target = rng.normal(size=(3, 2)), rng.normal(size=3), rng.normal(size=(3, 2))
    params = {"weight": jnp.asarray(weight), "bias": jnp.asarray(bias)}
    recorded = {"weight": weight, "bias": bias, "target": target, "optax_version": np.array(optax.__version__)}
    for name, schedule in SCHEDULES.items():
        values = [schedule(jnp.asarray(step, jnp.float64)) for step in range(STEPS)]
        recorded[f"schedule/{name}"] = np.asarray(values, np.float64)
    for name, optimizer in OPTIMIZERS.items():
        recorded[f"optimizer/{name}"] = trajectory(optimizer, params, jnp.asarray(target))[9::10]
        if name.startswith("schedule_free"):
            averages = trajectory(optimizer, params, jnp.asarray(target), contrib.schedule_free_eval_params)
            recorded[f"averages/{name}"] = averages[9::10]
    np.savez_compressed(Path(__file__).with_name("optax.npz"), **recorded)


if __name__ == "__main__":
    main()
