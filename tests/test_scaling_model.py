"""The cost model of docs/scaling.md, against parameters, FLOPs and bytes that were counted."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fnn import losses, models, ops, optim, random, train, tree

ROOT = Path(__file__).parents[1]


def load():
    spec = importlib.util.spec_from_file_location("scaling_model", ROOT / "benchmarks" / "scaling_model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_model"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


model = load()
SMALL = model.Gpt("small", layers=2, width=16, heads=2, vocab_size=11, context=8)
COUNTED = model.Gpt("that of benchmarks/distributed.py", layers=2, width=256, heads=4, vocab_size=256, context=64)


@pytest.fixture(scope="module")
def net():
    return models.gpt(SMALL.vocab_size, SMALL.context, SMALL.layers, SMALL.heads, SMALL.width)


@pytest.fixture(scope="module")
def tokens():
    return torch.arange(24).reshape(3, 8) % 11


@pytest.fixture(scope="module")
def params(net, tokens):
    return net.init(random.key(0), tokens)[0]


def test_parameters_are_those_of_the_network(params):
    assert model.parameters(SMALL) == sum(leaf.numel() for leaf in tree.leaves(params))
    assert model.block_parameters(SMALL) == sum(leaf.numel() for leaf in tree.leaves(params["h"]["0"]))


def test_gpt_3_has_its_published_size():
    assert model.parameters(model.Gpt("GPT-3", 96, 12288, 96)) == pytest.approx(174.6e9, rel=1e-3)  # Brown et al., 2020
    for gpt in model.SIZES:
        name, unit = float(gpt.name[:-1]), {"M": 1e6, "B": 1e9}[gpt.name[-1]]
        assert model.parameters(gpt) == pytest.approx(name * unit, rel=0.02)


@pytest.mark.parametrize("remat", [False, True])
def test_flops_are_those_that_torch_counts(net, params, tokens, remat):
    def loss(params):
        return losses.cross_entropy(net(params, tokens).flatten(0, 1), tokens.flatten())

    with ops.use("torch"), FlopCounterMode(display=False) as counter:
        torch.func.grad(loss)(params)
        if remat:  # what a second forward pass of the blocks adds
            embedded = params["wte"]["weight"][tokens]
            dict(net.children)["h"].apply(params["h"], {}, embedded)
    assert model.step_flops(SMALL, tokens.numel(), remat) == counter.get_total_flops()


def test_state_is_that_of_adam(params):
    optimizer = optim.adam(1e-3)
    state = train.TrainState.create(params, optimizer, random.key(0))
    held = sum(leaf.numel() * leaf.element_size() for leaf in tree.leaves((state.params, state.opt_state)))
    counters = held - model.state_bytes(model.parameters(SMALL))
    assert 0 < counters <= 32


def test_an_all_reduce_is_a_reduce_scatter_and_a_gather():
    parts = [model.sent(model.Collective(kind, 1000, 8)) for kind in ("reduce_scatter", "all_gather")]
    assert model.sent(model.Collective("all_reduce", 1000, 8)) == sum(parts) == 2 * 7 * 125
    assert model.sent(model.Collective("all_reduce", 1000, 1)) == 0


def test_bandwidth_is_that_of_the_links_a_group_shares():
    def reached(ranks, stride):
        return model.bandwidth(model.H100, ranks, stride) / model.H100.link_utilisation

    assert reached(8, 1) == 450e9
    assert reached(64, 1) == 8 * 50e9
    assert reached(8, 8) == 50e9
    assert reached(16, 4) == 2 * 50e9


def test_a_placement_uses_all_gpus_and_more_of_them_need_less_memory_each():
    for gpus in (8, 64, 1024):
        assert {placement.gpus for placement in model.placements(gpus)} == {gpus}
    sizes = [model.best(model.SIZES[4], "fsdp", gpus)[1].memory for gpus in (8, 64, 1024)]
    assert sizes == sorted(sizes, reverse=True)


def recorded():
    path = ROOT / "benchmarks" / "results" / "distributed.json"
    return json.loads(path.read_text())["results"]


def large(row):
    """The collectives of a record without those of single numbers: the loss where it is alone, and the checks."""
    return sorted((kind, size * times) for kind, size, times in row["collectives"] if size > 8)


@pytest.mark.parametrize("count", ["2", "4"])
def test_what_data_parallel_and_fsdp_send_is_what_was_counted(count):
    ranks, rows = int(count), recorded()[count]["gpt"]
    (reduced,) = model.collectives(COUNTED, model.Placement("data parallel", data=ranks), 0, model.FLOAT32)
    assert large(rows["data parallel"]) == [("all_reduce", reduced.size + 4)]  # the loss
    expected = model.collectives(COUNTED, model.Placement("fsdp", shard=ranks, remat=True), 0, model.FLOAT32)
    for kind in ("all_gather", "reduce_scatter"):
        counted = sum(size for name, size in large(rows["fsdp"]) if name == kind)
        assert counted == sum(c.size * c.times for c in expected if c.kind == kind)
    assert {name for name, _ in large(rows["fsdp"])} == {"all_gather", "reduce_scatter"}


@pytest.mark.parametrize("count", ["1", "2", "4"])
def test_the_record_agrees_with_its_formulas_and_with_the_loopback_device(count):
    for rows in recorded()[count].values():
        for placement in ("data parallel", "fsdp"):
            row = rows[placement]
            assert row["sent_bytes"] == pytest.approx(row["formula_bytes"], rel=1e-3)
            scattered = sum(size * times for kind, size, times in row["collectives"] if kind == "reduce_scatter")
            through_gloo = row["sent_bytes"] + scattered * (int(count) - 1) / int(count)
            if row["loopback_bytes"] is not None and int(count) > 1:
                assert row["loopback_bytes"] == pytest.approx(through_gloo, rel=0.05)


@pytest.mark.parametrize("count", ["1", "2", "4"])
def test_state_shrinks_as_the_model_says(count):
    for rows in recorded()[count].values():
        for row in rows.values():
            own = (row["parted_bytes"] / int(count) + row["whole_bytes"]) / model.FLOAT32
            assert 0 < row["state_bytes"] - model.state_bytes(own) <= 64  # the key and counters


def test_the_tables_are_what_the_model_gives():
    assert model.written(model.PAGE.read_text()) == model.PAGE.read_text()
    assert math.isclose(model.even_tokens(model.SIZES[-1], 8), 8 / 320e9 / (6 / (989e12 * 0.4)), rel_tol=0.05)
