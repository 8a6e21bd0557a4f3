"""Generated data sets in MNIST's IDX format."""

import struct

import numpy as np


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root, source="MNIST", train=20, test=10, side=28):
    """The four files under ``root/source/raw``: noise, labelled 0 to 9 in turn."""
    draw = np.random.default_rng(0)
    raw = root / source / "raw"
    for name, size in (("train", train), ("t10k", test)):
        write_idx(raw / f"{name}-images-idx3-ubyte", draw.integers(0, 256, (size, side, side)))
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(size) % 10)
    return raw
