"""`interop.export` / `export_onnx`: the same numbers from a program that needs no fnn."""

import os

import pytest
import torch

import triton_kernels
from fnn import interop, nn, ops, random


def network():
    net = nn.Sequential(nn.Conv2d(4, 3), nn.BatchNorm(), nn.relu, nn.Flatten(), nn.Dropout(), nn.Linear(2))
    x = torch.randn(3, 2, 6, 6)
    params, state = net.init(random.key(0), x)
    _, state = net.apply(params, state, x, key=random.key(1), train=True)
    return net, params, state, x


def converted():
    module = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.ReLU(inplace=True), torch.nn.Flatten(),
        torch.nn.LayerNorm(48), torch.nn.Linear(48, 2),
    )  # fmt: skip
    return *interop.from_module(module), torch.randn(3, 2, 6, 6)


def test_a_small_layer(tmp_path):
    net = nn.Linear(2)
    params, _ = net.init(random.key(0), torch.zeros(1, 3))
    x = torch.randn(4, 3)
    program = interop.export(net, params, x, path=tmp_path / "x.pt2")
    assert list(program.state_dict) == ["params.weight", "params.bias"]
    torch.testing.assert_close(torch.export.load(tmp_path / "x.pt2").module()(x), net(params, x))
    assert os.listdir(tmp_path) == ["x.pt2"]
    assert ops.explain(ops.softmax, x) != 'PyTorch: fnn.ops.use("torch")'


@pytest.mark.slow
@pytest.mark.parametrize("make", [network, converted], ids=lambda make: make.__name__)
def test_any_batch_size_and_only_torchs_operators(make, tmp_path):
    net, params, state, x = make()
    program = interop.export(net, params, x, state=state, path=tmp_path / "x.pt2", dynamic_batch=True)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(target.startswith(("aten.", "<built-in")) for target in targets)
    other = torch.randn(5, 2, 6, 6)
    torch.testing.assert_close(
        torch.export.load(tmp_path / "x.pt2").module()(other), net(params, other, state=state), rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("make", [network, converted], ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore")
def test_onnx_runtime_computes_the_same(make, tmp_path):
    pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    net, params, state, x = make()
    path = tmp_path / "x.onnx"
    path.write_bytes(b"before")
    interop.export_onnx(net, params, x, path=path, state=state, dynamic_batch=True)
    assert os.listdir(tmp_path) == ["x.onnx"]
    session = runtime.InferenceSession(path)
    other = torch.randn(5, 2, 6, 6)
    (y,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(params, other, state=state), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported(tmp_path):
    kernel = nn.Sequential(lambda x: triton_kernels.softmax(x, -1))
    with pytest.raises(ValueError, match=r"export: the layer calls triton_kernels.softmax.*call fnn.ops"):
        interop.export(kernel, {}, torch.zeros(2, 3), path=tmp_path / "x.pt2")
    net = nn.Linear(2, bias=False)
    params, _ = net.init(random.key(0), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="two rows or more"):
        interop.export(net, params, torch.zeros(1, 3), dynamic_batch=True)
    with pytest.raises(ValueError, match="pass them by position"):
        interop.export(net, params, torch.zeros(2, 3), scale=torch.ones(2), dynamic_batch=True)
    with pytest.raises(ValueError, match=r"x.onnx would hold a program of torch.export.*use export_onnx"):
        interop.export(net, params, torch.zeros(2, 3), path=tmp_path / "x.onnx")
    with pytest.raises(FileNotFoundError, match="export: cannot write"):
        interop.export(net, params, torch.zeros(2, 3), path=tmp_path / "missing" / "x.pt2")
    assert os.listdir(tmp_path) == []
