"""The command `fnn`: what this machine has, the table of a network, the example trainers, a short benchmark."""

from fnn.cli._main import main as main
