"""The arithmetic and memory of the three ways to a neural tangent kernel, in closed form from the sizes of the taps."""

from __future__ import annotations

from typing import NamedTuple

from fnn.ops._taps import Plan

METHODS = ("structured", "products", "contraction")


class Part(NamedTuple):
    """How the structured method sums over one leaf: by the Gram matrices of its factors, or by its whole gradients."""

    leaf: int
    gram: bool
    bias: int | None = None
    """The leaf whose share is counted in: the bias of just these calls."""
    seeds: bool = False
    """Whether the deltas are the seeds themselves, as those of the last layer are."""


class Cost(NamedTuple):
    """flops: multiplications and additions, of products only. memory: bytes beside the result."""

    flops: float
    memory: float


class Costs(dict[str, Cost]):
    """`{method: Cost}`; it prints as a table."""

    def cheapest(self) -> str:
        """The method with the least arithmetic."""
        best = METHODS[0]
        for name in METHODS:
            best = name if self[name].flops < self[best].flops else best
        return best

    def __str__(self) -> str:
        rows = [f"{'method':<12} {'GFLOP':>10} {'MB':>10}"]
        rows += [f"{name:<12} {cost.flops / 1e9:>10.3f} {cost.memory / 1e6:>10.1f}" for name, cost in self.items()]
        return "\n".join(rows)


def parts(plan: Plan, outputs: int) -> list[Part]:
    """How each leaf is summed over."""
    found, counted = [], []
    for leaf in plan.structured:
        taps = [tap for tap in plan.taps if tap.leaf == leaf]
        tap = taps[0]
        same = all([(t.kind, t.groups, t.options[0]) == (tap.kind, tap.groups, tap.options[0]) for t in taps])
        same = same or (tap.kind == "conv" and all([t.groups == tap.groups for t in taps]))
        positions, n, k = _sizes(plan, leaf)
        one = outputs * outputs * positions * positions * n + positions * positions * k * (tap.kind != "embedding")
        if not same or one >= outputs * outputs * tap.groups * n * k:
            found.append(Part(leaf, False))
            continue
        bias = tap.bias if tap.bias in plan.biases and all([t.bias == tap.bias for t in taps]) else None
        if any([other.bias == bias and other.leaf != leaf for other in plan.taps]):
            bias = None
        last = plan.last is not None and plan.taps[plan.last] is tap and len(taps) == 1
        found.append(Part(leaf, True, bias, last and positions == 1 and tap.groups == 1))
        if bias is not None:
            counted.append(bias)
    return found + [Part(leaf, False) for leaf in plan.biases if leaf not in counted]


def costs(plan: Plan, outputs: int, first: int, second: int, trace: bool, diagonal: bool, itemsize: int) -> Costs:
    """Of all three methods, for batches of `first` and `second` examples."""
    examples, pairs = (first + second, first if diagonal else first * second)
    size = 0
    for shape in plan.shapes:
        size += shape.numel()
    # A leaf without taps takes part in something: its elements are counted once.
    forward = 2 * sum([_multiply_adds(plan, i) for i in range(len(plan.taps))])
    forward += 2 * sum([plan.shapes[leaf].numel() for leaf in plan.free])
    square = outputs if trace else outputs * outputs
    jacobians = examples * (1 + 2 * outputs) * forward
    contraction = Cost(jacobians + 2.0 * square * size * pairs, itemsize * examples * outputs * size)
    # A tangent of one example of x2 meets all examples of x1, or with diagonal its own.
    tangents = pairs * outputs * 2 * forward
    products = Cost(
        second * ((1 + 2 * outputs) * forward + outputs * size) + first * forward + tangents,
        itemsize * second * outputs * size,
    )
    flops, elements = examples * (1 + outputs) * forward, 0
    for part in parts(plan, outputs):
        if part.gram:
            positions, n, k = _sizes(plan, part.leaf)
            tap = next(tap for tap in plan.taps if tap.leaf == part.leaf)
            met = 0 if tap.kind == "embedding" else k
            given = 0 if part.seeds else square * n
            flops += 2 * pairs * tap.groups * positions * positions * (given + met)
            elements += examples * tap.groups * positions * (k + (0 if part.seeds else outputs * n))
            elements += pairs * tap.groups * positions * positions * (1 + (0 if part.seeds else square))
        else:
            whole = plan.shapes[part.leaf].numel()
            flops += 2 * pairs * square * whole
            elements += examples * outputs * whole
            if part.leaf in plan.structured:
                own = [_multiply_adds(plan, i) for i, tap in enumerate(plan.taps) if tap.leaf == part.leaf]
                flops += 2 * examples * outputs * sum(own)
    for leaf in plan.free:
        flops += 2 * pairs * square * plan.shapes[leaf].numel()
        elements += examples * outputs * plan.shapes[leaf].numel()
    return Costs(structured=Cost(flops, itemsize * elements), products=products, contraction=contraction)


def _sizes(plan: Plan, leaf: int) -> tuple[int, int, int]:
    """T, n and k of a leaf's factors: positions, width of the deltas and of what they multiply, for one group."""
    taps = [tap for tap in plan.taps if tap.leaf == leaf]
    tap = taps[0]
    positions = sum([t.positions for t in taps])
    if tap.kind == "embedding" or tap.options[0] == "io":
        return positions, tap.weight[1], tap.weight[0]
    return positions, tap.weight[0] // tap.groups, plan.shapes[leaf].numel() // max(1, tap.weight[0])


def _multiply_adds(plan: Plan, index: int) -> int:
    """Of one tapped call, for one example; a lookup only adds, in its derivatives."""
    tap = plan.taps[index]
    if tap.kind == "embedding":
        return tap.positions * tap.weight[1]
    return tap.positions * plan.shapes[tap.leaf].numel()
