"""Record what Optax computes, for tests/test_schedules.py and tests/test_optim_transforms.py, in float64.

Run by `make golden` in the environment of the peers; writes transforms.npz beside itself.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

jax.config.update("jax_enable_x64", True)

STEPS = 60
SCHEDULES = {
    "exponential": optax.exponential_decay(0.7, 10, 0.6),
    "exponential_begin": optax.exponential_decay(0.7, 7, 0.5, transition_begin=5, staircase=True, end_value=0.1),
    "exponential_growth": optax.exponential_decay(0.1, 9, 1.5, transition_begin=3, end_value=0.6),
    "polynomial": optax.polynomial_schedule(1.0, 0.1, 2.0, 30),
    "polynomial_begin": optax.polynomial_schedule(0.2, 1.3, 0.5, 25, 12),
    "piecewise": optax.piecewise_constant_schedule(0.8, {10: 0.3, 25: 0.3, 40: 0.3}),
    "join": optax.join_schedules(
        [optax.linear_schedule(0.0, 1.0, 8), optax.constant_schedule(1.0), optax.cosine_decay_schedule(1.0, 20)],
        [8, 20],
    ),
}
BAD = (4, 5, 9, 17, 18, 19, 30)  # steps whose gradients are not finite, never more than three in a row


def scheduled():
    """Adam whose learning rate is computed in float64: of its int32 count Optax makes float32 values."""
    return optax.adam(lambda count: optax.linear_schedule(0.1, 0.0, 20)(count.astype(jnp.float64)))


TRANSFORMATIONS = {
    "accumulate": optax.MultiSteps(scheduled(), 4, accumulator_dtype=jnp.float64),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.05), 3),
    "ema": optax.chain(optax.ema(0.8), optax.sgd(0.05)),
    "ema_biased": optax.chain(optax.ema(0.8, debias=False), optax.sgd(0.05)),
    "lookahead": optax.lookahead(optax.adam(0.05), 5, 0.3),
}


def loss(params, target):
    """The function of tests/golden/record_optax.py."""
    error = params["weight"] - target
    return (
        jnp.sum(error**2)
        + 0.1 * jnp.sum(jnp.sin(params["weight"]).sum(1) * params["bias"])
        + jnp.sum(params["bias"] ** 4)
    )


def trajectory(name, optimizer, params, target):
    lookahead = name == "lookahead"
    if lookahead:
        params = optax.LookaheadParams.init_synced(params)
    state = optimizer.init(params)
    path = []
    for step in range(STEPS):
        fast = params.fast if lookahead else params
        grads = jax.grad(loss)(fast, target)
        if name == "accumulate":  # every batch has gradients of its own
            grads = jax.tree.map(lambda g, step=step: g * (1 + step % 4), grads)
        if name == "apply_if_finite" and step in BAD:
            grads = {**grads, "bias": grads["bias"].at[0].set(jnp.nan)}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        parts = (params.fast, params.slow) if lookahead else (params,)
        path.append(np.concatenate([leaf.reshape(-1) for part in parts for leaf in (part["weight"], part["bias"])]))
    return np.stack(path)


def main():
    rng = np.random.default_rng(1)
    weight, bias, target = rng.normal(size=(3, 2)), rng.normal(size=3), rng.normal(size=(3, 2))
    params = {"weight": jnp.asarray(weight), "bias": jnp.asarray(bias)}
    recorded = {"weight": weight, "bias": bias, "target": target, "optax_version": np.array(optax.__version__)}
    recorded["bad"] = np.array(BAD)
    for name, schedule in SCHEDULES.items():
        values = [schedule(jnp.asarray(step, jnp.float64)) for step in range(STEPS)]
        recorded[f"schedule/{name}"] = np.asarray(values, np.float64)
    for name, optimizer in TRANSFORMATIONS.items():
        recorded[f"transformation/{name}"] = trajectory(name, optimizer, params, jnp.asarray(target))
    np.savez_compressed(Path(__file__).with_name("transforms.npz"), **recorded)


if __name__ == "__main__":
    main()
