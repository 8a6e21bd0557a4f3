"""Train a GPT on the characters of a text, and let it write.

    python examples/train_gpt.py                                # the reference that comes with Python
    python examples/train_gpt.py --text book.txt --out out/book
    python examples/train_gpt.py --layers 6 --width 384 --heads 6 --context 256 --dropout 0.2 --steps 5000

The end of the text is held out. There the network is measured beside a 5-gram model with modified Kneser-Ney
smoothing, on the same characters: a network that does not beat counting has learnt little. At last it writes, one
character at a time, from a window of fixed length, so that one compiled graph serves all of them.

Writes to --out: metrics.csv, curves.png, samples.txt, model.safetensors (the names of GPT-2), config.json, and
checkpoints, from which --resume goes on, bit for bit.

Source: Radford et al., Language models are unsupervised multitask learners, 2019; Karpathy's nanoGPT, for the task;
Chen, Goodman, An empirical study of smoothing techniques for language modeling, 1999, for the 5-gram model.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Literal

import torch
import tyro

import fnn
from fnn import data, distributed, interop, losses, models, nn, optim, random, train


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a character GPT with fnn."""

    text: Path | None = None
    """A text file in UTF-8; without one, the reference that comes with Python."""
    layers: int = 3
    heads: int = 4
    width: int = 128
    context: int = 64
    """Characters that the network sees."""
    dropout: float = 0.0
    steps: int = 1500
    batch_size: int = 16
    muon_lr: float = 0.02
    """Peak learning rate of Muon, for the matrices of the blocks: linear warm-up over the first tenth of the steps,
    then a cosine down to zero."""
    lr: float = 4e-3
    """The same of AdamW, for embeddings, biases and normalisations."""
    weight_decay: float = 0.1
    """Of the matrices."""
    clip: float = 1.0
    """Greatest norm of the gradients, taken over all parameters."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; its weights are float32."""
    temperature: float = 0.8
    """Of what is written at the end: the lower, the more likely its characters."""
    top_k: int = 20
    """It chooses among so many most likely characters; 0 among all."""
    sample_length: int = 500
    """Characters that it writes."""
    prompt: str = "\n"
    """What it goes on from."""
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, mps, ...; auto takes an accelerator where there is one."""
    compile: bool = True
    strict: bool = False
    """Make it an error if a second graph is compiled."""
    out: Path = Path("out/train_gpt")
    """Folder for what the run writes."""
    resume: bool = False
    """Go on with the run in --out, or start where there is none."""
    overwrite: bool = False
    """Let a new run take the place of an unfinished one in --out."""
    tensorboard: bool = False
    """Write the numbers to --out/tensorboard, too."""
    profile: bool = False
    """Record a few steps with torch's profiler in --out/profile."""


NO_MATTER = ("temperature", "top_k", "sample_length", "prompt")
NO_MATTER += ("device", "compile", "strict", "out", "resume", "overwrite", "tensorboard", "profile")
"""Options with which a run that goes on may differ."""


def run(config: Config) -> dict[str, float]:
    """Train and write; returns the losses on the held-out text, in nats a character."""
    device = train.device(config.device)
    mesh = distributed.init(device=device)
    text = data.text(config.text)
    prompt = text.encode(config.prompt)
    if not 0 < len(prompt) < config.context or config.context % 2 or not config.temperature > 0:
        raise ValueError(
            f"--context must be even, --prompt shorter than that and not empty, --temperature positive; got "
            f"{config.context}, {config.prompt!r} and {config.temperature}"
        )
    init_key, order_key, step_key, sample_key = random.split(random.key(config.seed, device), 4).unbind()
    net = models.gpt(
        text.vocabulary_size, config.context, config.layers, config.heads, config.width, config.dropout, stacked=True
    )
    example = torch.zeros(1, config.context, dtype=torch.int64, device=device)
    params, _ = net.init(init_key, example)
    fnn.summary(net, example).print()
    if config.precision == "bfloat16":
        net = nn.Cast(net, nn.Policy(compute=torch.bfloat16))

    windows, held_out = held_out_windows(text, config.context)
    place = {"device": device, "shard": mesh}
    batches = data.Loader(data.Windows(text.train, config.context), config.batch_size, key=order_key, **place)
    test = data.Loader(windows, 64 * mesh.size(), remainder="pad", **place)
    baseline = -five_gram(text.train, held_out, text.vocabulary_size).log().mean().item()
    print(f"\n{text}, device {device}\n5-gram model on {len(held_out):,} of the held-out: {in_bits(baseline)}")

    def loss_fn(params, state, batch, key):
        x, y = batch
        logits, state = net.apply(params, state, x, key=key, train=True)
        return losses.cross_entropy(logits.flatten(0, 1), y.flatten()), (state, {})

    def metric_fn(params, state, batch):
        x, y, _ = batch
        logits = net(params, x)[:, config.context // 2 :]
        return {"loss": losses.cross_entropy(logits.mT, y[:, config.context // 2 :], reduction="none")}

    def schedule(peak):
        return optim.warmup_cosine(0.0, peak, config.steps // 10, config.steps)

    by_kind = {
        "matrices": optim.muon(schedule(config.muon_lr), weight_decay=config.weight_decay, compute_dtype=None),
        "others": optim.adamw(schedule(config.lr), b2=0.99, weight_decay=0.0),
    }
    optimizer = optim.chain(optim.clip_by_global_norm(config.clip), optim.by_label(by_kind, kind))
    step = train.make_step(loss_fn, optimizer, mesh=mesh, compile=config.compile, strict=config.strict)
    eval_step = train.make_eval(metric_fn, mesh=mesh, compile=config.compile, strict=config.strict)
    numbers = {name: value for name, value in dataclasses.asdict(config).items() if name not in NO_MATTER}
    record = train.Record(config.out / "config.json", config, vocabulary=text.vocabulary)
    callbacks: list[train.Callback] = [record, train.Progress()]
    if config.tensorboard:
        callbacks.append(train.TensorBoard(config.out / "tensorboard", config=numbers))
    if config.profile:
        callbacks.append(train.Profile(config.out / "profile"))
    train_state, history = train.fit(
        step,
        train.TrainState.create(params, optimizer, step_key),
        batches,
        steps=config.steps,
        eval=lambda train_state: train.evaluate(eval_step, train_state, test),
        eval_every=max(1, config.steps // 5),
        callbacks=callbacks,
        checkpoints=train.Checkpointer(
            config.out / "checkpoints", monitor="eval_loss", config=numbers, overwrite=config.overwrite
        ),
        resume=config.resume,
    )
    result = {"loss": train.evaluate(eval_step, train_state, test)["loss"], "five_gram_loss": baseline}
    interop.save_safetensors(interop.to_state_dict(train_state.params), config.out / "model.safetensors")
    if history.rows:
        history.to_csv(config.out / "metrics.csv")
        history.plot(config.out / "curves.png")
    record.write(history.stopped or "finished", steps=int(train_state.step), test=result)
    if history.stopped:
        print(f"{history.stopped}; saved in {config.out / 'checkpoints'}: the same command with --resume goes on")
        return result

    if not distributed.is_main():
        return result
    written = sample(net, train_state.params, prompt.to(device), sample_key, config)
    (config.out / "samples.txt").write_text(text.decode(written))
    print(f"\n{'-' * 40}\n{text.decode(written)}\n{'-' * 40}")
    print(f"held-out text: GPT {in_bits(result['loss'])}; 5-gram model {in_bits(baseline)}")
    if result["loss"] >= baseline:
        print("the 5-gram model is better: train longer (--steps), or a larger network on a machine with a GPU")
    print(f"wrote everything to {config.out}")
    return result


def held_out_windows(text: data.TextDataset, context: int):
    """Windows in whose second halves each held-out character is predicted once, and these characters."""
    half = context // 2
    windows = data.Windows(torch.cat([text.train[-half - 1 :], text.test]), context, stride=half)
    return windows, text.test[: len(windows) * half]


def kind(path: str, leaf: torch.Tensor) -> str:
    """Muon is for the matrices of the blocks, not for embeddings, biases and normalisations."""
    hidden = path.startswith("h.") and path.endswith("weight") and not path.split(".")[-2].startswith("ln_")
    return "matrices" if hidden else "others"


def in_bits(nats: float) -> str:
    return f"{nats:.4f} nats a character ({nats / math.log(2):.4f} bits)"


def sample(net, params, prompt, key, config: Config):
    """The prompt (n,) and `sample_length` tokens after it; a pure function of its arguments.

    Token t is drawn with `fold_in(key, t)`. The window always holds `context` tokens, of which the last ones may be
    still to come: no logits depend on later tokens, so those of the newest are read wherever it stands.
    """

    def draw(params, window, newest, key):
        logits = net(params, window.unsqueeze(0))[0].index_select(0, newest)[0] / config.temperature
        if 0 < config.top_k < len(logits):
            logits = torch.where(logits < logits.topk(config.top_k).values[-1], -torch.inf, logits)
        return random.categorical(key, logits)

    if config.compile:
        draw = torch.compile(draw, fullgraph=True)
    tokens = torch.zeros(len(prompt) + config.sample_length, dtype=torch.int64, device=prompt.device)
    tokens = torch.cat([tokens, tokens.new_zeros(config.context)])  # so that the first windows are full, too
    tokens[: len(prompt)] = prompt
    with torch.no_grad():
        for t in range(len(prompt), len(prompt) + config.sample_length):
            start = max(0, t - config.context)
            newest = torch.full((1,), t - 1 - start, device=prompt.device)
            window = tokens[start : start + config.context].clone()
            tokens[t] = draw(params, window, newest, random.fold_in(key, t))
    return tokens[: len(prompt) + config.sample_length]


def five_gram(tokens, test, vocabulary_size: int, order: int = 5):
    """Probabilities (m,) of the tokens `test` (m,), which follow `tokens` (n,), by interpolated modified Kneser-Ney.

    The longest n-grams are counted as they occur, shorter ones by how many different tokens come before them. Each
    count gives up a discount, of its own for counts of 1, 2, and 3 or more; what a context's counts have given up is
    the weight of the context that is one token shorter, and the shortest is uniform.
    """
    p = torch.full((len(test),), 1 / vocabulary_size, dtype=torch.float64)
    sequence = torch.cat([tokens[len(tokens) - order + 1 :], test])
    for n in range(1, order + 1):
        if n == order:
            grams, counts = torch.unique(encoded(tokens, n, vocabulary_size), return_counts=True)
        else:
            longer = torch.unique(encoded(tokens, n + 1, vocabulary_size))
            grams, counts = torch.unique(longer % vocabulary_size**n, return_counts=True)
        contexts, of_gram = torch.unique(grams // vocabulary_size, return_inverse=True)
        discount = discounts(counts)[counts.clamp(max=3)]
        empty = torch.zeros(len(contexts), dtype=torch.float64)
        totals, given_up = empty.index_add(0, of_gram, counts.double()), empty.index_add(0, of_gram, discount)
        wanted = encoded(sequence[order - n :], n, vocabulary_size)
        total = looked_up(contexts, totals, wanted // vocabulary_size)
        weight = looked_up(contexts, given_up, wanted // vocabulary_size)
        kept = looked_up(grams, counts - discount, wanted)
        p = torch.where(total > 0, (kept + weight * p) / total.clamp(min=1), p)
    return p


def encoded(tokens, n: int, vocabulary_size: int):
    """Each n-gram of a sequence as one number."""
    return sum(tokens[i : len(tokens) - n + 1 + i] * vocabulary_size ** (n - 1 - i) for i in range(n))


def discounts(counts):
    """What counts of 0, 1, 2, and 3 or more give up, from how many counts are 1 to 4."""
    ones = [max(1, int((counts == c).sum())) for c in range(1, 5)]
    share = ones[0] / (ones[0] + 2 * ones[1])
    given = [0.0] + [c - (c + 1) * share * ones[c] / ones[c - 1] for c in (1, 2, 3)]
    return torch.tensor([min(max(d, 0.0), c) for c, d in enumerate(given)], dtype=torch.float64)


def looked_up(keys, values, wanted):
    """The values of the sorted keys, 0 for what is no key."""
    places = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[places] == wanted, values[places].double(), 0.0)


if __name__ == "__main__":
    try:
        run(tyro.cli(Config, description=__doc__))
    except (OSError, ValueError, ImportError, train.NonFiniteError) as error:
        sys.exit(f"train_gpt: {error}")
