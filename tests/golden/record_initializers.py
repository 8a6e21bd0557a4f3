"""Record `jax.nn.initializers` from fixed keys: `make golden` writes tests/golden/initializers.npz.

Weights have torch's layout (out, in, *kernel), so JAX is told in_axis=1, out_axis=0.
"""

from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)
init = jax.nn.initializers
AXES = {"in_axis": 1, "out_axis": 0}
MAKERS = {
    "lecun_normal": lambda: init.lecun_normal(**AXES),
    "lecun_uniform": lambda: init.lecun_uniform(**AXES),
    "glorot_normal": lambda: init.glorot_normal(**AXES),
    "glorot_uniform": lambda: init.glorot_uniform(**AXES),
    "he_normal": lambda: init.he_normal(**AXES),
    "he_uniform": lambda: init.he_uniform(**AXES),
    "uniform": lambda: init.uniform(0.3),
    "normal": lambda: init.normal(0.3),
    "truncated_normal": lambda: init.truncated_normal(0.3),
    "orthogonal": lambda: init.orthogonal(1.5),
    "variance_scaling": lambda: init.variance_scaling(0.7, "fan_out", "normal", **AXES),
}
SHAPES = {"square": (5, 5), "wide": (3, 7), "kernel": (4, 3, 2, 3)}

recorded = {}
for name, make in MAKERS.items():
    for shape_name, shape in SHAPES.items():
        for dtype in ("float32", "float64"):
            value = make()(jax.random.PRNGKey(42), shape, dtype)
            recorded[f"{name}/{shape_name}/{dtype}"] = np.asarray(value)
np.savez_compressed(Path(__file__).with_name("initializers.npz"), **recorded)
