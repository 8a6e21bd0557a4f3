"""fnn.nn.initializers: JAX's numbers from the same key, torch's distribution as the default."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fnn import random
from fnn.nn import initializers

GOLDEN = np.load(Path(__file__).parent / "golden" / "initializers.npz")
SHAPES = {"square": (5, 5), "wide": (3, 7), "kernel": (4, 3, 2, 3)}
MAKERS = {
    "uniform": lambda: initializers.uniform(0.3),
    "normal": lambda: initializers.normal(0.3),
    "truncated_normal": lambda: initializers.truncated_normal(0.3),
    "orthogonal": lambda: initializers.orthogonal(1.5),
    "variance_scaling": lambda: initializers.variance_scaling(0.7, "fan_out", "normal"),
}


@pytest.mark.parametrize("case", GOLDEN.files)
def test_equal_to_jax_from_the_same_key(case):
    name, shape, dtype = case.split("/")
    init = MAKERS.get(name, getattr(initializers, name))()
    ours = init(random.key(42), SHAPES[shape], getattr(torch, dtype))
    # Draws agree to 4 ulp, and an orthogonal matrix to the rounding of a QR factorisation.
    tolerance = {"float32": 4e-6 if name == "orthogonal" else 1e-6, "float64": 1e-13}[dtype]
    np.testing.assert_allclose(ours.numpy(), GOLDEN[case], rtol=tolerance, atol=tolerance * 0.1)


def test_default_is_torchs_bound():
    weight = initializers.fan_in_uniform(random.key(0), (64, 8, 3, 3))
    bound = (8 * 9) ** -0.5
    assert bound * 0.99 < weight.abs().max() <= bound
    assert abs(float(weight.mean())) < bound / 20


def test_constants_dtype_and_device():
    meta = torch.empty(2, dtype=torch.int32, device="meta")
    assert initializers.he_normal()(meta, (3, 4)).is_meta
    assert torch.equal(initializers.constant(2.5)(random.key(0), (2,)), torch.full((2,), 2.5))
    for init in (initializers.zeros, initializers.ones, initializers.fan_in_uniform, initializers.orthogonal()):
        assert init(random.key(0), (4, 3), torch.float64).dtype == torch.float64


def test_orthogonal_is_orthogonal_along_the_chosen_axis():
    q = initializers.orthogonal(column_axis=0)(random.key(0), (3, 2, 5), torch.float64).reshape(3, -1)
    torch.testing.assert_close(q @ q.T, torch.eye(3, dtype=torch.float64))


def test_errors():
    with pytest.raises(ValueError, match="at least two axes, got shape \\(3,\\)"):
        initializers.he_normal()(random.key(0), (3,))
    with pytest.raises(ValueError, match="mode must be .*got 'fan'"):
        initializers.variance_scaling(1.0, "fan", "normal")
    with pytest.raises(ValueError, match="distribution must be .*got 'cauchy'"):
        initializers.variance_scaling(1.0, "fan_in", "cauchy")
