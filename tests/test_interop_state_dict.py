"""`interop.to_state_dict` / `from_state_dict`: torch's names both ways, and every misfit reported."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from fnn import interop, nn, random, tree


def layers():
    """An fnn net and a torch module of one architecture."""
    net = nn.Sequential(nn.Linear(4), nn.BatchNorm(), nn.relu, nn.Linear(2))
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    params, state = net.init(random.key(0), torch.zeros(2, 3))
    return net, params, state, module


def identical(a, b):
    return list(tree.paths(a)) == list(tree.paths(b)) and tree.allclose(a, b, 0, 0)


def test_a_module_loads_what_fnn_has_and_back():
    net, params, state, module = layers()
    x = torch.randn(5, 3)
    _, state = net.apply(params, state, x, train=True)
    state_dict = interop.to_state_dict(params, state)
    assert set(state_dict) == set(module.state_dict())
    count = state_dict["1.num_batches_tracked"]
    assert (count.dtype, count.shape, int(count)) == (torch.int64, (), 0)
    module.load_state_dict(state_dict)
    torch.testing.assert_close(module.eval()(x), net(params, x, state=state))
    module.train()(x * 2)
    with torch.no_grad():
        module[0].weight.mul_(2)
    loaded = interop.from_state_dict(module.state_dict(), params, state)
    torch.testing.assert_close(net(loaded[0], x, state=loaded[1]), module.eval()(x))
    assert list(tree.paths(loaded)) == list(tree.paths((params, state)))


def test_a_converted_module_round_trips():
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2, momentum=None))
    module(torch.randn(4, 2))
    _, params, state = interop.from_module(module)
    state_dict = interop.to_state_dict(params, state)
    assert set(state_dict) == set(module.state_dict())
    assert int(state_dict["1.num_batches_tracked"]) == 1
    assert identical(interop.from_state_dict(module.state_dict(), params, state), (params, state))


def test_safetensors_files_of_other_programs(tmp_path):
    _, params, state, module = layers()
    save_file(module.state_dict(), tmp_path / "x.safetensors")
    loaded, _ = interop.from_state_dict(interop.load_safetensors(tmp_path / "x.safetensors"), params, state)
    assert torch.equal(loaded["3"]["weight"], module[3].weight)


def test_stacked_layers_are_unstacked():
    params = {"h": {"*": {"fc": {"weight": torch.arange(6.0).reshape(3, 2)}}}, "ln": {"*": {"g": torch.ones(1, 2, 3)}}}
    state = {"h": {"*": {"running_mean": torch.zeros(3, 2), "running_var": torch.ones(3, 2)}}}
    state_dict = interop.to_state_dict(params, state)
    assert torch.equal(state_dict["h.2.fc.weight"], torch.tensor([4.0, 5.0]))
    assert state_dict["ln.0.g"].shape == (2, 3)
    assert state_dict["h.1.num_batches_tracked"].dtype == torch.int64
    assert identical(interop.from_state_dict(state_dict, params, state), (params, state))
    with pytest.raises(interop.StateDictError, match=r"1 missing:\n    h.1.fc.weight"):
        interop.from_state_dict({n: v for n, v in state_dict.items() if n != "h.1.fc.weight"}, params, state)
    nested = {"a": {"*": {"b": {"*": torch.arange(6.0).reshape(2, 3)}}}}
    assert float(interop.to_state_dict(nested)["a.1.b.2"]) == 5
    with pytest.raises(ValueError, match=r"'a.\*.w'.*no axis"):
        interop.to_state_dict({"a": {"*": {"w": torch.ones(())}}})


def test_tied_names():
    params = {"wte": {"weight": torch.randn(3, 2)}}
    tied = {"lm_head.weight": "wte.weight"}
    state_dict = interop.to_state_dict(params, tied=tied)
    assert list(state_dict) == ["wte.weight", "lm_head.weight"]
    assert identical(interop.from_state_dict(state_dict, params, tied=tied)[0], params)
    assert identical(interop.from_state_dict({"lm_head.weight": params["wte"]["weight"]}, params, tied=tied)[0], params)
    assert identical(interop.from_state_dict({"wte.weight": params["wte"]["weight"]}, params, tied=tied)[0], params)
    with pytest.raises(ValueError, match="are tied, but differ"):
        interop.from_state_dict({**state_dict, "lm_head.weight": torch.zeros(3, 2)}, params, tied=tied)
    with pytest.raises(ValueError, match=r"no leaf 'wte.wieght' \(is it 'wte.weight'\?\)"):
        interop.to_state_dict(params, tied={"lm_head.weight": "wte.wieght"})
    with pytest.raises(interop.StateDictError, match="1 unexpected:\n    lm_head.weight"):
        interop.from_state_dict(state_dict, params)


def test_dtypes_devices_and_memory():
    params = {"w": torch.zeros(2, dtype=torch.float16), "n": torch.zeros((), dtype=torch.int32)}
    given = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True), "n": torch.tensor(3)}
    loaded, state = interop.from_state_dict(given, params)
    assert state == {}
    assert (loaded["w"].dtype, loaded["n"].dtype, loaded["w"].requires_grad) == (torch.float16, torch.int32, False)
    same, _ = interop.from_state_dict({"w": params["w"], "n": params["n"]}, params)
    assert same["w"].data_ptr() != params["w"].data_ptr()
    meta = tree.map(lambda leaf: leaf.to("meta"), params)
    assert identical(interop.from_state_dict(given, meta)[0], loaded)


def test_one_error_lists_every_misfit():
    _, params, state, module = layers()
    given = module.state_dict()
    given["0.weights"] = given.pop("0.weight")
    given["3.bias"] = torch.zeros(7)
    given["1.bias"] = torch.zeros(4, dtype=torch.int64)
    before = copy.deepcopy((params, state))
    with pytest.raises(interop.StateDictError) as error:
        interop.from_state_dict(given, params, state)
    report = error.value.report
    assert report.missing == ["0.weight"]
    assert report.unexpected == ["0.weights"]
    assert sorted(name for name, _, _ in report.misshapen) == ["1.bias", "3.bias"]
    assert "0.weight (is it '0.weights'?)" in str(error.value)
    assert "3.bias: expected (2,) float32, got (7,) float32" in str(error.value)
    assert "1.bias: expected (4,) float32, got (4,) int64" in str(error.value)
    with pytest.warns(interop.StateDictWarning, match="0.weights") as warnings:
        loaded_params, loaded_state = interop.from_state_dict(given, params, state, strict=False)
    assert warnings[0].message.report == report
    assert torch.equal(loaded_params["0"]["weight"], params["0"]["weight"])
    assert torch.equal(loaded_params["3"]["bias"], params["3"]["bias"])
    assert torch.equal(loaded_params["3"]["weight"], module[3].weight)
    assert loaded_state["1"]["running_mean"].data_ptr() != state["1"]["running_mean"].data_ptr()
    assert identical((params, state), before)


def test_hints():
    _, params, state, module = layers()
    given = module.state_dict()
    with pytest.raises(interop.StateDictError, match="another architecture"):
        interop.from_state_dict(torch.nn.LSTM(2, 3).state_dict(), params, state)
    with pytest.raises(interop.StateDictError, match=r"removeprefix\('module.'\)"):
        interop.from_state_dict({f"module.{name}": value for name, value in given.items()}, params, state)
    with pytest.raises(interop.StateDictError, match="belong to the state"):
        interop.from_state_dict(given, params)
    with pytest.raises(interop.StateDictError, match="h.attn.bias\nnothing is missing: strict=False leaves"):
        interop.from_state_dict({**given, "h.attn.bias": torch.ones(2)}, params, state)
    with pytest.raises(TypeError, match=r"module.state_dict\(\)"):
        interop.from_state_dict(module, params, state)
    with pytest.raises(TypeError, match=r"pass state_dict\['model'\]"):
        interop.from_state_dict({"model": given, "epoch": 3}, params, state)


def test_what_has_no_names():
    with pytest.raises(TypeError, match="params leaf 'a' is float"):
        interop.to_state_dict({"a": 1.0})
    with pytest.raises(TypeError, match="params leaf 'a.b' is int, expected a tensor"):
        interop.from_state_dict({"a.b": torch.ones(1)}, {"a": {"b": 3}})
    with pytest.raises(ValueError, match=r"two leaves have the name 'a.b'"):
        interop.to_state_dict({"a": {"b": torch.ones(1)}}, {"a": {"b": torch.ones(1)}})
