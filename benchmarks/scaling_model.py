"""What a training step of a GPT costs on many GPUs, by formula: `python benchmarks/scaling_model.py`.

Small pure functions: parameters, FLOPs, bytes of memory, bytes sent, seconds. Nothing here is measured; what can be
checked without a cluster is: FLOPs against torch's counter, parameters and state against the tensors, and bytes sent
against what `benchmarks/distributed.py` counted (tests/test_scaling_model.py). Run as a program it writes the tables of
docs/scaling.md.

Sizes are in bytes, times in seconds, rates in bytes or FLOP a second; GB is 1e9 bytes.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
GB = 1e9
FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class Gpu:
    """A GPU and its links: one-way peaks, and how much of them is reached."""

    name: str
    memory: float
    """bytes"""
    peak: float = 989e12
    """FLOP/s of dense bfloat16 products"""
    utilisation: float = 0.4
    node: int = 8
    """GPUs that NVLink joins"""
    node_link: float = 450e9
    """bytes/s of a GPU to the others of its node"""
    network_link: float = 50e9
    """bytes/s of a GPU to other nodes"""
    link_utilisation: float = 0.8
    node_latency: float = 1e-6
    """seconds of a message within the node"""
    network_latency: float = 5e-6
    """seconds of a message to another node"""


H100 = Gpu("H100 SXM", 80 * GB)
H200 = Gpu("H200 SXM", 141 * GB)


@dataclass(frozen=True)
class Gpt:
    """The shape of `fnn.models.gpt`."""

    name: str
    layers: int
    width: int
    heads: int
    vocab_size: int = 50257
    context: int = 2048


SIZES = (
    Gpt("124M", 12, 768, 12),
    Gpt("350M", 24, 1024, 16),
    Gpt("1.3B", 24, 2048, 16),
    Gpt("6.7B", 32, 4096, 32),
    Gpt("13B", 40, 5120, 40),
    Gpt("30B", 48, 7168, 56),
    Gpt("70B", 68, 9216, 72),
)
"""GPT-3's and OPT's shapes; the last is OPT-66B's with four layers more."""


def block_parameters(gpt: Gpt) -> int:
    """Numbers in one transformer block: 12 width^2 + 13 width."""
    return 12 * gpt.width**2 + 13 * gpt.width


def rest_parameters(gpt: Gpt) -> int:
    """Numbers outside of the blocks: both embeddings and the last norm; the head is the token embedding."""
    return (gpt.vocab_size + gpt.context + 2) * gpt.width


def parameters(gpt: Gpt) -> int:
    """Numbers in the model."""
    return gpt.layers * block_parameters(gpt) + rest_parameters(gpt)


def block_flops(gpt: Gpt) -> int:
    """FLOPs of one block for one token, forward: 24 width^2 for the weights, 4 context width for attention.

    Scores above the diagonal are computed too, as `nn.dot_product_attention` does.
    """
    return 24 * gpt.width**2 + 4 * gpt.context * gpt.width


def step_flops(gpt: Gpt, tokens: int, remat: bool = False, tensor: int = 1) -> int:
    """FLOPs of a step on a GPU that has `tokens` of the batch: forward, twice that backward, with `remat` blocks again.

    For a large model without `remat` this is 6 x parameters x tokens and a little for attention. With tensor
    parallelism the head is not parted (`distributed.tensor_parallel`): each GPU computes it for the whole group.
    """
    blocks = gpt.layers * block_flops(gpt)
    head = 2 * gpt.vocab_size * gpt.width
    return tokens * (3 * (blocks + tensor * head) + (blocks if remat else 0))


class Collective(NamedTuple):
    """An operation of `ranks` processes, `times` a step.

    kind: "all_reduce", "all_gather" or "reduce_scatter". size: bytes of the whole tensor, that is what every rank has
    before or after. stride: how far apart the ranks are numbered; 1 are neighbours, 8 is one GPU in each node.
    """

    kind: str
    size: float
    ranks: int
    stride: int = 1
    times: int = 1


def sent(c: Collective) -> float:
    """Bytes that each rank sends in a step: 2 (N-1)/N of the tensor for an all-reduce, (N-1)/N for the others."""
    rounds = 2 if c.kind == "all_reduce" else 1
    return c.times * rounds * (c.ranks - 1) / c.ranks * c.size


def bandwidth(gpu: Gpu, ranks: int, stride: int = 1) -> float:
    """bytes/s that each rank of a group gets.

    A ring passes through every node once in and once out, so a group shares the links of as many network cards as it
    has GPUs in a node: all GPUs of all nodes together get 8 x 50 GB/s, one GPU of each node gets 50 GB/s.
    """
    if ranks * stride <= gpu.node:
        return gpu.node_link * gpu.link_utilisation
    in_node = max(1, gpu.node // stride)
    return min(gpu.node_link, in_node * gpu.network_link) * gpu.link_utilisation


def latency(gpu: Gpu, c: Collective) -> float:
    """Seconds that the messages of one operation wait for each other: a ring's, or for an all-reduce a tree's."""
    nodes = max(1, c.ranks * c.stride // gpu.node)
    in_node = c.ranks // nodes
    if c.kind == "all_reduce":
        return 2 * (math.log2(in_node) * gpu.node_latency + math.log2(nodes) * gpu.network_latency)
    return (c.ranks - nodes) * gpu.node_latency + (nodes - 1) * gpu.network_latency


def seconds(gpu: Gpu, c: Collective) -> float:
    """Seconds of all the calls in a step."""
    return sent(c) / bandwidth(gpu, c.ranks, c.stride) + c.times * latency(gpu, c)


@dataclass(frozen=True)
class Placement:
    """Where a step runs: GPUs = data x shard x tensor, neighbours numbered along tensor, then shard, then data.

    tensor: over how many GPUs each layer is parted. shard: over how many parameters, gradients and optimizer state are
    (fsdp). data: how many replicas there are of that. remat: the blocks are computed again in backward.
    """

    name: str
    data: int = 1
    shard: int = 1
    tensor: int = 1
    remat: bool = False

    @property
    def gpus(self) -> int:
        return self.data * self.shard * self.tensor


def placements(gpus: int, gpu: Gpu = H100) -> list[Placement]:
    """What there is to choose from, tensor parallelism and the inner part of the hybrid within a node."""
    node = min(gpu.node, gpus)
    plain = Placement("data parallel", data=gpus)
    tensor = Placement("tensor x data", data=gpus // node, tensor=node)
    return [
        plain,
        Placement(plain.name, data=gpus, remat=True),
        Placement("fsdp", shard=gpus, remat=True),
        Placement("hybrid", data=gpus // node, shard=node, remat=True),
        tensor,
        Placement(tensor.name, data=gpus // node, tensor=node, remat=True),
        Placement("tensor x fsdp", shard=gpus // node, tensor=node, remat=True),
    ]


def collectives(gpt: Gpt, placement: Placement, tokens: int, message: int = BFLOAT16) -> list[Collective]:
    """What a step sends; `tokens` is a GPU's share of the batch, so that a tensor group has `tensor` times as many.

    message: bytes of a number that layers exchange, activations and parameters of fsdp: those of the dtype in which
    they compute (`nn.Cast`). Gradients of whole parameters are float32, as the parameters are.
    """
    p, t, s = placement, placement.tensor, placement.shard
    found = []
    if t > 1:
        # Megatron: behind attention and behind the MLP, forward, backward, and forward again where it is recomputed.
        size = message * t * tokens * gpt.width
        found.append(Collective("all_reduce", size, t, times=gpt.layers * (6 if p.remat else 4)))
    if s > 1:
        block, rest = message * block_parameters(gpt) / t, message * rest_parameters(gpt)
        found.append(Collective("all_gather", block, s, t, 2 * gpt.layers))  # forward, and again in backward
        found.append(Collective("reduce_scatter", block, s, t, gpt.layers))
        found += [Collective(kind, rest, s, t) for kind in ("all_gather", "reduce_scatter")]
    if p.data > 1:
        found.append(Collective("all_reduce", FLOAT32 * own_parameters(gpt, p), p.data, t * s))
    return found


def own_parameters(gpt: Gpt, placement: Placement) -> float:
    """Numbers that a GPU keeps: tensor parallelism parts the blocks, fsdp everything."""
    return (gpt.layers * block_parameters(gpt) / placement.tensor + rest_parameters(gpt)) / placement.shard


def state_bytes(numbers: float, moments: int = 2) -> float:
    """Parameters and optimizer state in float32; Adam keeps two moments."""
    return FLOAT32 * (1 + moments) * numbers


def memory(gpt: Gpt, placement: Placement, tokens: int) -> dict[str, float]:
    """bytes on each GPU at the height of a step, by what they are for, computing in bfloat16 (`nn.Cast`)."""
    p, t = placement, placement.tensor
    own = own_parameters(gpt, p)
    kept = {"state": state_bytes(own), "gradients": FLOAT32 * own}
    if p.shard > 1:
        # A block and the embeddings, which are in no unit: what was gathered, and its gradient before it is scattered.
        kept["gathered"] = 2 * BFLOAT16 * (block_parameters(gpt) / t + rest_parameters(gpt))
    else:
        kept["rounded weights"] = BFLOAT16 * own
        if p.data > 1:
            kept["flat buffer"] = FLOAT32 * own
    block, group = block_activations(gpt, t), t * tokens
    blocks = gpt.layers * BFLOAT16 * gpt.width + block if p.remat else gpt.layers * block
    kept["activations"] = group * blocks
    kept["logits"] = group * gpt.vocab_size * (2 * BFLOAT16 + FLOAT32)
    return kept


def block_activations(gpt: Gpt, tensor: int = 1) -> float:
    """bytes for one token that a block keeps for its backward pass, in bfloat16 and without dropout.

    Korthikanti et al.: width (10 + 24 / tensor) + 5 heads context / tensor, less 2 for the masks of dropout. Attention
    weights are kept twice, in float32 for softmax and in bfloat16 for the product, 6 bytes in place of their 5.
    """
    return gpt.width * (8 + 24 / tensor) + 6 * gpt.heads * gpt.context / tensor


class Cost(NamedTuple):
    """A step: bytes of memory on each GPU, seconds, and the tokens of all GPUs."""

    memory: float
    compute: float
    communication: float
    exposed: float
    """seconds of communication that no computation can hide: that inside the layers"""
    tokens: int

    @property
    def serial(self) -> float:
        """Seconds where one waits for the other."""
        return self.compute + self.communication

    @property
    def overlapped(self) -> float:
        """Seconds where what can be hidden is: the least that any order of the operations could take."""
        return max(self.compute + self.exposed, self.communication)


def cost(gpt: Gpt, placement: Placement, gpu: Gpu = H100, tokens: int = 8192) -> Cost:
    """A step over `tokens` for each GPU."""
    compute = step_flops(gpt, tokens, placement.remat, placement.tensor) / (gpu.peak * gpu.utilisation)
    found = collectives(gpt, placement, tokens)
    times = [seconds(gpu, c) for c in found]
    exposed = times[0] if placement.tensor > 1 else 0.0
    used = sum(memory(gpt, placement, tokens).values())
    return Cost(used, compute, sum(times), exposed, tokens * placement.gpus)


def fits(used: float, gpu: Gpu) -> bool:
    """Nine tenths of the memory, the rest is the allocator's, CUDA's and NCCL's."""
    return used <= 0.9 * gpu.memory


def best(gpt: Gpt, name: str, gpus: int, gpu: Gpu = H100, tokens: int = 8192) -> tuple[Placement, Cost]:
    """The faster of the placements of that name that fit, or the smallest where none does."""
    found = [(p, cost(gpt, p, gpu, tokens)) for p in placements(gpus, gpu) if p.name == name]
    fitting = [(p, c) for p, c in found if fits(c.memory, gpu)]
    return min(fitting, key=lambda f: f[1].serial) if fitting else min(found, key=lambda f: f[1].memory)


def even_tokens(gpt: Gpt, bytes_per_parameter: float, gpu: Gpu = H100, remat: bool = False) -> float:
    """Tokens for each GPU at which many nodes communicate for as long as they compute, latency left out.

    bytes_per_parameter: what a GPU sends, 8 for data parallel, 6 for fsdp computing in bfloat16. Both times are
    proportional to the parameters, so this depends on the model hardly at all.
    """
    sending = bytes_per_parameter * parameters(gpt) / bandwidth(gpu, 1024)
    return sending / (step_flops(gpt, 1, remat) / (gpu.peak * gpu.utilisation))


PAGE = ROOT / "docs" / "scaling.md"
COUNTS = (8, 64, 1024)
TOKENS = 8192


def tables(gpu: Gpu = H100, larger: Gpu = H200, tokens: int = TOKENS) -> dict[str, str]:
    """The tables of docs/scaling.md by name."""
    found = {f"{gpus} GPUs": choices(gpus, gpu, larger, tokens) for gpus in COUNTS}
    return {**found, "batches": batches(gpu), "even": even(gpu), "memory": memories(gpu, tokens), "counts": counts()}


def choices(gpus: int, gpu: Gpu, larger: Gpu, tokens: int) -> str:
    """For each model and placement the milliseconds and GB of a step; of the placement to choose, the rest."""
    names = list(dict.fromkeys(p.name for p in placements(gpus, gpu)))
    if gpus == gpu.node:
        names = [name for name in names if name not in ("hybrid", "tensor x fsdp")]  # no second node
    rows = []
    for gpt in SIZES:
        costs = {name: best(gpt, name, gpus, gpu, tokens)[1] for name in names}
        cells = [_cell(c, gpu, larger) for c in costs.values()]
        offered = {name: c for name, c in costs.items() if name != "hybrid"}  # which fnn does not have
        chosen = ["none fits", "", "", ""]
        for card in (larger, gpu):
            if fitting := [(c.serial, name) for name, c in offered.items() if fits(c.memory, card)]:
                name = min(fitting)[1]
                c = offered[name]
                share, bound = f"{c.communication / c.serial:.0%}", f"{_digits(c.overlapped * 1e3)} ms"
                chosen = [name, share, bound, _digits(c.tokens / gpus / c.serial)]
        rows.append([gpt.name, *cells, *chosen])
    header = ["", *names, "the fastest that fits", "communication", "if overlapped", "tokens/s each"]
    return _table(header, rows)


def _cell(c: Cost, gpu: Gpu, larger: Gpu) -> str:
    if not fits(c.memory, larger):
        return f"{_digits(c.memory / GB)} GB: no"
    card = "" if fits(c.memory, gpu) else f", {larger.name.split()[0]}"
    return f"{_digits(c.serial * 1e3)} ms, {_digits(c.memory / GB)} GB{card}"


def batches(gpu: Gpu, gpus: int = 1024, size: int = 4) -> str:
    """One model on many GPUs with batches that grow smaller, by placement."""
    gpt, rows = SIZES[size], []
    for millions in (8, 4, 2, 1):
        whole = millions * 2**20
        row = [f"{gpt.name}, {millions} M tokens"]
        for name in ("fsdp", "tensor x fsdp"):
            p, c = best(gpt, name, gpus, gpu, whole // gpus)
            if whole // gpt.context < gpus // p.tensor:
                row += ["fewer sequences than replicas", ""]
            else:
                row += [f"{_digits(c.serial * 1e3)} ms", f"{c.communication / c.serial:.0%}"]
        rows.append(row)
    return _table([f"{gpus:,} GPUs", "fsdp", "communication", "tensor x fsdp", "communication"], rows)


def even(gpu: Gpu) -> str:
    """The tokens for each GPU from which on computing takes longer than communicating."""
    ways = (("data parallel", 2 * FLOAT32, False), ("fsdp", 3 * BFLOAT16, True))
    rows = [[name, *(_digits(even_tokens(gpt, size, gpu, remat)) for gpt in SIZES)] for name, size, remat in ways]
    return _table(["", *(gpt.name for gpt in SIZES)], rows)


def memories(gpu: Gpu, tokens: int, size: int = 3) -> str:
    """What fills a GPU of 64, for one model and every placement."""
    gpt, rows = SIZES[size], []
    for p in placements(64, gpu):
        parts = memory(gpt, p, tokens)
        buffers = sum(parts.get(name, 0.0) for name in ("gathered", "flat buffer", "rounded weights"))
        row = [parts["state"], parts["gradients"], buffers, parts["activations"], parts["logits"], sum(parts.values())]
        rows.append([p.name, "yes" if p.remat else "", *(_digits(value / GB) for value in row)])
    header = [f"{gpt.name}, 64 GPUs, GB", "recomputed", "state", "gradients", "gathered, flat, rounded", "activations"]
    return _table([*header, "logits", "all"], rows)


def counts() -> str:
    """What benchmarks/distributed.py counted beside the formulas, in MiB."""
    path = ROOT / "benchmarks" / "results" / "distributed.json"
    rows = []
    for count, models in json.loads(path.read_text())["results"].items() if path.exists() else ():
        for model, cases in models.items():
            for placement, row in cases.items():
                by_formula = row["formula_bytes"]
                sizes = [row["sent_bytes"], by_formula, row["loopback_bytes"], row["state_bytes"], row["peak_bytes"]]
                shown = ["" if value is None else _digits(value / 2**20) for value in sizes]
                rows.append([f"{count} x {model}, {placement}", *shown])
    return _table(["MiB for each rank", "sent", "by formula", "loopback", "state", "peak"], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def _digits(value: float) -> str:
    """Three digits, without an exponent."""
    value = float(f"{value:.3g}")
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def written(text: str) -> str:
    """The page with every table between its markers as it is now."""
    for name, table in tables().items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in text:
            raise ValueError(f"docs/scaling.md: no marker {begin}")
        text = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL)  # noqa: B023
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
