"""The steps of several processes on CUDA: as many as there are devices, one at least, connected by nccl."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

PROGRAM = """
import sys
import torch
from fnn import data, distributed, losses, models, optim, random, train, tree

mode = sys.argv[1]
mesh = distributed.init(device="cuda")
count = mesh.size()
x, y = random.normal(random.key(1), (16 * count, 12)), torch.arange(16 * count) % 10
net, optimizer = models.mlp((32 * count, 16)), optim.adam(1e-2)
params, _ = net.init(random.key(0, "cuda"), x[:1].cuda())


def loss_fn(params, state, batch, key):
    return losses.cross_entropy(layer(params, batch[0]), batch[1]), (state, {})


def train_on(params, loader, **options):
    step = train.make_step(loss_fn, optimizer, **options)
    train_state = train.TrainState.create(params, optimizer, random.key(2, "cuda"))
    seen = []
    for epoch in range(5):
        for batch in loader.epoch(epoch):
            train_state, metrics = step(train_state, batch)
            seen.append(float(metrics["loss"]))
    assert step.graphs == 1
    return torch.tensor(seen)


layer = net
alone = train_on(params, data.Loader((x, y), 8 * count, device="cuda"))
parts = data.Loader((x, y), 8 * count, device="cuda", shard=mesh)
if mode == "data parallel":
    found = train_on(params, parts, mesh=mesh)
elif mode == "fsdp":
    layer = distributed.fsdp(net, mesh)
    found = train_on(layer.init(random.key(0, "cuda"), x[:1].cuda())[0], parts, mesh=mesh)
else:
    found = train_on(distributed.shard(params, mesh, distributed.fully_sharded), parts)
torch.testing.assert_close(found, alone, rtol=1e-5, atol=0)
"""


@pytest.mark.parametrize("mode", ["data parallel", "fsdp", "placed"])
def test_several_devices_train_as_one_does(tmp_path, mode):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(torch.cuda.device_count())]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command += ["--master-port", str(port), str(program), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
