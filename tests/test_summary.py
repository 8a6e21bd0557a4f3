"""fnn.summary: rows, counts and sizes, nothing computed."""

import io

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
    assert summary.rows[3].type == "Conv2d"
    assert "Conv2d-4 [-1, 16, 10, 10] 2,416" in " ".join(str(summary).split())


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


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_print_is_plain_in_a_file_and_rich_in_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    summary = fnn.summary(models.mlp((8,)), torch.zeros(1, 4))
    file, terminal = io.StringIO(), Terminal()
    summary.print(file)
    summary.print(terminal)
    assert file.getvalue() == f"{summary}\n"
    assert "\x1b[" in terminal.getvalue()
    assert "1.weight" not in terminal.getvalue()
    assert "Linear(8)" in terminal.getvalue()


def test_state_and_flops():
    net = nn.Sequential(nn.Conv2d(4, 3, bias=False), nn.BatchNorm(), nn.relu, nn.Flatten(), nn.Linear(5))
    x = torch.zeros(2, 3, 6, 6)
    summary = fnn.summary(net, x, flops=True)
    assert summary.state == 8
    assert summary.flops == 2 * (16 * 4 * 27) + 2 * (64 * 5)
    assert "State values: 8\nForward FLOPs of one example: 4,096" in str(summary)
    assert fnn.summary(net, x).flops is None


def test_a_recurrent_layer_hands_on_its_output_without_the_carry():
    net = nn.Sequential(nn.Repeat(nn.LSTM(3), 2), nn.Residual(nn.LSTM(3)), nn.Linear(2))
    summary = fnn.summary(net, torch.zeros(1, 5, 3))
    assert [row.output_shape for row in summary.rows] == [(-1, 5, 3)] * 3 + [(-1, 5, 2)]
    assert summary.parameters == 3 * 4 * (2 * 9 + 2 * 3) + 8


def test_named_inputs():
    net = nn.Block(lambda m, x, mask: m.fc(x) * mask, fc=nn.Linear(2))
    assert fnn.summary(net, torch.zeros(3, 4), mask=torch.ones(3, 1)).parameters == 10


def test_the_table_of_the_notes():
    net = nn.Sequential(
        nn.Embedding(10_000, 3, padding_idx=1),
        nn.Sequential(
            nn.Block(lambda m, x: m.conv_1(x.mT), conv_1=nn.Conv1d(16, 5)),
            nn.MaxPool1d(2),
            nn.relu,
            nn.Conv1d(128, 2),
            nn.MaxPool1d(2),
            nn.relu,
        ),
        nn.Sequential(nn.Flatten(), nn.Linear(1)),
    )
    assert (
        str(fnn.summary(net, torch.zeros(1, 200, dtype=torch.int64), frozen="0.*"))
        == """\
--------------------------------------------------------------------------
Layer (type)                            Output Shape              Param #
==========================================================================
Embedding-1                             [-1, 200, 3]               30,000
Conv1d-2                               [-1, 16, 196]                  256
MaxPool1d-3                             [-1, 16, 98]                    0
ReLU-4                                  [-1, 16, 98]                    0
Conv1d-5                               [-1, 128, 97]                4,224
MaxPool1d-6                            [-1, 128, 48]                    0
ReLU-7                                 [-1, 128, 48]                    0
Flatten-8                                 [-1, 6144]                    0
Linear-9                                     [-1, 1]                6,145
==========================================================================
Total params: 40,625
Trainable params: 10,625
Non-trainable params: 30,000
--------------------------------------------------------------------------
Input size (MB): 0.000763
Forward/backward pass size (MB): 0.287788
Params size (MB): 0.154972
Estimated Total Size (MB): 0.443523
--------------------------------------------------------------------------"""
    )
