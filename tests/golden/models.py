"""The four small networks whose derivatives are recorded: shapes by path, in torch's leaf order, and seeded arrays.

NumPy only: the recorders build the networks from it in JAX and in torch, and save the arrays for the tests.
"""

import numpy as np

MEMBERS = 2  # parameter sets of each network: what a vmapped derivative maps over
BATCH = 3
CLASSES = 3


def _norm(name):
    return {f"{name}.weight": (2,), f"{name}.bias": (2,)}


def _residual(name, shortcut):
    return {
        f"{name}.conv1.weight": (2, 2, 3, 3),
        **_norm(f"{name}.norm1"),
        f"{name}.conv2.weight": (2, 2, 3, 3),
        **_norm(f"{name}.norm2"),
        **({f"{name}.down.weight": (2, 2, 1, 1)} if shortcut else {}),
    }


def _transformer(name):
    return {
        f"{name}.norm1.weight": (4,),
        f"{name}.norm1.bias": (4,),
        f"{name}.qkv.weight": (12, 4),
        f"{name}.proj.weight": (4, 4),
        f"{name}.norm2.weight": (4,),
        f"{name}.norm2.bias": (4,),
        f"{name}.up.weight": (3, 4),
        f"{name}.up.bias": (3,),
        f"{name}.down.weight": (4, 3),
    }


PARAMS = {
    "mlp": {
        "0.weight": (4, 5),
        "0.bias": (4,),
        "2.weight": (4, 4),
        "2.bias": (4,),
        "4.weight": (CLASSES, 4),
        "4.bias": (CLASSES,),
    },
    "lenet": {
        "conv1.weight": (2, 1, 3, 3),
        "conv1.bias": (2,),
        "conv2.weight": (3, 2, 2, 2),
        "conv2.bias": (3,),
        "fc1.weight": (4, 12),
        "fc1.bias": (4,),
        "fc2.weight": (CLASSES, 4),
        "fc2.bias": (CLASSES,),
    },
    "resnet": {
        "stem.weight": (2, 1, 3, 3),
        **_norm("norm"),
        **_residual("block1", shortcut=False),
        **_residual("block2", shortcut=True),
        "head.weight": (CLASSES, 2),
        "head.bias": (CLASSES,),
    },
    "attention": {
        **_transformer("block1"),
        **_transformer("block2"),
        "head.weight": (CLASSES, 4),
        "head.bias": (CLASSES,),
    },
}
STATE = {
    "resnet": {
        f"{name}.running_{kind}": (2,)
        for name in ("norm", "block1.norm1", "block1.norm2", "block2.norm1", "block2.norm2")
        for kind in ("mean", "var")
    }
}
BOUND = {"mlp": 1.8, "lenet": 1.6, "resnet": 1.24, "attention": 3.0}  # of gradients' norms: some are longer, some not
INPUT = {"mlp": (5,), "lenet": (1, 12, 12), "resnet": (1, 5, 5), "attention": (3, 4)}


def size(name):
    return sum(int(np.prod(shape)) for shape in PARAMS[name].values())


def arrays(name):
    """What a network is evaluated at: a dict of float64 arrays, and `labels` of integers.

    params: (MEMBERS, size); x: (BATCH, *INPUT), x2: (2, *INPUT) for kernels; v, u, w: directions in the parameters,
    the inputs and the outputs; labels: (BATCH,); bound: a float; state: (k, 2), its rows those of STATE.
    """
    rng = np.random.default_rng(sorted(PARAMS).index(name))
    members = []
    for _ in range(MEMBERS):
        leaves = []
        for path, shape in PARAMS[name].items():
            fan_in = int(np.prod(shape[1:]))
            centre = 1.0 if "norm" in path and path.endswith("weight") else 0.0
            spread = fan_in**-0.5 if len(shape) > 1 else 0.3
            leaves.append((centre + spread * rng.normal(size=shape)).reshape(-1))
        members.append(np.concatenate(leaves))
    state = [
        rng.uniform(0.5, 1.5, size=shape) if path.endswith("var") else 0.3 * rng.normal(size=shape)
        for path, shape in STATE.get(name, {}).items()
    ]
    return {
        "params": np.stack(members),
        "state": np.stack(state) if state else np.zeros((0, 2)),
        "x": rng.normal(size=(BATCH, *INPUT[name])),
        "x2": rng.normal(size=(2, *INPUT[name])),
        "bound": BOUND[name],
        "labels": rng.integers(0, CLASSES, size=BATCH),
        "v": rng.normal(size=size(name)),
        "u": rng.normal(size=(BATCH, *INPUT[name])),
        "w": rng.normal(size=(BATCH, CLASSES)),
    }


def by_path(shapes, vector):
    """The arrays of `shapes` cut out of one vector, in order; `vector` may be of any array library."""
    found, start = {}, 0
    for path, shape in shapes.items():
        count = int(np.prod(shape))
        found[path] = vector[start : start + count].reshape(shape)
        start += count
    return found
