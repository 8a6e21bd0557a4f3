"""`fnn.data.cifar10`: the binary format, read, downloaded, and refused where it is damaged."""

import functools
import hashlib
import json
import re
import sys
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from cifar10_files import TRAIN, write_cifar10

from fnn.data import ImageDataset, _cifar10, cifar10, preprocess


def test_the_files_are_read_as_the_format_says(tmp_path):
    folder = write_cifar10(tmp_path)
    data = cifar10(str(tmp_path))
    assert repr(data) == "ImageDataset(cifar10: 100 training and 20 test images, 3 x 32 x 32, 10 classes)"
    assert data.classes[:2] == ("airplane", "automobile")
    for (images, labels), names in ((data.train, TRAIN), (data.test, ["test_batch.bin"])):
        # Byte by byte: a label, 1024 red, 1024 green and 1024 blue pixels, each plane row by row.
        content = b"".join((folder / name).read_bytes() for name in names)
        pixels = torch.empty(len(labels), 3, 32, 32, dtype=torch.uint8)
        for n, image in enumerate(pixels):
            record = content[3073 * n : 3073 * (n + 1)]
            assert labels[n] == record[0]
            for channel in range(3):
                plane = record[1 + 1024 * channel :]
                for row in range(0, 32, 5):
                    image[channel, row] = torch.tensor(list(plane[32 * row : 32 * row + 32]), dtype=torch.uint8)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        made = preprocess(pixels, **json.loads(json.dumps(data.preprocessing)))
        assert torch.equal(made[:, :, ::5], images[:, :, ::5])


def test_each_channel_is_standardised_by_the_training_images(tmp_path):
    write_cifar10(tmp_path)
    data = cifar10(tmp_path)
    std, mean = torch.std_mean(data.train[0].double(), dim=(0, 2, 3), correction=0)
    assert torch.allclose(mean, torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(std, torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert len(set(data.preprocessing["mean"])) == len(set(data.preprocessing["std"])) == 3


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no data_batch_1\.bin, .*binary version.*download=True") as error:
        cifar10(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "cifar-10-batches-bin") in str(error.value)
    (write_cifar10(tmp_path) / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no test_batch\.bin;"):
        cifar10(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 3072, 3074, -1])
def test_files_cut_short(kept, tmp_path):
    path = write_cifar10(tmp_path) / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"expected a multiple of 3,073.*damaged or cut short") as error:
        cifar10(tmp_path)
    assert str(path) in str(error.value)


def test_a_file_cut_between_two_images(tmp_path):
    path = write_cifar10(tmp_path) / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[: 7 * 3073])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin 20, data_batch_3\.bin 7, .*10000 in the original.*delete"):
        cifar10(tmp_path)


def test_a_label_out_of_range(tmp_path):
    path = write_cifar10(tmp_path) / "test_batch.bin"
    content = bytearray(path.read_bytes())
    content[4 * 3073] = 10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"test_batch\.bin has the label 10 in image 4, expected 0 to 9"):
        cifar10(tmp_path)


def test_images_that_are_all_equal(tmp_path):
    folder = write_cifar10(tmp_path)
    for name in TRAIN:
        (folder / name).write_bytes(np.zeros(20 * 3073, dtype=np.uint8).tobytes())
    with pytest.raises(ValueError, match="all pixels of the training images are equal"):
        cifar10(tmp_path)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """The archive behind a web server of our own, instead of the 162 MB at the university's."""
    server = tmp_path / "server"
    write_cifar10(server)
    path = server / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        packed.add(server / "cifar-10-batches-bin", "cifar-10-batches-bin")
    monkeypatch.setattr(_cifar10, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    handler = functools.partial(QuietHandler, directory=server)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(_cifar10, "URL", f"http://127.0.0.1:{http.server_port}/{path.name}")
        yield path
        http.shutdown()


def test_download(tmp_path, archive):
    data = cifar10(tmp_path / "mine", download=True)
    assert isinstance(data, ImageDataset)
    assert len(data.train[1]) == 100
    archive.unlink()
    assert torch.equal(cifar10(tmp_path / "mine", download=True).train[0], data.train[0])  # what is there is kept


def test_a_download_of_something_else_is_refused(tmp_path, archive):
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(OSError, match=re.escape(f"could not download {_cifar10.URL} into {tmp_path / 'mine'}")):
        cifar10(tmp_path / "mine", download=True)
    assert not (tmp_path / "mine" / "cifar-10-batches-bin").exists()


def test_a_server_without_it_and_an_absent_torchvision_are_named(tmp_path, archive, monkeypatch):
    archive.unlink()
    with pytest.raises(OSError, match="could not download .*check the network"):
        cifar10(tmp_path / "mine", download=True)
    monkeypatch.setattr(_cifar10, "torchvision", _cifar10.torchvision.__wrapped__)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"pip install .fnn\[examples\]"):
        cifar10(tmp_path / "mine", download=True)
