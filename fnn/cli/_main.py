"""The command line of `fnn`: options here, each command in a file of its own that is imported when it is asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

DOCTOR = """What this machine has for fnn, what of it will be slow or missing, and the cure.

Compiles a small function with torch.compile, so that it takes some seconds. The exit code is 1 where a check says
"fail": training would stop with an error. A "warn" is slower or lacks something; without a working C++ compiler, for
example, compiled steps run eagerly."""

SUMMARY = """The layers of a network with output shapes, parameters and sizes; nothing is computed.

  fnn summary lenet5 --input 1,1,32,32
  fnn summary gpt --input 1,64:int64 --set layers=6 --set heads=6 --set width=384 --flops
  fnn summary torchvision.models:resnet18 --input 1,3,224,224"""

TRAIN = """Run one of the example trainers, those of the folder examples/ of the project.

  fnn train --list
  fnn train image --help
  fnn train image --model mlp --epochs 5 --out out/mlp

Each is one file; --list says where they lie. Copy one to start your own project."""

BENCH = """How fast this machine is, in some seconds.

mlp and lenet5 time one training step: fnn's compiled step against an eager torch.nn module with fused Adam, in turns.
matmul shows the kernel that fnn.ops chooses for some products, and its time against torch.matmul."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default those of the process; returns its exit code.

    Example:
        >>> from fnn import cli
        >>> cli.main(["summary", "mlp", "--input", "1,64", "--set", "hidden=32,16"])
        --------------------------------------------------------------------------
        Layer (type)                            Output Shape              Param #
        ==========================================================================
        Flatten-1                                   [-1, 64]                    0
        Linear-2                                    [-1, 32]                2,080
        ReLU-3                                      [-1, 32]                    0
        Linear-4                                    [-1, 16]                  528
        ReLU-5                                      [-1, 16]                    0
        Linear-6                                    [-1, 10]                  170
        ==========================================================================
        Total params: 2,778
        Trainable params: 2,778
        Non-trainable params: 0
        --------------------------------------------------------------------------
        Input size (MB): 0.000244
        Forward/backward pass size (MB): 0.001297
        Params size (MB): 0.010597
        Estimated Total Size (MB): 0.012138
        --------------------------------------------------------------------------
        0
    """
    given = parser().parse_args(arguments)
    if given.command == "train":
        from fnn.cli._train import run

        return run(given)  # what a trainer raises is shown as it is
    try:
        if given.command == "doctor":
            from fnn.cli._doctor import run
        elif given.command == "summary":
            from fnn.cli._summary import run
        else:
            from fnn.cli._bench import run
        return run(given)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"fnn {given.command}: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The options of every command."""
    root = argparse.ArgumentParser(
        prog="fnn", description="Functional deep learning for PyTorch: `fnn COMMAND --help` says what a command does."
    )
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=description.splitlines()[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    train = add("train", TRAIN)
    train.add_argument("--list", action="store_true", help="the trainers, and where their files lie")
    train.add_argument("name", nargs="?", help="which trainer, for example image")
    train.add_argument("options", nargs=argparse.REMAINDER, help="what follows is the trainer's own")

    summary = add("summary", SUMMARY)
    summary.add_argument("model", help="a name in fnn.models, or package.module:function giving a layer or a module")
    summary.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="SHAPE[:DTYPE]",
        help="sizes of an input with its batch axis, 1,1,32,32, and a dtype such as int64; again for a second input",
    )
    summary.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a keyword argument of the model, classes=100"
    )
    summary.add_argument("--flops", action="store_true", help="count the operations of one example's forward pass")

    bench = add("bench", BENCH)
    bench.add_argument("name", nargs="?", choices=["mlp", "lenet5", "matmul"], help="both training steps by default")
    bench.add_argument("--device", default="auto", help="cpu, cuda, ...; auto takes an accelerator where there is one")
    bench.add_argument("--out", metavar="FILE", help="write the numbers as JSON, too")

    doctor = add("doctor", DOCTOR)
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return root
