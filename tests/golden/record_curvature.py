"""Record per-sample gradients by Opacus and curvature matrices by curvlinops, for tests/test_derivative_models.py.

The networks of models.py as `torch.nn` modules, in float64. Run by `make golden` in an environment of its own, which
has torch; writes curvature.npz beside itself. Matrices are recorded as products with a random matrix `probe`; all but
Opacus' with a leading axis of parameter sets, where there is one.
"""

from pathlib import Path

import curvlinops
import models
import numpy as np
import opacus
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12, bias=False)
        self.proj = nn.Linear(4, 4, bias=False)
        self.norm2 = nn.LayerNorm(4)
        self.up = nn.Linear(4, 3)
        self.down = nn.Linear(3, 4, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 2)).movedim(-3, 0).transpose(-2, -3)
        scores = torch.softmax(q @ k.mT / 2**0.5, -1)
        x = x + self.proj((scores @ v).transpose(-2, -3).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.block1, self.block2, self.head = Attention(), Attention(), nn.Linear(4, models.CLASSES)

    def forward(self, x):
        return self.head(self.block2(self.block1(x)).mean(-2))


class Residual(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 2, 3, stride, 1, bias=False), nn.BatchNorm2d(2)
        self.conv2, self.norm2 = nn.Conv2d(2, 2, 3, 1, 1, bias=False), nn.BatchNorm2d(2)
        self.down = nn.Conv2d(2, 2, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = nn.functional.gelu(self.norm1(self.conv1(x)))
        return nn.functional.gelu(self.norm2(self.conv2(y)) + self.down(x))


class Resnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 2, 3, 1, 1, bias=False), nn.BatchNorm2d(2)
        self.block1, self.block2, self.head = Residual(1), Residual(2), nn.Linear(2, models.CLASSES)

    def forward(self, x):
        return self.head(self.block2(self.block1(nn.functional.gelu(self.norm(self.stem(x))))).mean((-1, -2)))


def lenet():
    layers = {
        "conv1": nn.Conv2d(1, 2, 3),
        "pool1": nn.MaxPool2d(2),
        "relu": nn.ReLU(),
        "conv2": nn.Conv2d(2, 3, 2),
        "pool2": nn.MaxPool2d(2),
        "sigmoid": nn.Sigmoid(),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(12, 4),
        "tanh": nn.Tanh(),
        "fc2": nn.Linear(4, models.CLASSES),
    }
    module = nn.Sequential()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


MODULES = {
    "mlp": lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, models.CLASSES)),
    "lenet": lenet,
    "resnet": Resnet,
    "attention": Transformer,
}


def build(name, given, member):
    """A module in evaluation mode with the parameters of a member, which must lie in the order of models.PARAMS."""
    module = MODULES[name]().double().eval()
    loaded = models.by_path(models.PARAMS[name], torch.from_numpy(given["params"][member]))
    assert list(loaded) == [path for path, _ in module.named_parameters()]
    loaded |= models.by_path(models.STATE.get(name, {}), torch.from_numpy(given["state"].reshape(-1)))
    missing, unexpected = module.load_state_dict(loaded, strict=False)
    assert not unexpected
    assert all(path.endswith("num_batches_tracked") for path in missing)
    return module


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).detach().numpy()


def clipping(name, given, x, labels):
    """Per-sample gradients, their norms by ghost clipping, and the clipped sum; Opacus records when training only."""
    module = GradSampleModule(build(name, given, 0).train(), loss_reduction="sum")
    nn.functional.cross_entropy(module(x), labels, reduction="sum").backward()
    found = {"per_sample_grad": torch.cat([p.grad_sample.flatten(1) for p in module.parameters()], 1).numpy()}
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=given["bound"],
        expected_batch_size=None,
        loss_reduction="sum",
    )
    optimizer.clip_and_accumulate()
    found["clipped_grad"] = flat(p.summed_grad for p in module.parameters())
    ghost = GradSampleModuleFastGradientClipping(
        build(name, given, 0).train(), loss_reduction="sum", max_grad_norm=given["bound"], use_ghost_clipping=True
    )
    nn.functional.cross_entropy(ghost(x), labels, reduction="sum").backward()
    found["per_sample_grad_norm"] = ghost.get_norm_sample().detach().numpy()
    return found


def matrices(name, given, member, x, labels, probe):
    module = build(name, given, member)
    arguments = (module, nn.CrossEntropyLoss(), list(module.parameters()), [(x[:2], labels[:2]), (x[2:], labels[2:])])
    operators = {
        "hessian": curvlinops.HessianLinearOperator(*arguments),
        "ggn": curvlinops.GGNLinearOperator(*arguments),
        "empirical_fisher": curvlinops.EFLinearOperator(*arguments),
    }
    if name in ("mlp", "lenet"):
        for kind in (curvlinops.FisherType.TYPE2, curvlinops.FisherType.EMPIRICAL):
            for approximation in (curvlinops.KFACType.EXPAND, curvlinops.KFACType.REDUCE):
                for separate in (True, False):
                    key = f"kfac_{kind.lower()}_{approximation.lower()}_{'separate' if separate else 'joint'}"
                    operators[key] = curvlinops.KFACLinearOperator(
                        *arguments, fisher_type=kind, kfac_approx=approximation, separate_weight_and_bias=separate
                    )
    return {key: (operator @ probe[: operator.shape[1]]).detach().numpy() for key, operator in operators.items()}


def main():
    probe = np.random.default_rng(9).normal(size=(max(map(models.size, models.PARAMS)), 2))
    versions = {"opacus_version": opacus.__version__, "torch_version": torch.__version__}
    recorded = {"probe": probe} | {key: np.array(value) for key, value in versions.items()}
    for name in MODULES:
        given = models.arrays(name)
        x, labels = torch.from_numpy(given["x"]), torch.from_numpy(given["labels"])
        if name != "resnet":  # Opacus refuses batch normalisation
            recorded |= {f"{name}/opacus/{key}": value for key, value in clipping(name, given, x, labels).items()}
        of_members = [
            matrices(name, given, member, x, labels, torch.from_numpy(probe)) for member in range(models.MEMBERS)
        ]
        for key in of_members[0]:
            recorded[f"{name}/{key}"] = np.stack([member[key] for member in of_members])
    np.savez_compressed(Path(__file__).with_name("curvature.npz"), **recorded)


if __name__ == "__main__":
    main()
