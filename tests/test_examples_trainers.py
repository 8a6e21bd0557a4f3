"""The example trainers beside train_image.py, each at its smallest size, and what they compute against closed forms."""

import csv
import importlib
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import tyro

import fnn
from fnn import data, interop, models, optim, random, train, tree

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINERS = ("dp_sgd", "ensemble", "maml", "train_gpt")
SMALLEST = {
    "dp_sgd": {"epochs": 2},
    "ensemble": {"members": 2, "epochs": 2, "batch_size": 256},
    "maml": {"steps": 3, "meta_batch": 2},
    "train_gpt": {"steps": 4, "layers": 1, "heads": 2, "width": 8, "context": 16, "sample_length": 20},
}


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """By name, which is how the compiler looks modules up."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat, and the rat sat on the cat.\n" * 40)
    return path


def config(name, out, text_file=None, **options):
    options = {"compile": False, **SMALLEST[name], **options}
    if name == "train_gpt":
        options["text"] = text_file
    return importlib.import_module(name).Config(out=out, **options)


def run(name, *arguments, **options):
    return importlib.import_module(name).run(config(name, *arguments, **options))


# ---- each of them, as a user meets it


@pytest.mark.parametrize("name", TRAINERS)
def test_it_writes_what_it_says_and_reports_what_it_writes(name, tmp_path, text_file, capsys):
    out = tmp_path / "out"
    result = run(name, out, text_file)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"wrote everything to {out}" in printed
    written = json.loads((out / "config.json").read_text())
    assert written["status"] == "finished"
    assert written["test"] == result
    with (out / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) >= 2
    weights = interop.load_safetensors(out / "model.safetensors")
    assert ("h.0.attn.c_attn.weight" if name == "train_gpt" else "params") in weights  # GPT-2's own name
    assert list((out / "checkpoints").glob("step_*.safetensors"))
    pictures = {"dp_sgd": ["privacy.png"], "ensemble": ["entropy.png"], "maml": ["sinusoids.png"]}.get(name, [])
    for picture in ["curves.png", *pictures]:
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dp_sgd", {"noise": 0.0}, "--noise must be positive"),
        ("dp_sgd", {"delta": 0.01}, "--delta below one over"),
        ("ensemble", {"members": 1}, "--members must be at least 2"),
        ("maml", {"shots": 0}, "--shots must be at least 1"),
        ("train_gpt", {"prompt": ""}, "--prompt shorter than that and not empty"),
        ("train_gpt", {"prompt": "Z"}, "'Z' at position 0"),
    ],
)
def test_bad_options_are_named(name, options, message, tmp_path, text_file):
    with pytest.raises(ValueError, match=message):
        run(name, tmp_path / "out", text_file, **options)


@pytest.mark.parametrize("name", TRAINERS)
def test_all_have_the_same_options_and_say_what_they_do(name):
    written = tyro.extras.get_parser(importlib.import_module(name).Config).format_help()
    for option in ("--out", "--resume", "--overwrite", "--seed", "--device", "--strict", "--tensorboard", "--profile"):
        assert option in written


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_an_error_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--device", "tpu9", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"{name}: device: 'tpu9'"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


class Stop(train.Callback):
    """Ctrl-C after a number of steps."""

    after = 0

    def step(self, run):
        if run.step == self.after:
            run.signal = "interrupted"


def stopping(monkeypatch, after):
    monkeypatch.setattr(Stop, "after", after)
    original = train.Progress
    monkeypatch.setattr(train, "Progress", Stop)
    return lambda: monkeypatch.setattr(train, "Progress", original)


@pytest.mark.parametrize(
    "name", ["ensemble", *(pytest.param(x, marks=pytest.mark.slow) for x in ("dp_sgd", "train_gpt"))]
)
def test_a_run_that_was_broken_off_goes_on_bit_for_bit(name, tmp_path, text_file, monkeypatch, capsys):
    run(name, tmp_path / "whole", text_file)
    undo = stopping(monkeypatch, after=3)
    run(name, tmp_path / "parts", text_file)
    assert "the same command with --resume goes on" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["status"] == "interrupted"
    undo()
    with pytest.raises(FileExistsError, match="unfinished run"):
        run(name, tmp_path / "parts", text_file)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        run(name, tmp_path / "parts", text_file, resume=True, seed=1)
    run(name, tmp_path / "parts", text_file, resume=True)
    whole, parts = (interop.load_safetensors(tmp_path / out / "model.safetensors") for out in ("whole", "parts"))
    assert tree.allclose(whole, parts, rtol=0, atol=0)


# ---- train_gpt: what it is compared with, and how it writes


def test_five_gram_model_by_hand():
    """ "abab" as a bigram model: every number below is worked out on paper."""
    five_gram = importlib.import_module("train_gpt").five_gram
    tokens = torch.tensor([0, 1, 0, 1])
    # Bigrams: ab twice, ba once. Counts of 1 to 4: 1, 1, 0, 0 (a zero counts as 1 here): share 1 / (1 + 2) and
    # discounts 1 - 2/3 = 1/3 for 1, 2 - 3/3 = 1 for 2.
    # Unigrams, by what comes before them: a after b, b after a: counts 1 and 1; ones = 2, 1: share 1/2, discount 1/2.
    lower = (1 - 0.5) / 2 + (0.5 + 0.5) / 2 * (1 / 2)
    assert lower == 0.5
    after_a = {0: 0 + 1.0 / 2 * lower, 1: (2 - 1.0) / 2 + 1.0 / 2 * lower}
    after_b = {0: (1 - 1 / 3) / 1 + 1 / 3 * lower, 1: 1 / 3 * lower}
    found = five_gram(tokens, torch.tensor([0, 0, 1, 1]), 2, order=2)  # after b, a, a, b
    torch.testing.assert_close(found, torch.tensor([after_b[0], after_a[0], after_a[1], after_b[1]], dtype=found.dtype))


def test_five_gram_probabilities_sum_to_one():
    five_gram = importlib.import_module("train_gpt").five_gram
    tokens = random.randint(random.key(0), (300,), 0, 4).long()
    tokens[tokens == 3] = tokens.roll(1)[tokens == 3] // 2  # some structure, and no 3
    for context in ([0, 1, 2, 0], [2, 2, 2, 2], [3, 3, 3, 3], [1, 3, 0, 0]):
        start = torch.tensor(context)
        p = torch.stack([five_gram(tokens, torch.cat([start, torch.tensor([last])]), 5)[-1] for last in range(5)])
        assert (p > 0).all()
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)


def test_every_held_out_character_is_predicted_once():
    """From half a window of characters before it at least: the first from the end of the training text."""
    text = data.TextDataset("", torch.arange(20), torch.arange(20, 37), None)
    windows, held_out = importlib.import_module("train_gpt").held_out_windows(text, 8)
    x, y = windows.gather(torch.arange(len(windows)))
    assert y[:, 4:].flatten().tolist() == held_out.tolist() == list(range(20, 36))
    assert x[0].tolist() == list(range(15, 23))


def test_sampling_is_pure_and_follows_the_logits():
    module = importlib.import_module("train_gpt")
    net = models.gpt(11, 8, layers=1, heads=2, width=8)
    prompt = torch.tensor([1, 2, 3])
    params, _ = net.init(random.key(0), prompt)
    options = config("train_gpt", Path(), context=8, sample_length=12, top_k=1)
    written = module.sample(net, params, prompt, random.key(1), options)
    assert torch.equal(written, module.sample(net, params, prompt, random.key(2), options))  # the most likely, always
    for t in range(3, 15):  # by the network itself on the last characters, without padding
        assert written[t] == net(params, written[max(0, t - 8) : t])[-1].argmax()
    warm = config("train_gpt", Path(), context=8, sample_length=12, top_k=0, temperature=5.0)
    one, same, other = (module.sample(net, params, prompt, random.key(seed), warm) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# ---- maml: the gradient through a gradient


@pytest.mark.parametrize("steps", [1, 2])
def test_the_meta_gradient_is_that_of_finite_differences(steps):
    module = importlib.import_module("maml")
    key = random.key(3)
    params = tree.map(torch.Tensor.double, module.NET.init(key, torch.zeros(1, 1))[0])
    points = [leaf.double() for leaf in module.draw(key, 2.0, 1.0, 10)]
    seen, others = [leaf[:5] for leaf in points], [leaf[5:] for leaf in points]

    def loss(params, **options):
        return module.meta_loss(params, seen, others, steps=steps, lr=0.05, **options)

    grads = fnn.grad(loss)(params)
    first = fnn.grad(lambda params: loss(params, first_order=True))(params)
    direction = tree.map(lambda leaf: random.normal(key, leaf.shape, leaf.dtype), params)
    ends = [loss(tree.map(lambda p, d, h=h: p + h * d, params, direction)) for h in (1e-6, -1e-6)]
    found, cheap = (
        sum((g * d).sum() for g, d in zip(*map(tree.leaves, (x, direction)), strict=True)) for x in (grads, first)
    )
    expected = float(ends[0] - ends[1]) / 2e-6
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert float(cheap) != pytest.approx(expected, rel=1e-3)


def test_adaptation_is_torch_s_sgd():
    module = importlib.import_module("maml")
    params, _ = module.NET.init(random.key(0), torch.zeros(1, 1))
    x, y = module.draw(random.key(1), 3.0, 0.5, 10)
    leaves = [leaf.clone().requires_grad_() for leaf in tree.leaves(params)]
    optimizer = torch.optim.SGD(leaves, 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        hidden = x
        for weight, bias in zip(leaves[::2], leaves[1::2], strict=True):
            hidden = F.linear(hidden, weight, bias).relu() if len(weight) > 1 else F.linear(hidden, weight, bias)
        F.mse_loss(hidden, y).backward()
        optimizer.step()
    torch.testing.assert_close(tree.leaves(module.adapt(params, x, y, steps=3, lr=0.01)), leaves)


# ---- ensemble


def test_a_member_is_the_network_trained_alone(tmp_path):
    """Member 1 of seed 0 is the network of seed 1, trained by the step that is not vmapped."""
    run("ensemble", tmp_path, members=3, epochs=2, batch_size=256)
    member = tree.map(lambda leaf: leaf[1], interop.load_safetensors(tmp_path / "model.safetensors")["params"])
    images = data.digits()
    net = models.mlp((64, 64))
    init_key, order_key, step_key = random.split(random.key(1), 3).unbind()
    optimizer = optim.adam(optim.warmup_cosine(0.0, 3e-3, 1, 10))

    def loss_fn(params, state, batch, key):
        return F.cross_entropy(net(params, batch[0]), batch[1]), (state, {})

    params, _ = net.init(init_key, images.test[0][:1])
    alone, _ = train.fit(
        train.make_step(loss_fn, optimizer, compile=False),
        train.TrainState.create(params, optimizer, step_key),
        data.Loader(images.train, 256, key=order_key),
        epochs=2,
    )
    torch.testing.assert_close(tree.paths(alone.params), tree.paths(member), rtol=1e-4, atol=1e-5)


def test_scores_by_hand():
    scores = importlib.import_module("ensemble").scores
    p = torch.tensor([[0.9, 0.1], [0.85, 0.15], [0.25, 0.75], [0.45, 0.55]])
    found = scores(p, torch.tensor([0, 1, 1, 1]), bins=5)
    assert found["accuracy"] == 0.75
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.15) + math.log(0.75) + math.log(0.55)) / 4)
    # (0.8, 1]: confidence 0.9 + 0.85, one of two right; (0.6, 0.8]: 0.75, right; (0.4, 0.6]: 0.55, right
    assert found["calibration error"] == pytest.approx((abs(1.75 - 1) + abs(0.75 - 1) + abs(0.55 - 1)) / 4, abs=1e-6)


# ---- dp_sgd


# Recorded with Opacus 1.6.0: a = RDPAccountant(); a.history = [(noise, rate, steps)];
# a.get_epsilon(delta, alphas=list(range(2, 129)))
OPACUS = [
    (1, 0.01, 1.0, 1e-5, 0.9562810556789203),
    (1000, 0.01, 1.1, 1e-5, 1.725290818044953),
    (440, 128 / 1438, 2.0, 1e-5, 4.9269980825875495),
    (10000, 0.004, 0.8, 1e-6, 4.542017543990828),
    (100, 0.5, 4.0, 1e-5, 6.391292656339921),
    (30, 0.9, 9.0, 1e-5, 2.408571591414314),
]


@pytest.mark.parametrize(("steps", "rate", "noise", "delta", "expected"), OPACUS)
def test_epsilon_is_that_of_opacus(steps, rate, noise, delta, expected):
    assert importlib.import_module("dp_sgd").epsilon(steps, rate, noise, delta) == pytest.approx(expected, rel=1e-9)


def test_poisson_batches_hold_each_example_with_its_probability():
    module = importlib.import_module("dp_sgd")
    examples = (torch.arange(200), torch.arange(200))
    loader = module.PoissonLoader(examples, 20, key=random.key(0))
    sizes, seen = [], torch.zeros(200)
    for epoch in range(60):
        for x, _, drawn in loader.epoch(epoch):
            assert len(x) == loader.capacity
            chosen = x[drawn == 1]
            assert len(chosen.unique()) == len(chosen)
            sizes.append(float(len(chosen)))
            seen[chosen] += 1
    sizes = torch.tensor(sizes)
    batches = len(sizes)
    assert float(sizes.mean()) == pytest.approx(20, abs=4 * math.sqrt(18 / batches))
    assert float(sizes.var()) == pytest.approx(18, rel=4 * math.sqrt(2 / batches))
    assert float(seen.min()) > 0.1 * batches - 5 * math.sqrt(0.09 * batches)
    later = next(loader.epoch(3, start=5))
    assert all(torch.equal(a, b) for a, b in zip(later, list(loader.epoch(3))[5], strict=True))


def test_a_private_step_is_clipped_and_noised_by_hand():
    """Against gradients of one example at a time, by torch's own autograd; the noise by its deviation."""
    module = importlib.import_module("dp_sgd")
    x, y = random.normal(random.key(0), (6, 4)), torch.tensor([0, 1, 2, 0, 1, 2])
    drawn = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    params = {"w": random.normal(random.key(1), (3, 4))}

    def loss(params, x, y):
        logits = params["w"] @ x
        return F.cross_entropy(logits, y), (logits.argmax() == y).float()

    total = torch.zeros(3, 4)
    for i in (0, 1, 3, 4):
        w = params["w"].clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(w @ x[i], y[i]), w)
        total += g * min(1.0, 0.5 / float(g.norm()))
    optimizer = optim.sgd(1.0)
    state = train.TrainState.create(params, optimizer, random.key(2))
    for noise in (1e-9, 3.0):
        options = config("dp_sgd", Path(), batch_size=5, max_norm=0.5, noise=noise)
        after, metrics = module.private_step(loss, optimizer, options)(state, (x, y, drawn))
        moved = (params["w"] - after.params["w"]) * 5
        if noise < 1:
            torch.testing.assert_close(moved, total, rtol=1e-4, atol=1e-5)
            accuracy = ((x @ params["w"].T).argmax(1) == y).float()
            assert float(metrics["accuracy"]) == pytest.approx(float((accuracy * drawn).sum()) / 4)
        else:
            assert 0.5 < float((moved - total).std()) / (3.0 * 0.5) < 1.6
    assert int(after.step) == 1


def test_the_private_step_compiles(tmp_path, fast_compile):
    """With the whole graph in one: clipping, noise and the step."""
    result = run("dp_sgd", tmp_path, epochs=1, compile=True, strict=True)
    eager = run("dp_sgd", tmp_path / "eager", epochs=1)
    assert result["loss"] == pytest.approx(eager["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ensemble", "maml", "train_gpt"])
def test_the_others_compile(name, tmp_path, text_file, fast_compile):
    compiled = run(name, tmp_path / "compiled", text_file, compile=True, strict=True)
    eager = run(name, tmp_path / "eager", text_file)
    for key, value in compiled.items():
        assert value == pytest.approx(eager[key], rel=1e-3, abs=1e-5)
