"""`interop.save_pth` / `load_pth`: torch's files, without running what is in them, and never a good file lost."""

import os
import pickle
import resource
import zipfile

import pytest
import torch

from fnn import interop, nn, random


def test_a_module_loads_what_fnn_saved_and_back(tmp_path):
    net, module = (
        nn.Sequential(nn.Linear(2), nn.BatchNorm()),
        torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)),
    )
    params, state = net.init(random.key(0), torch.zeros(2, 3))
    x = torch.randn(4, 3)
    interop.save_pth(interop.to_state_dict(params, state), tmp_path / "fnn.pth")
    module.load_state_dict(torch.load(tmp_path / "fnn.pth"))
    torch.testing.assert_close(module.eval()(x), net(params, x, state=state))
    module.train()(x)
    torch.save(module.state_dict(), tmp_path / "torch.pth")
    params, state = interop.from_state_dict(interop.load_pth(tmp_path / "torch.pth"), params, state)
    torch.testing.assert_close(module.eval()(x), net(params, x, state=state))


def test_trees_parts_of_tensors_and_ties(tmp_path):
    path = tmp_path / "x.pth"
    whole = torch.randn(10_000)
    tied = torch.nn.Parameter(torch.randn(2, 3))
    interop.save_pth({"a": {"part": whole[:3], "turned": whole[:6].reshape(2, 3).t()}, "one": tied, "two": tied}, path)
    loaded = interop.load_pth(str(path))
    assert list(loaded) == ["a.part", "a.turned", "one", "two"]
    assert torch.equal(loaded["a.part"], whole[:3])
    assert torch.equal(loaded["a.turned"], whole[:6].reshape(2, 3).t())
    assert loaded["one"].data_ptr() == loaded["two"].data_ptr()
    assert path.stat().st_size < 5000
    assert interop.load_pth(path, device="meta")["one"].is_meta


def test_bad_leaves_are_named_and_nothing_is_written(tmp_path):
    with pytest.raises(TypeError, match="leaf 'a' is int"):
        interop.save_pth({"a": 3}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="leaf 'a' is on the meta device"):
        interop.save_pth({"a": torch.ones(2, device="meta")}, tmp_path / "x.pth")
    assert os.listdir(tmp_path) == []


def test_a_device_that_is_not_there_is_no_damage(tmp_path):
    interop.save_pth({"a": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(RuntimeError, match="nowhere"):
        interop.load_pth(tmp_path / "x.pth", device="nowhere")


class Malice:
    def __reduce__(self):
        return os.mkdir, (os.environ["FNN_TEST_MALICE"],)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(zipped, tmp_path, monkeypatch):
    monkeypatch.setenv("FNN_TEST_MALICE", str(tmp_path / "owned"))
    path = tmp_path / "x.pth"
    torch.save({"weight": torch.ones(2), "run": Malice()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="may run any code") as error:
        interop.load_pth(path)
    assert str(path) in str(error.value)
    assert "mkdir" in str(error.value)
    path.write_bytes(pickle.dumps(Malice()))
    with pytest.raises(ValueError, match="x.pth"):
        interop.load_pth(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kept", [0, 1, 40, -300, -1])
def test_truncated_files(kept, tmp_path):
    path = tmp_path / "x.pth"
    interop.save_pth({"weight": torch.randn(100)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="damaged, cut short or no .pth file") as error:
        interop.load_pth(path)
    assert str(path) in str(error.value)


def test_every_changed_byte_of_the_data_is_seen(tmp_path):
    path = tmp_path / "x.pth"
    weight = torch.randn(8)
    interop.save_pth({"weight": weight}, path)
    content = path.read_bytes()
    start = content.index(weight.numpy().tobytes())
    for place in range(start, start + 32):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="check sum"):
            interop.load_pth(path)


@pytest.mark.parametrize("content", [b"no file of torch's", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(50)])
def test_files_of_another_kind(content, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.pth"):
        interop.load_pth(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="damaged, cut short or no .pth file"):
        interop.load_pth(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        interop.load_pth(tmp_path / "nothing.pth")
    with pytest.raises(IsADirectoryError):
        interop.load_pth(tmp_path)
    with pytest.raises(FileNotFoundError, match="save_pth: cannot write"):
        interop.save_pth({"a": torch.ones(1)}, tmp_path / "missing" / "x.pth")


def half_written(values, path):
    path.write_bytes(b"half of it")
    raise KeyboardInterrupt


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    interop.save_pth({"x": torch.ones(3)}, path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half_written)
        with pytest.raises(KeyboardInterrupt):
            interop.save_pth({"x": torch.zeros(3)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a full disk: the write itself fails half way
    try:
        with pytest.raises(OSError, match="unchanged") as error:
            interop.save_pth({"x": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(error.value)
    assert os.listdir(tmp_path) == ["x.pth"]
    assert torch.equal(interop.load_pth(path)["x"], torch.ones(3))
