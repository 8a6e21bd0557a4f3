"""optim.muon, against torch.optim.Muon in bfloat16 and against the singular value decomposition."""

import pytest
import torch
from torch.func import vmap

from fnn import optim


def matrices(count, rows, columns, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, columns, generator=generator, dtype=dtype) for _ in range(count)]


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False, "momentum": 0.5}, {"adjust_lr": "match_rms_adamw", "ns_steps": 3}]
)
def test_in_bfloat16_equals_torch(shape, options):
    """The iteration itself is torch's, bit for bit; the averages before it differ by rounding."""
    start, *gradients = matrices(4, *shape)
    opt = optim.muon(0.1, **options)
    params, opt_state = start, opt.init(start)
    theirs = start.clone().requires_grad_()
    renamed = {"adjust_lr_fn" if name == "adjust_lr" else name: value for name, value in options.items()}
    optimizer = torch.optim.Muon([theirs], lr=0.1, **renamed)
    for gradient in gradients:
        updates, opt_state = opt.update(gradient, opt_state, params)
        params = optim.apply_updates(params, updates)
        theirs.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(params, theirs.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_singular_vectors_are_kept_and_values_are_near_one(shape):
    (gradient,) = matrices(1, *shape)
    transformation = optim.scale_by_muon(0.0, compute_dtype=None)
    update, _ = transformation.update(gradient, transformation.init(gradient))
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    core = u.T @ update @ vh.T / max(1, shape[0] / shape[1]) ** 0.5
    torch.testing.assert_close(core, torch.diag(core.diag()), rtol=0, atol=1e-10)
    assert ((core.diag() > 0.6) & (core.diag() < 1.3)).all()
    assert torch.equal(transformation.update(0 * gradient, transformation.init(gradient))[0], 0 * gradient)


def test_the_factors_of_a_wide_matrix():
    (gradient,) = matrices(1, 2, 8)

    def size(adjust_lr):
        transformation = optim.scale_by_muon(adjust_lr=adjust_lr)
        return transformation.update(gradient, transformation.init(gradient))[0].norm().item()

    assert size("match_rms_adamw") / size("original") == pytest.approx(0.2 * 8**0.5)
    assert size("spectral_unclamped") / size("original") == pytest.approx(0.5)


def test_vmap_in_bfloat16():
    batch = torch.stack(matrices(3, 3, 4, torch.float32))
    opt = optim.muon(0.1)
    together = vmap(lambda g: opt.update(g, opt.init(g), g)[0])(batch)
    for k in range(3):
        single, _ = opt.update(batch[k], opt.init(batch[k]), batch[k])
        torch.testing.assert_close(together[k], single, rtol=0, atol=2e-2)  # other kernels, other rounding


def test_errors():
    params = {"0": {"weight": torch.ones(3, 2), "bias": torch.ones(3)}}
    with pytest.raises(ValueError, match=r"muon: leaf '0\.bias' has shape \(3,\), expected a matrix .* by_label\("):
        optim.muon(0.1).init(params)
    with pytest.raises(
        ValueError, match="adjust_lr must be one of 'original', 'match_rms_adamw', 'spectral_unclamped', got"
    ):
        optim.muon(0.1, adjust_lr="rms")
    for wrong in (torch.float16, torch.int32, "float32"):
        with pytest.raises(ValueError, match="compute_dtype must be None or a floating dtype of the range of float32"):
            optim.muon(0.1, compute_dtype=wrong)
    with pytest.raises(ValueError, match="ns_steps must be an int >= 1, got 0"):
        optim.muon(0.1, ns_steps=0)
    with pytest.raises(ValueError, match=r"ns_coefficients must be three numbers \(a, b, c\), got \(1.0, 2.0\)"):
        optim.muon(0.1, ns_coefficients=(1.0, 2.0))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_stacked_layers_are_matrices_of_their_own(shape):
    start, gradient = torch.stack(matrices(2, *shape)), torch.stack(matrices(4, *shape)[2:])
    opt = optim.muon(0.1, compute_dtype=None)
    params, grads = {"h": {"*": {"weight": start}}}, {"h": {"*": {"weight": gradient}}}
    updates, _ = opt.update(grads, opt.init(params), params)
    for index in range(2):
        alone, _ = opt.update(gradient[index], opt.init(start[index]), start[index])
        torch.testing.assert_close(updates["h"]["*"]["weight"][index], alone)
    with pytest.raises(ValueError, match=r"leaf 'h.weight' has shape \(2, \d, \d\), expected a matrix"):
        opt.init({"h": {"weight": start}})
