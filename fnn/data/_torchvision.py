"""torchvision, imported where it is used, and made to import where its compiled operators do not load."""

from __future__ import annotations

import functools
import sys
from types import ModuleType

import torch

_definitions: list[torch.library.Library] = []  # a definition lasts as long as its library object


@functools.cache
def torchvision() -> ModuleType:
    """The torchvision module.

    Its wheel on PyPI is built for CUDA. Beside a CPU build of torch its compiled part does not load, and the whole
    package then fails to import, because it describes two operators that nobody has defined. Defining their names
    cures that; they are detection operators without a kernel here, and calling one still says so.

    Raises `ImportError` naming the extra to install where torchvision is absent.
    """
    try:
        return _import()
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    # What the failed attempt left half made. Tried first, because torchvision's own library cannot load after ours.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _definitions.append(library := torch.library.Library("torchvision", "DEF"))
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return _import()


def _import() -> ModuleType:
    try:
        import torchvision
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ImportError('torchvision is not installed; pip install "fnn[examples]" brings it') from error
    return torchvision
