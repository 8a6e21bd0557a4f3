"""`.pth` files, as `torch.save` writes them, of tensors only: `save_pth`, `load_pth`."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnn._files import check_readable, replace_file
from fnn.interop._state_dict import to_state_dict

Tree = Any


def save_pth(tree: Tree, path: str | os.PathLike[str]) -> None:
    """Write a state_dict, or a tree under its `to_state_dict` names, into a file that `torch.load` reads.

    tree: tensors by name, as from `to_state_dict(params, state)` or `module.state_dict()`, or nested dicts of them.
    Tensors are stored from the CPU; one that appears under several names is stored once.
    path: the file. It is written under a temporary name beside it, flushed to disk, then renamed, so an
        interrupted save leaves the file that was there before as it was.

    Raises TypeError that names the leaf that is no tensor, ValueError for one on the meta device, OSError that names
    the file where it cannot be written.

    Example:
        >>> import tempfile
        >>> from fnn import interop
        >>> path = tempfile.mkdtemp() + "/model.pth"
        >>> interop.save_pth({"fc": {"weight": torch.ones(2)}}, path)
        >>> torch.load(path)
        {'fc.weight': tensor([1., 1.])}
    """
    saved: dict[tuple[Any, ...], Tensor] = {}
    named: dict[str, Tensor] = {}
    for name, leaf in to_state_dict(tree).items():
        if leaf.is_meta:
            raise ValueError(f"save_pth: leaf {name!r} is on the meta device and has no data to save")
        same = (leaf.data_ptr(), leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.device)
        # A part of a larger tensor would take all of that into the file.
        named[name] = saved.setdefault(same, _alone(leaf)) if leaf.numel() else _alone(leaf)
    replace_file("save_pth", path, lambda temporary: torch.save(named, temporary), (OSError, RuntimeError))


def load_pth(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Any:
    """What a `.pth` file holds, most often a state_dict for `from_state_dict`.

    The file is read with ``weights_only=True``: tensors, numbers, strings and containers of them, and no code is run.
    The check sums of the archive are compared.
    device: where the tensors go, the CPU by default.

    Raises errors that name the file: `OSError` where it is missing or may not be read, and `ValueError` where it is
    damaged, cut short, no `.pth` file, or asks for code to be run.

    Example:
        >>> import tempfile
        >>> from fnn import interop
        >>> path = tempfile.mkdtemp() + "/model.pth"
        >>> torch.save(torch.nn.Linear(2, 1).state_dict(), path)
        >>> {name: tuple(value.shape) for name, value in interop.load_pth(path).items()}
        {'weight': (1, 2), 'bias': (1,)}
    """
    path = check_readable("load_pth", path)
    torch.empty(0, device=device)  # a device that is not there shows here, not as a file that cannot be read
    try:
        if zipfile.is_zipfile(path):  # files from before torch 1.6 are not, and have no check sums
            with zipfile.ZipFile(path) as archive:
                if (part := archive.testzip()) is not None:
                    raise _damaged(path, f"the check sum of {part} is wrong")
        return torch.load(path, map_location=device or "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), None)
        if asked is None:
            raise _damaged(path, "its pickle cannot be read") from error
        raise ValueError(
            f"load_pth: {path} holds more than tensors and containers, and reading that may run any code: {asked} "
            "If you trust where it comes from, have its author save the state_dict alone"
        ) from error
    except OSError as error:
        raise OSError(error.errno, f"load_pth: cannot read {path}: {error}") from error
    except ValueError:
        raise
    except Exception as error:  # a damaged file may fail anywhere in the readers of zip and pickle
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _alone(leaf: Tensor) -> Tensor:
    leaf = leaf.detach().cpu().resolve_conj().resolve_neg()
    whole = leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size()
    return leaf if whole else leaf.clone(memory_format=torch.contiguous_format)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"load_pth: {path} is damaged, cut short or no .pth file ({reason}); take another copy, or write it again with "
        "save_pth"
    )
