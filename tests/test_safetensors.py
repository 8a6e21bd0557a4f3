"""`fnn.interop.save_safetensors` / `load_safetensors`: the same tree back, and never a good file lost."""

import os
import random
import resource
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors
import safetensors.torch
import torch

import fnn.interop._safetensors as implementation
import fnn.random
from fnn import interop, optim, train, tree
from fnn.interop import load_safetensors, save_safetensors


class Moments(NamedTuple):
    count: torch.Tensor
    mu: dict


class Nothing(NamedTuple):
    pass


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.uint16,
    torch.uint64,
    torch.float8_e4m3fn,
]


def bits(x):
    return x.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def assert_same(actual, expected, path=""):
    """The same containers (a NamedTuple as a dict), keys in the same order, and leaves equal bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert type(actual) is torch.Tensor, path
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), path
        assert not actual.requires_grad, path
        assert torch.equal(bits(actual), bits(expected.detach())), path
        return
    if hasattr(expected, "_fields"):
        expected = expected._asdict()
    if isinstance(expected, dict):
        assert type(actual) is dict, path
        assert list(actual) == list(expected), path
        for key in expected:
            assert_same(actual[key], expected[key], f"{path}.{key}")
    else:
        assert type(actual) is type(expected), path
        assert len(actual) == len(expected), path
        for n, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, b, f"{path}.{n}")


def random_leaf(draw):
    shape = [draw.choice([0, 1, 2, 3]) for _ in range(draw.randrange(4))]
    dtype = draw.choice(DTYPES)
    size = max(1, torch.Size(shape).numel()) * dtype.itemsize
    raw = torch.tensor([draw.randrange(2 if dtype == torch.bool else 256) for _ in range(size)], dtype=torch.uint8)
    leaf = raw.view(dtype)[: torch.Size(shape).numel()].reshape(shape)
    return leaf.transpose(0, -1) if leaf.ndim > 1 and draw.random() < 0.3 else leaf


def random_tree(draw, depth=3):
    kind = draw.choice(["leaf", "dict", "list", "tuple", "moments"]) if depth else "leaf"
    children = [random_tree(draw, depth - 1) for _ in range(draw.randrange(4))] if kind in ("list", "tuple") else []
    if kind == "leaf":
        return random_leaf(draw)
    if kind == "dict":
        names = ["weight", "0", "10", "2", "a b", "é", "bias", "dict"]
        return {name: random_tree(draw, depth - 1) for name in draw.sample(names, draw.randrange(4))}
    if kind == "moments":
        return Moments(random_leaf(draw), {"z": random_tree(draw, depth - 1), "a": random_tree(draw, depth - 1)})
    return children if kind == "list" else tuple(children)


@pytest.mark.parametrize("seed", range(40))
def test_random_trees_come_back_bit_for_bit(seed, tmp_path):
    original = random_tree(random.Random(seed))
    save_safetensors(original, tmp_path / "tree.safetensors")
    loaded = load_safetensors(tmp_path / "tree.safetensors")
    assert_same(loaded, original)
    assert list(tree.paths(loaded)) == list(tree.paths(original))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_scalar_and_empty(dtype, tmp_path):
    raw = torch.arange(3 * dtype.itemsize, dtype=torch.uint8) % (2 if dtype == torch.bool else 97)
    leaf = raw.view(dtype)
    original = {"three": leaf, "scalar": leaf[1], "empty": leaf[:0], "empty2d": leaf[:0].reshape(0, 5)}
    save_safetensors(original, tmp_path / "x.safetensors")
    assert_same(load_safetensors(tmp_path / "x.safetensors"), original)


def test_nan_payloads_and_signed_zero(tmp_path):
    x = torch.tensor([0x7FC00001, -0x3FFFFF, -0x80000000, 1], dtype=torch.int32).view(torch.float32)
    save_safetensors({"x": x}, tmp_path / "x.safetensors")
    assert_same(load_safetensors(tmp_path / "x.safetensors"), {"x": x})


@pytest.mark.parametrize("empty", [{}, (), [], Nothing(), {"a": {}, "b": ((), [])}], ids=repr)
def test_empty_containers(empty, tmp_path):
    save_safetensors(empty, tmp_path / "x.safetensors")
    assert_same(load_safetensors(tmp_path / "x.safetensors"), empty)


def test_a_process_that_torchrun_started_and_that_is_in_no_group_writes_a_whole_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    save_safetensors({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    assert torch.equal(load_safetensors(tmp_path / "one.safetensors")["a"], torch.ones(2))


def test_a_bare_tensor_is_a_tree(tmp_path):
    save_safetensors(torch.arange(3), tmp_path / "x.safetensors")
    assert_same(load_safetensors(tmp_path / "x.safetensors"), torch.arange(3))


def test_containers_that_come_back_as_plain_ones(tmp_path):
    original = OrderedDict(z=Moments(torch.tensor(1), {"w": torch.ones(2)}), a=[torch.zeros(1)])
    save_safetensors(original, str(tmp_path / "x.safetensors"))
    loaded = load_safetensors(str(tmp_path / "x.safetensors"))
    assert type(loaded) is dict
    assert type(loaded["z"]) is dict
    assert list(loaded["z"]) == ["count", "mu"]
    # The documented way back into the original's own containers.
    restored = tree.unflatten(tree.flatten(original)[1], tree.leaves(loaded))
    assert type(restored["z"]) is Moments
    assert tree.allclose(restored, original)


def test_a_train_state(tmp_path):
    params = {"weight": torch.ones(2), "empty": {}}
    original = train.TrainState.create(params, optim.adam(0.1), fnn.random.key(3))
    save_safetensors(original, tmp_path / "x.safetensors")
    loaded = load_safetensors(tmp_path / "x.safetensors")
    assert list(loaded) == ["params", "state", "opt_state", "key", "step"]
    assert_same(loaded["params"], params)
    restored = tree.unflatten(tree.flatten(original)[1], tree.leaves(loaded))
    assert type(restored) is train.TrainState
    assert tree.allclose(restored, original, 0, 0)


def test_other_programs_read_the_names_and_the_metadata(tmp_path):
    path = tmp_path / "x.safetensors"
    original = {"0": {"weight": torch.randn(2, 3)}, "heads": (torch.ones(1), torch.zeros(2))}
    save_safetensors(original, path, metadata={"epoch": "3"})
    flat = safetensors.torch.load_file(path)
    assert set(flat) == {"0.weight", "heads.0", "heads.1"}
    assert torch.equal(flat["0.weight"], original["0"]["weight"])
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["epoch"] == "3"
    assert header["format"] == "pt"


def test_a_state_dict_keeps_torch_s_names(tmp_path):
    path = tmp_path / "x.safetensors"
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    _, params, state = interop.from_module(module)
    tied = {"head.weight": "0.weight"}
    named = interop.to_state_dict(params, state, tied=tied)
    save_safetensors(named, path)
    assert_same(load_safetensors(path), named)
    module.load_state_dict({n: v for n, v in safetensors.torch.load_file(path).items() if n != "head.weight"})
    empty = tree.map(torch.zeros_like, (params, state))
    assert_same(interop.from_state_dict(load_safetensors(path), *empty, tied=tied), (params, state))


def test_a_file_of_another_program_loads_as_nested_dicts(tmp_path):
    path = tmp_path / "x.safetensors"
    names = {
        "layer.0.weight": torch.ones(2),
        "layer.0.bias": torch.zeros(1),
        "layer.1.weight": torch.ones(3),
        "g": torch.ones(()),
    }
    safetensors.torch.save_file(names, path)
    loaded = load_safetensors(path)
    assert sorted(tree.paths(loaded)) == sorted(names)
    assert type(loaded["layer"]["0"]) is dict
    assert torch.equal(loaded["layer"]["1"]["weight"], names["layer.1.weight"])


@pytest.mark.parametrize("names", [("a", "a.b"), ("z.a.b.c", "z.a"), ("a.b", "a")])
def test_names_that_cannot_be_nested(names, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({name: torch.ones(n + 1) for n, name in enumerate(names)}, path)
    with pytest.raises(ValueError, match="cannot be nested") as error:
        load_safetensors(path)
    assert str(path) in str(error.value)
    assert all(repr(name) in str(error.value) for name in names)


def test_shared_expanded_and_strided_leaves(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    original = {
        "tied": base,
        "tied again": base,
        "row": base[1],
        "overlap": base.reshape(-1)[2:7],
        "transposed": base.t(),
        "expanded": torch.ones(()).expand(2, 3),
        "strided": base[:, ::2],
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    save_safetensors(original, tmp_path / "x.safetensors")
    loaded = load_safetensors(tmp_path / "x.safetensors")
    assert_same(loaded, original)
    loaded["tied"].zero_()
    assert torch.equal(loaded["tied again"], base)
    assert base.sum() == 66


def test_loaded_tensors_own_their_memory(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors({"x": torch.ones(1000)}, path)
    loaded = load_safetensors(path)
    with path.open("r+b") as file:  # overwritten in place, as cp does
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(4000))
    assert loaded["x"].sum() == 1000
    assert load_safetensors(path)["x"].sum() == 0


def test_device(tmp_path):
    save_safetensors({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    assert load_safetensors(tmp_path / "x.safetensors", device="cpu")["x"].device.type == "cpu"
    assert load_safetensors(tmp_path / "x.safetensors", device=torch.device("meta"))["x"].is_meta


@pytest.mark.parametrize(
    ("bad", "kind", "words"),
    [
        ({"a": {"b.c": torch.ones(1), "b": {"c": torch.ones(1)}}}, ValueError, ["two leaves", "'a.b.c'", "rename one"]),
        ({"a": {"": torch.ones(1)}}, ValueError, ["''", "leaf 'a'"]),
        ({"__metadata__": torch.ones(1)}, ValueError, ["__metadata__"]),
        ({"a": [{3: torch.ones(1)}]}, TypeError, ["key 3", "leaf 'a.0'", "int", "'3'"]),
        ({"a": {"b": (torch.ones(1), 2.5)}}, TypeError, ["leaf 'a.b.1'", "float", "torch.as_tensor"]),
        ({"a": None}, TypeError, ["leaf 'a'", "NoneType"]),
        (None, TypeError, ["the tree itself", "NoneType"]),
        ({"a": torch.ones(1).numpy()}, TypeError, ["leaf 'a'", "ndarray"]),
        ({"a": torch.ones(2, device="meta")}, ValueError, ["leaf 'a'", "meta"]),
        ({"a": torch.eye(2).to_sparse()}, TypeError, ["leaf 'a'", "to_dense"]),
        ({"a": torch.ones(2, dtype=torch.complex128)}, TypeError, ["leaf 'a'", "complex128", "view_as_real"]),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(bad, kind, words, tmp_path):
    with pytest.raises(kind) as error:
        save_safetensors(bad, tmp_path / "x.safetensors")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("metadata", "kind"), [({"epoch": 3}, TypeError), ({3: "x"}, TypeError), ({"fnn.tree": "x"}, ValueError)]
)
def test_bad_metadata(metadata, kind, tmp_path):
    with pytest.raises(kind, match="metadata"):
        save_safetensors({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata=metadata)


def half_written(leaves, path, header):
    Path(path).write_bytes(b"half of it")
    raise KeyboardInterrupt


def refused(*paths):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("where", "name", "failure", "kind"),
    [
        (implementation, "save_file", half_written, KeyboardInterrupt),
        (implementation.os, "replace", refused, PermissionError),
        (implementation.os, "fsync", refused, PermissionError),
    ],
)
def test_a_failed_save_keeps_the_old_file_and_leaves_no_litter(where, name, failure, kind, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_safetensors({"x": torch.ones(3)}, path)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, failure)
        with pytest.raises(kind):
            save_safetensors({"x": torch.zeros(300)}, path)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert_same(load_safetensors(path), {"x": torch.ones(3)})


def test_a_file_that_grows_too_large_keeps_the_old_one(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors({"x": torch.ones(3)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a full disk: the write itself fails half way
    try:
        with pytest.raises(OSError, match="unchanged") as error:
            save_safetensors({"x": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(error.value)
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert_same(load_safetensors(path), {"x": torch.ones(3)})


def test_overwriting_keeps_links_and_permissions(tmp_path):
    real, link = tmp_path / "real.safetensors", tmp_path / "latest.safetensors"
    save_safetensors({"x": torch.ones(1)}, real)
    plain = tmp_path / "plain"
    plain.touch()
    assert real.stat().st_mode == plain.stat().st_mode
    real.chmod(0o640)
    link.symlink_to(real)
    save_safetensors({"x": torch.zeros(1)}, link)
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert_same(load_safetensors(real), {"x": torch.zeros(1)})


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, kind in [
        (tmp_path / "missing" / "x.safetensors", FileNotFoundError),
        (tmp_path / "file" / "x.safetensors", NotADirectoryError),
        (tmp_path, IsADirectoryError),
    ]:
        with pytest.raises(kind) as error:
            save_safetensors({"x": torch.ones(1)}, path)
        assert str(path) in str(error.value)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write into read-only folders")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="writable") as error:
        save_safetensors({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    assert str(tmp_path) in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_file(tmp_path):
    save_safetensors({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").chmod(0)
    with pytest.raises(PermissionError) as error:
        load_safetensors(tmp_path / "x.safetensors")
    assert str(tmp_path / "x.safetensors") in str(error.value)


def test_missing_file_and_folder_to_load(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_safetensors(tmp_path / "nothing.safetensors")
    assert str(tmp_path / "nothing.safetensors") in str(error.value)
    with pytest.raises(IsADirectoryError) as error:
        load_safetensors(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 40, -300, -1])
def test_truncated_files(kept, tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors({"x": torch.ones(100), "y": {"z": torch.zeros(3)}}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="damaged, cut short") as error:
        load_safetensors(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content", [b"not safetensors at all", b"\x80\x02}q\x00.", b"\x02" + bytes(7) + b"[]", b"\xff" * 64]
)
def test_files_of_another_kind(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors file") as error:
        load_safetensors(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "outline",
    [
        "",
        "{",
        "3",
        '"x"',
        "[]",
        '{"set":[null]}',
        '{"dict":[["x"]]}',
        '{"dict":[["x",null],["y",null]]}',
        '{"dict":[]}',
        '{"list":[null]}',
    ],
)
def test_a_header_that_does_not_fit_the_tensors(outline, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": torch.ones(1)}, path, {"fnn.tree": outline})
    with pytest.raises(ValueError, match="recorded in its header") as error:
        load_safetensors(path)
    assert str(path) in str(error.value)
