"""fnn.summary: rows, counts and sizes, nothing computed."""

import pytest
import torch

import fnn
from fnn import models, nn


def test_lenet_rows_and_counts():
    summary = fnn.summary(models.lenet5(), torch.zeros(1, 1, 32, 32))
    assert [(row.path, row.output_shape, row.parameters) for row in summary.rows] == [
        ("conv1", (-1, 6, 28, 28), 156),
        ("pool1", (-1, 6, 14, 14), 0),
        ("relu1", (-1, 6, 14, 14), 0),
        ("conv2", (-1, 16, 10, 10), 2416),
        ("pool2", (-1, 16, 5, 5), 0),
        ("relu2", (-1, 16, 5, 5), 0),
        ("flatten", (-1, 400), 0),
        ("fc1", (-1, 120), 48120),
        ("relu3", (-1, 120), 0),
        ("fc2", (-1, 84), 10164),
        ("relu4", (-1, 84), 0),
        ("fc3", (-1, 10), 850),
    ]
    assert summary.parameters == summary.trainable == 61706
    assert summary.parameters_mb == 61706 * 4 / 2**20
    assert summary.input_mb == 1024 * 4 / 2**20
    table = str(summary)
    assert "conv2 Conv2d(16, 5) [-1, 16, 10, 10] 2,416" in " ".join(table.split())
    assert "parameters: 61,706 (trainable 61,706, frozen 0)" in table


def test_frozen_leaves_are_counted_apart():
    summary = fnn.summary(models.mlp((8,)), torch.zeros(1, 4), frozen="1.*")
    assert (summary.trainable, summary.frozen) == (90, 40)
    with pytest.raises(ValueError, match=r"no path matches '7\.\*'"):
        fnn.summary(models.mlp((8,)), torch.zeros(1, 4), frozen="7.*")


def test_nested_paths_shared_layers_and_state():
    block = nn.Block(lambda m, x: m.fc(m.fc(x)), fc=nn.Linear(4))
    net = nn.Sequential(nn.Residual(nn.Sequential(nn.Linear(4), nn.BatchNorm())), block)
    summary = fnn.summary(net, torch.zeros(2, 4))
    assert [row.path for row in summary.rows] == ["0.body.0", "0.body.1", "1.fc", "1.fc"]
    assert [row.parameters for row in summary.rows] == [20, 8, 20, 0]
    assert summary.parameters == 48


def test_a_large_network_costs_nothing():
    net = nn.Sequential(nn.Linear(100_000), nn.Linear(100_000))
    assert fnn.summary(net, torch.empty(1, 100_000, device="meta")).parameters == 20_000_200_000


def test_it_needs_an_input():
    with pytest.raises(ValueError, match=r"fnn\.summary\(net, x\)"):
        fnn.summary(models.mlp())
    with pytest.raises(ValueError, match="layer 'conv1'"):
        fnn.summary(models.lenet5(), torch.zeros(1, 32))
