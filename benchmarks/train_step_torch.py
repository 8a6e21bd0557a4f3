"""The PyTorch sides of `train_step.py`: `python train_step_torch.py SIDE MODEL BATCH DEVICE BF16 WEIGHTS`.

SIDE is "ours compiled", "ours eager", "module", "module compiled", or "weights", which writes the parameters and
statistics that every side starts from to WEIGHTS.
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from train_step_cases import CLASSES, EPSILON, GPT, LEARNING_RATE, Side, batch, serve

import fnn
from fnn import losses, models, optim, random, train, tree


def network(model: str) -> fnn.nn.Layer:
    match model:
        case "mlp":
            return models.mlp(classes=CLASSES)
        case "lenet":
            return models.lenet5(CLASSES)
        case "resnet18":
            return models.resnet18(CLASSES)
    return models.gpt(*GPT())


def example(model: str, size: int, device: str) -> tuple[Tensor, Tensor]:
    x, y = batch(model, size)
    return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)


def write_weights(model: str, path: str) -> None:
    params, state = network(model).init(random.key(0), example(model, 1, "cpu")[0])
    leaves = {**tree.paths(params), **tree.paths(state)}
    np.savez(path, **{name: leaf.numpy() for name, leaf in leaves.items()})


def ours(model: str, size: int, device: str, bf16: bool, weights: str, compiled: bool) -> Side:
    net, optimizer, data = network(model), optim.adam(LEARNING_RATE, eps=EPSILON), example(model, size, device)
    stored = np.load(weights)
    params, state = net.init(random.key(0, device="meta"), data[0].to("meta"))

    def filled(values):
        names = iter(tree.paths(values))
        return tree.map(lambda _: torch.from_numpy(stored[next(names)]).to(device), values)

    def loss_fn(params, state, batch, key):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits, state = net.apply(params, state, batch[0], key=key, train=True)
        labels = batch[1].flatten()
        return losses.cross_entropy(logits.reshape(len(labels), -1).float(), labels), (state, {})

    step = train.make_step(loss_fn, optimizer, compile=compiled)
    start = train.TrainState.create(filled(params), optimizer, random.key(1, device=device), state=filled(state))
    current = {"state": start, "loss": torch.zeros(())}

    def one() -> None:
        current["state"], metrics = step(current["state"], data)
        current["loss"] = metrics["loss"]

    return side(one, lambda: current["loss"], tree.leaves(start), device)


def module(model: str, size: int, device: str, bf16: bool, weights: str, compiled: bool) -> Side:
    net = torch_module(model)
    fill(net, dict(np.load(weights)))
    net = net.to(device).train()
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE, eps=EPSILON, fused=True)
    forward = torch.compile(net) if compiled else net
    x, y = example(model, size, device)
    current = {"loss": torch.zeros(())}

    def one() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = forward(x)
        loss = F.cross_entropy(logits.reshape(y.numel(), -1).float(), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # at the end, so that no gradients lie in memory between steps
        current["loss"] = loss.detach()

    state = [*net.parameters(), *net.buffers()]
    return side(one, lambda: current["loss"], [*state, *net.parameters(), *net.parameters()], device)


def side(step, loss, state, device: str) -> Side:
    state_bytes = sum(leaf.numel() * leaf.element_size() for leaf in state)
    if device == "cpu":
        return Side(step, lambda: float(loss()), state_bytes)
    return Side(
        step,
        lambda: float(loss()),  # waits
        state_bytes,
        lambda: torch.cuda.max_memory_allocated() / 2**20,
        torch.cuda.reset_peak_memory_stats,
    )


def torch_module(model: str) -> torch.nn.Module:
    nn = torch.nn
    match model:
        case "mlp":
            return nn.Sequential(
                *[nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES)]
            )
        case "lenet":
            layers = {"conv1": nn.Conv2d(1, 6, 5), "relu1": nn.ReLU(), "pool1": nn.MaxPool2d(2)}
            layers |= {"conv2": nn.Conv2d(6, 16, 5), "relu2": nn.ReLU(), "pool2": nn.MaxPool2d(2)}
            layers |= {"flatten": nn.Flatten(), "fc1": nn.Linear(400, 120), "relu3": nn.ReLU()}
            layers |= {"fc2": nn.Linear(120, 84), "relu4": nn.ReLU(), "fc3": nn.Linear(84, CLASSES)}
            net = nn.Sequential()
            for name, layer in layers.items():
                net.add_module(name, layer)
            return net
        case "resnet18":
            from fnn.data._torchvision import torchvision

            return torchvision().models.resnet18(num_classes=CLASSES)
    return TorchGPT(GPT())


class TorchGPT(torch.nn.Module):
    """GPT-2 as one writes it in PyTorch, with its fused attention."""

    def __init__(self, sizes: GPT) -> None:
        super().__init__()
        self.wte = torch.nn.Embedding(sizes.vocab_size, sizes.width)
        self.wpe = torch.nn.Embedding(sizes.context, sizes.width)
        self.h = torch.nn.ModuleList([TorchBlock(sizes) for _ in range(sizes.layers)])
        self.ln_f = torch.nn.LayerNorm(sizes.width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


class TorchBlock(torch.nn.Module):
    def __init__(self, sizes: GPT) -> None:
        super().__init__()
        width = sizes.width
        self.heads = sizes.heads
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        attention = {"c_attn": torch.nn.Linear(width, 3 * width), "c_proj": torch.nn.Linear(width, width)}
        mlp = {"c_fc": torch.nn.Linear(width, 4 * width), "c_proj": torch.nn.Linear(4 * width, width)}
        self.attn, self.mlp = torch.nn.ModuleDict(attention), torch.nn.ModuleDict(mlp)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["c_attn"](self.ln_1(x)).chunk(3, -1)
        q, k, v = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](y.transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


def fill(net: torch.nn.Module, stored: dict[str, np.ndarray]) -> None:
    """GPT-2's linear weights are (in, out), those of `torch.nn.Linear` (out, in)."""
    values = {}
    for name, value in stored.items():
        inward = ".c_" in name and value.ndim == 2
        values[name] = torch.from_numpy(value.T.copy() if inward else value)
    missing, unexpected = net.load_state_dict(values, strict=False)
    if unexpected or any("num_batches_tracked" not in name for name in missing):
        raise RuntimeError(f"weights do not fit: missing {missing}, unexpected {unexpected}")


def main() -> None:
    warnings.simplefilter("ignore")
    name, model, size, device, bf16, weights = sys.argv[1:]
    if name == "weights":
        write_weights(model, weights)
        return
    make = ours if name.startswith("ours") else module
    serve(make(model, int(size), device, bf16 == "bf16", weights, "compiled" in name), torch.__version__)


if __name__ == "__main__":
    main()
