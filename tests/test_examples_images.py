"""The image trainers finetune, train_vit and airbench, at their smallest size."""

import importlib.util
import json
import signal
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from cifar10_files import write_cifar10
from idx_files import write_mnist

from fnn import data, interop, models, optim, random, train, tree
from fnn.data._torchvision import torchvision

FOLDER = Path(__file__).parents[1] / "examples"


def load(name):
    """An example under a module name of its own: the compiler looks modules up by name."""
    spec = importlib.util.spec_from_file_location(f"images_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


airbench, finetune, train_vit = load("airbench"), load("finetune"), load("train_vit")


@pytest.fixture
def mnist(tmp_path):
    """Ten batches of two an epoch."""
    write_mnist(tmp_path / "data", train=20, test=10)
    return tmp_path / "data"


@pytest.fixture
def weights(tmp_path):
    """A state_dict with torchvision's names, of a network of width 4 with 1000 classes."""
    params, state = models.resnet18(1000, 4).init(random.key(7), torch.zeros(1, 3, 32, 32))
    state = tree.map(lambda leaf: leaf + 0.5, state)
    interop.save_pth(interop.to_state_dict(params, state), tmp_path / "resnet.pth")
    return tmp_path / "resnet.pth"


def finetuning(weights, mnist, **options):
    options = {"out": weights.parent / "out", "head_epochs": 1, "epochs": 1, "batch_size": 4, **options}
    return finetune.Config(weights=str(weights), width=4, data="mnist", root=mnist, compile=False, **options)


def saved(folder):
    """The newest checkpoint: {"params": ..., "state": ...}."""
    return interop.load_safetensors(max(folder.glob("step_*.safetensors")))["train_state"]


def stop_after(monkeypatch, module, step):
    """Ctrl-C after that step."""

    class Interrupted(train.Progress):
        def step(self, run):
            if run.step == step:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module.train, "Progress", Interrupted)


def same(a, b):
    a, b = tree.paths(a), tree.paths(b)
    return a.keys() == b.keys() and all(torch.equal(a[path], b[path]) for path in a)


def test_finetune_first_trains_the_head_then_everything(weights, mnist):
    config = finetuning(weights, mnist)
    result = finetune.run(config)
    params, state = models.resnet18(10, 4).init(random.key(0), torch.zeros(1, 3, 32, 32))
    trunk = {name: leaf for name, leaf in params.items() if name != "fc"}
    given = {name: leaf for name, leaf in interop.load_pth(weights).items() if not name.startswith("fc")}
    trunk, state = interop.from_state_dict(given, trunk, state)

    head = saved(config.out / "checkpoints" / "head")
    final = interop.load_safetensors(config.out / "model.safetensors")
    frozen = {name: leaf for name, leaf in head["params"].items() if name != "fc"}
    assert same(frozen, trunk)
    assert same(head["state"], state)
    assert not same(final["params"]["layer4"], trunk["layer4"])
    assert not same(final["state"], state)
    assert not same(final["params"]["fc"], head["params"]["fc"])

    written = json.loads((config.out / "config.json").read_text())
    assert written["status"] == "finished"
    assert written["test"] == result
    assert written["steps"] == 10
    rows = (config.out / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["1", "5"], ["2", "10"]]
    assert (config.out / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_finetune_goes_on_in_either_phase_bit_for_bit(weights, mnist, monkeypatch, capsys):
    undisturbed, broken = (finetuning(weights, mnist, out=weights.parent / name, augment=True) for name in "ab")
    finetune.run(undisturbed)
    stop_after(monkeypatch, finetune, 3)
    finetune.run(broken)
    assert json.loads((broken.out / "config.json").read_text())["status"] == "interrupted"
    assert "--resume goes on" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="unfinished run \\(interrupted\\); go on with it \\(--resume\\)"):
        finetune.run(broken)
    stop_after(monkeypatch, finetune, 8)
    finetune.run(finetune.dataclasses.replace(broken, resume=True))
    finetune.run(finetune.dataclasses.replace(broken, resume=True))
    a, b = (interop.load_safetensors(config.out / "model.safetensors") for config in (undisturbed, broken))
    assert same(a, b)


def test_finetune_takes_torchvisions_weights(tmp_path, monkeypatch):
    module = torchvision().models.resnet18()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(module.state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    params, state = models.resnet18(3).init(random.key(0), torch.zeros(1, 3, 32, 32))
    loaded, statistics = finetune.with_weights("imagenet", params, state)
    torch.testing.assert_close(loaded["layer3"]["1"]["conv2"]["weight"], module.layer3[1].conv2.weight.detach())
    assert loaded["fc"] is params["fc"]
    assert tree.allclose(statistics["bn1"]["running_var"], module.bn1.running_var)


def test_finetune_says_what_is_wrong_with_weights(weights, mnist, tmp_path, monkeypatch):
    def no_network(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    params, state = models.resnet18(3, 8).init(random.key(0), torch.zeros(1, 3, 32, 32))
    with pytest.raises(OSError, match="no network.*--weights PATH.*--weights none"):
        finetune.with_weights("imagenet", params, state)
    with pytest.raises(ValueError, match="(?s)does not fit a ResNet-18 of --width 8: .*conv1.weight"):
        finetune.with_weights(str(weights), params, state)
    with pytest.raises(OSError, match="nothing.pth"):
        finetune.with_weights("nothing.pth", params, state)


def test_finetune_standardises_as_torchvisions_weights_do(weights, mnist):
    torchvision()
    from torchvision.models import ResNet18_Weights
    from torchvision.transforms.v2 import functional

    transforms = ResNet18_Weights.IMAGENET1K_V1.transforms()
    images = finetune.load_images(finetuning(weights, mnist))
    pixels = data.mnist(mnist).preprocessing
    raw = data.mnist(mnist).test[0] * pixels["std"][0] + pixels["mean"][0]
    wanted = functional.normalize(raw.expand(-1, 3, -1, -1), transforms.mean, transforms.std)
    torch.testing.assert_close(images.test[0], wanted, rtol=1e-5, atol=1e-5)


TINY = {"layers": 1, "heads": 2, "width": 8, "epochs": 2, "batch_size": 4}


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix"])
def test_train_vit_runs_and_its_weights_give_the_accuracy_it_says(mix, mnist, tmp_path):
    config = train_vit.Config(data="mnist", root=mnist, mix=mix, compile=False, out=tmp_path / "out", **TINY)
    result = train_vit.run(config)
    weights = interop.load_safetensors(config.out / "model.safetensors")["params"]
    x, labels = data.mnist(mnist).test
    logits = models.vit(10, 32, 4, 1, 2, 8, 16)(weights, x)
    assert float((logits.argmax(-1) == labels).double().mean()) == result["accuracy"]
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(result["loss"], rel=1e-4)
    names = {"checkpoints", "config.json", "curves.png", "metrics.csv", "model.safetensors"}
    assert {path.name for path in config.out.iterdir()} == names


@pytest.mark.slow
def test_train_vit_goes_on_bit_for_bit(mnist, tmp_path, monkeypatch):
    options = {"data": "mnist", "root": mnist, "compile": False, **TINY}
    train_vit.run(train_vit.Config(out=tmp_path / "a", **options))
    stop_after(monkeypatch, train_vit, 7)
    for resume in (False, True):
        train_vit.run(train_vit.Config(out=tmp_path / "b", resume=resume, **options))
    a, b = (interop.load_safetensors(tmp_path / name / "model.safetensors") for name in "ab")
    assert same(a, b)


def test_weight_decay_of_the_vit_leaves_out_what_is_no_matrix():
    net = models.vit(10, 8, 2, 1, 2, 8, 16)
    params, _ = net.init(random.key(0, device="meta"), torch.zeros(1, 1, 8, 8))
    decaying = [path for path, leaf in tree.paths(params).items() if train_vit.decays(path, leaf)]
    assert "heads.head.weight" in decaying
    assert all(path.endswith("weight") and "ln" not in path for path in decaying)


@pytest.mark.parametrize("files", [True, False])
def test_airbench_learns_and_keeps_what_it_should(files, tmp_path, capsys):
    if files:
        write_cifar10(tmp_path, each=12)
    options = {"width": 2, "images": 60, "batch_size": 20, "epochs": 2, "compile": False}
    config = airbench.Config(root=tmp_path, out=tmp_path / "out", **options)
    result = airbench.run(config)
    printed = capsys.readouterr().out
    assert ("synthetic images: their accuracy means nothing" in printed) != files
    assert "training images/s" in printed
    written = json.loads((config.out / "config.json").read_text())
    assert written["data"] == ("cifar10" if files else "synthetic")
    assert written["images_per_second"] == result["images_per_second"] > 0
    params = interop.load_safetensors(config.out / "model.safetensors")["params"]
    images = airbench.load_images(config, random.split(random.key(0), 5)[4])
    assert same(params["whiten"]["weight"], airbench.whitening(images.train[0]))
    norms = [params[f"group{i}"][f"norm{k}"] for i in (1, 2, 3) for k in (1, 2)]
    assert all(bool((norm["weight"] == 1).all()) and bool((norm["bias"] != 0).any()) for norm in norms)


def test_airbenchs_first_layer_whitens_patches():
    images = random.normal(random.key(0), (50, 3, 16, 16), torch.float64).cumsum(-1)
    filters = airbench.whitening(images, eps=0.0)
    responses = F.conv2d(images, filters[:12]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(responses @ responses.T / responses.shape[1], torch.eye(12, dtype=torch.float64))
    assert torch.equal(filters[12:], -filters[:12])


@pytest.mark.parametrize("shape", [(8, 5, 3, 3), (4, 24, 3, 3)])
def test_airbenchs_filters_start_as_the_identity(shape):
    weight = airbench.identity(random.key(0), shape)
    n = min(shape[:2])
    assert torch.equal(weight[:n], torch.nn.init.dirac_(torch.empty(n, *shape[1:])))
    assert bool((weight[n:] != 0).all())


def test_airbenchs_network_is_the_described_one():
    class Module(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            layers, arriving = [torch.nn.Conv2d(3, 24, 2), torch.nn.GELU()], 24
            for channels in (width, 4 * width, 4 * width):
                for first in (True, False):
                    layers.append(torch.nn.Conv2d(arriving, channels, 3, padding=1, bias=False))
                    layers += [torch.nn.MaxPool2d(2)] if first else []
                    layers += [torch.nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4), torch.nn.GELU()]
                    arriving = channels
            layers += [torch.nn.MaxPool2d(3), torch.nn.Flatten(), torch.nn.Linear(arriving, 10, bias=False)]
            self.layers = torch.nn.Sequential(*layers)

        def forward(self, x):
            return self.layers(x) / self.layers[-1].in_features

    x = random.normal(random.key(1), (4, 3, 32, 32), torch.float64)
    net, module = airbench.network(2, 10), Module(2).double()
    params, state = net.init(random.key(0), x)
    for theirs, ours in zip(module.parameters(), tree.leaves(params), strict=True):
        theirs.data = ours.clone()
    logits, new = net.apply(params, state, x, train=True)
    torch.testing.assert_close(logits, module(x))
    torch.testing.assert_close(new["group3"]["norm2"]["running_var"], module.layers[-5].running_var)


def test_airbenchs_muon_is_torchs_on_filters_of_fixed_norm():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    params = {"a": random.normal(random.key(0), (6, 2, 3, 3))}
    opt = airbench.muon_of_filters(optim.linear(0.24, 0.0, 4))
    opt_state, rows = opt.init(params), torch.nn.Parameter(params["a"].flatten(1).clone())
    theirs = torch.optim.Muon([rows], lr=0.24, momentum=0.6, ns_steps=3, weight_decay=0.0)
    for step in range(3):
        grad = random.normal(random.key(step + 1), (6, 2, 3, 3))
        updates, opt_state = opt.update({"a": grad}, opt_state, params)
        params = optim.apply_updates(params, updates)
        with torch.no_grad():
            rows *= 6**0.5 / rows.norm()
        rows.grad, theirs.param_groups[0]["lr"] = grad.flatten(1), 0.24 * (1 - step / 4)
        theirs.step()
        torch.testing.assert_close(params["a"].flatten(1), rows.detach(), rtol=1e-3, atol=1e-3)


def test_airbench_mirrors_every_image_in_every_other_epoch():
    mirrored = random.bernoulli(random.key(0), 0.5, (12,))
    batches = airbench.Alternating(data.Loader((torch.arange(12), torch.arange(12), mirrored), 4, key=random.key(1)))
    seen = []
    for epoch in range(3):
        flags = torch.empty(12, dtype=torch.bool)
        for images, _, flag in batches.epoch(epoch):
            flags[images] = flag
        seen.append(flags)
    assert torch.equal(seen[0], mirrored)
    assert torch.equal(seen[1], ~mirrored)
    assert torch.equal(seen[2], mirrored)
    first, second = list(batches.epoch(1))[2], next(batches.epoch(1, start=2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_airbenchs_views():
    x = random.normal(random.key(0), (2, 3, 32, 32))
    views, shares = airbench.six_views(x)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    for view, wanted in zip(views, [x, padded[..., 2:34, 2:34], padded[..., 0:32, 0:32]], strict=False):
        assert torch.equal(view, wanted)
    assert torch.equal(views[3:], views[:3].flip(-1))
    assert shares.tolist() == [0.25, 0.125, 0.125, 0.25, 0.125, 0.125]


@pytest.mark.slow
def test_airbench_goes_on_bit_for_bit(tmp_path, monkeypatch):
    options = {"root": tmp_path, "width": 2, "images": 60, "batch_size": 20, "epochs": 2, "compile": False}
    airbench.run(airbench.Config(out=tmp_path / "a", **options))
    stop_after(monkeypatch, airbench, 4)
    for resume in (False, True):
        airbench.run(airbench.Config(out=tmp_path / "b", resume=resume, **options))
    a, b = (interop.load_safetensors(tmp_path / name / "model.safetensors") for name in "ab")
    assert same(a, b)


@pytest.mark.slow
def test_airbench_compiles_to_one_graph_that_does_the_same(tmp_path, fast_compile):
    options = {"root": tmp_path, "width": 2, "images": 60, "batch_size": 20, "epochs": 1}
    airbench.run(airbench.Config(out=tmp_path / "a", compile=False, **options))
    airbench.run(airbench.Config(out=tmp_path / "b", strict=True, **options))
    a, b = (interop.load_safetensors(tmp_path / name / "model.safetensors")["params"] for name in "ab")
    assert tree.allclose(a, b, rtol=1e-3, atol=1e-3)
