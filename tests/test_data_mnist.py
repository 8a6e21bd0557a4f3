"""`fnn.data.mnist` and `fashion_mnist`: the IDX format, read, downloaded, and refused where it is damaged."""

import functools
import gzip
import hashlib
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from idx_files import write_idx, write_mnist

from fnn.data import ImageDataset, fashion_mnist, mnist, preprocess
from fnn.data._torchvision import torchvision

torchvision()
from torchvision import datasets  # noqa: E402

SETS = {"MNIST": mnist, "FashionMNIST": fashion_mnist}
both = pytest.mark.parametrize("source", SETS)


def check_dataset(data, sizes, image_shape):
    assert isinstance(data, ImageDataset)
    assert data.image_shape == image_shape
    assert len(data.classes) == 10
    for (images, labels), size in zip((data.train, data.test), sizes, strict=True):
        assert (images.shape, images.dtype) == ((size, *image_shape), torch.float32)
        assert (labels.shape, labels.dtype) == ((size,), torch.int64)
        assert labels.unique().tolist() == list(range(10))
    images = data.train[0].double()
    assert abs(images.mean()) < 1e-6
    assert abs(images.std(correction=0) - 1) < 1e-6


@both
def test_the_files_are_read_as_torchvision_does(source, tmp_path):
    write_mnist(tmp_path, source)
    data = SETS[source](str(tmp_path))
    check_dataset(data, (20, 10), (1, 32, 32))
    reader = getattr(datasets, source)
    for train, (images, labels) in ((True, data.train), (False, data.test)):
        theirs = reader(str(tmp_path), train=train)
        assert torch.equal(labels, theirs.targets)
        assert torch.equal(images, preprocess(theirs.data, **json.loads(json.dumps(data.preprocessing))))
    if source == "FashionMNIST":
        assert list(data.classes) == reader.classes
        assert repr(data).startswith("ImageDataset(fashion_mnist: 20 training")
    else:
        assert data.classes == tuple("0123456789")


def test_real_mnist(mnist_root):
    data = mnist(mnist_root)
    check_dataset(data, (7500, 1500), (1, 32, 32))
    raw = np.frombuffer((mnist_root / "MNIST" / "raw" / "t10k-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    made = preprocess(torch.from_numpy(raw.reshape(-1, 28, 28).copy()), **data.preprocessing)
    assert torch.equal(made, data.test[0])
    labels = np.frombuffer((mnist_root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    assert np.array_equal(data.test[1].numpy(), labels)


def test_padding_is_black(tmp_path):
    write_mnist(tmp_path)
    data = mnist(tmp_path)
    black = -data.preprocessing["mean"][0] / data.preprocessing["std"][0]
    border = data.train[0][:, :, :2]
    assert torch.allclose(border, torch.full_like(border, black))
    check_dataset(mnist(tmp_path, pad=0), (20, 10), (1, 28, 28))
    with pytest.raises(ValueError, match="fashion_mnist: pad is -1"):
        fashion_mnist(tmp_path, pad=-1)


@both
def test_files_that_are_not_there(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="download=True") as error:
        SETS[source](tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / source / "raw") in str(error.value)
    raw = write_mnist(tmp_path, source)
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="has no t10k-labels-idx1-ubyte;") as error:
        SETS[source](tmp_path)
    assert str(raw) in str(error.value)


@pytest.mark.parametrize("kept", [0, 3, 10, 100, 7848, -1])
@both
def test_files_cut_short(kept, source, tmp_path):
    raw = write_mnist(tmp_path, source)
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        path = raw / name
        whole = path.read_bytes()
        if kept < len(whole):
            path.write_bytes(whole[:kept])
            with pytest.raises(ValueError, match="is damaged or cut short, delete it and fetch .*download=True") as e:
                SETS[source](tmp_path, download=True)
            assert str(path) in str(e.value)
            path.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("train-labels-idx1-ubyte", np.arange(19) % 10, ["20 images", "19 labels"]),
        ("t10k-labels-idx1-ubyte", np.arange(10) + 1, ["the label 10 for image 9", "expected 0 to 9"]),
        ("t10k-images-idx3-ubyte", np.zeros((10, 14, 14)), ["(28, 28)", "(14, 14)", "belong together"]),
        ("train-images-idx3-ubyte", np.zeros((20, 28, 28)), ["equal", "damaged"]),
        ("train-images-idx3-ubyte", np.zeros(20), ["train-images-idx3-ubyte does not start", "3 axes"]),
    ],
)
@both
def test_files_that_do_not_fit(name, array, words, source, tmp_path):
    raw = write_mnist(tmp_path, source)
    write_idx(raw / name, array)
    with pytest.raises(ValueError, match="mnist: ") as error:
        SETS[source](tmp_path)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_header_that_promises_more_than_there_is(tmp_path):
    path = write_mnist(tmp_path) / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[4:8] = b"\xff" * 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"15,696 bytes, but its header says 4294967295 x 28 x 28 .*cut short"):
        mnist(tmp_path)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    """The address of a web server over the temporary folder."""
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@both
def test_download(source, tmp_path, server, monkeypatch):
    reader, get = getattr(datasets, source), SETS[source]
    raw = write_mnist(tmp_path / "server", source)
    resources = []
    for path in sorted(raw.iterdir()):
        packed = gzip.compress(path.read_bytes())
        (raw / f"{path.name}.gz").write_bytes(packed)
        resources.append((f"{path.name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(reader, "resources", resources)
    monkeypatch.setattr(reader, "mirrors", [f"{server}/nothing/"])
    with pytest.raises(OSError, match="could not download") as error:
        get(tmp_path / "mine", download=True)
    assert str(tmp_path / "mine" / source / "raw") in str(error.value)
    monkeypatch.setattr(reader, "mirrors", [f"{server}/server/{source}/raw/"])
    check_dataset(get(tmp_path / "mine", download=True), (20, 10), (1, 32, 32))
    check_dataset(get(tmp_path / "mine"), (20, 10), (1, 32, 32))
    monkeypatch.setattr(reader, "resources", [(name, "0" * 32) for name, _ in resources])
    with pytest.raises(OSError, match="could not download"):  # not what its checksum says
        get(tmp_path / "other", download=True)
