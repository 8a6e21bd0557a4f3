"""Trees as torch's flat `state_dict`, and back: `to_state_dict`, `from_state_dict`."""

from __future__ import annotations

import difflib
import itertools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fnn import tree

Params = dict[str, Any]
State = dict[str, Any]
Tied = Mapping[str, str]

STACK = "*"
COUNT = "num_batches_tracked"
SHOWN = 20


def to_state_dict(params: Params, state: State | None = None, *, tied: Tied | None = None) -> dict[str, Tensor]:
    """The leaves of `params` and `state` by torch's names, as `module.load_state_dict` takes them.

    params, state: nested dicts of tensors. A layer that is repeated in one stack, under the key ``*``, is unstacked:
    the leaf ``h.*.weight`` of shape (n, ...) becomes ``h.0.weight`` to ``h.n-1.weight``. Beside `running_mean` and
    `running_var` comes torch's `num_batches_tracked`, zero, where the state has none.
    tied: second names of leaves, such as ``{"lm_head.weight": "transformer.wte.weight"}``.
    Returns tensors that need no gradient and share memory with the leaves: a donating step changes them.

    Raises TypeError for a leaf that is no tensor, ValueError that names the path where two leaves get one name, a
    stack has no axis to unstack, or a tied name does not exist.

    Example:
        >>> from fnn import interop
        >>> list(interop.to_state_dict({"fc": {"weight": torch.ones(1, 2), "bias": torch.ones(1)}}))
        ['fc.weight', 'fc.bias']
    """
    found: dict[str, Tensor] = {}
    for which, given in (("params", params), ("state", {} if state is None else state)):
        for path, leaf in tree.paths(given).items():
            if not isinstance(leaf, Tensor):
                raise TypeError(f"to_state_dict: {which} leaf {path!r} is {type(leaf).__name__}, expected a tensor")
            for name, index in _names(path, leaf):
                if name in found:
                    raise ValueError(f"to_state_dict: two leaves have the name {name!r}; the second is in {which}")
                found[name] = leaf.detach()[index]
    named: dict[str, Tensor] = {}
    for name, value in found.items():
        named[name] = value
        if (count := _count_beside(name, found)) is not None:
            named[count] = torch.zeros((), dtype=torch.int64, device=value.device)
    for second, first in (tied or {}).items():
        _check_tied("to_state_dict", second, first, found)
        named[second] = found[first]
    return named


def from_state_dict(
    state_dict: Mapping[str, Tensor],
    params: Params,
    state: State | None = None,
    *,
    strict: bool = True,
    tied: Tied | None = None,
) -> tuple[Params, State]:
    """`(params, state)` of the structure, shapes, dtypes and devices of those given, with the values of `state_dict`.

    state_dict: tensors by name, from `module.state_dict()`, `load_pth` or `to_state_dict`, or nested dicts of them,
    from `load_safetensors`. `num_batches_tracked` is skipped where the state has none.
    params, state: examples; they are not changed, and may be on the meta device, from `init` with a meta key: the
    values then stay where they are. Without `state`, the one returned is ``{}``.
    strict: whether names that are missing, unexpected or of another shape or number kind raise `StateDictError`,
    which lists them all. If not, what fits is taken, other leaves keep the values that they have, and a
    `StateDictWarning` lists the rest.
    tied: second names that the state_dict has for one leaf, as in `to_state_dict`; their values must be equal.

    Example:
        >>> from fnn import interop
        >>> params = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
        >>> params, _ = interop.from_state_dict(torch.nn.Linear(2, 1).state_dict(), params)
        >>> params["weight"].shape
        torch.Size([1, 2])
    """
    if not isinstance(state_dict, Mapping):
        hint = "; give module.state_dict()" if isinstance(state_dict, torch.nn.Module) else ""
        raise TypeError(f"from_state_dict: state_dict must be a dict of tensors, got {type(state_dict).__name__}{hint}")
    given: dict[str, Any] = tree.paths(dict(state_dict))
    for name, value in given.items():
        if not isinstance(value, Tensor):
            nested = [key for key, part in state_dict.items() if isinstance(part, Mapping)]
            hint = f"; a checkpoint holds its state_dict under a key: pass state_dict[{nested[0]!r}]" if nested else ""
            raise TypeError(f"from_state_dict: {name!r} is {type(value).__name__}, expected a tensor{hint}")
    for which, part in (("params", params), ("state", state)):
        for path, leaf in tree.paths(part or {}).items():
            if not isinstance(leaf, Tensor):
                raise TypeError(f"from_state_dict: {which} leaf {path!r} is {type(leaf).__name__}, expected a tensor")
    structure = tree.flatten((params, {} if state is None else state))[1]
    paths = [
        (path, leaf) for part in (params, {} if state is None else state) for path, leaf in tree.paths(part).items()
    ]
    wanted = {name: leaf[index] for path, leaf in paths for name, index in _names(path, leaf)}
    _untie(given, tied or {}, wanted)
    for name in list(given):
        if name not in wanted and name.rpartition(".")[2] == COUNT:
            del given[name]
    report = _compare(given, wanted)
    if report.missing or report.unexpected or report.misshapen:
        if strict:
            raise StateDictError(report)
        warnings.warn(StateDictWarning(report), stacklevel=2)
    refused = {name for name, _, _ in report.misshapen}
    leaves = [_loaded(path, leaf, given, refused) for path, leaf in paths]
    return tree.unflatten(structure, leaves)


class Report(NamedTuple):
    """Where a state_dict and a tree differ: names, and for other shapes or dtypes (name, expected, found)."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[tuple[str, str, str]]
    matched: int

    def __str__(self) -> str:
        lines = []
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            others = self.unexpected if what == "missing" else []
            shown = [f"{name}{_near(name, others)}" for name in names[:SHOWN]]
            lines += _listed(what, [*shown, *names[SHOWN:]])
        shapes = [f"{name}: expected {expected}, got {got}" for name, expected, got in self.misshapen]
        lines += _listed("of another shape or kind", shapes)
        return "\n".join([*lines, *self._hint()])

    def _hint(self) -> list[str]:
        prefixes = {name.removesuffix(wanted) for name in self.unexpected for wanted in self.missing}
        for prefix in sorted(prefix for prefix in prefixes if prefix.endswith(".")):
            if {f"{prefix}{name}" for name in self.missing} <= set(self.unexpected):
                return [f"names begin with {prefix!r}: {{name.removeprefix({prefix!r}): value for name, value in ...}}"]
        if self.matched == 0 or len(self.missing) + len(self.misshapen) > self.matched:
            return ["is this the state_dict of another architecture?"]
        if self.unexpected and all(name.rpartition(".")[2].startswith("running_") for name in self.unexpected):
            return ["the running statistics belong to the state: from_state_dict(state_dict, params, state)"]
        return []


class StateDictError(ValueError):
    """A state_dict that does not fit: `report` has the names in lists."""

    def __init__(self, report: Report):
        only_more = not report.missing and not report.misshapen
        cure = "\nnothing is missing: strict=False leaves the unexpected ones out" if only_more else ""
        super().__init__(f"from_state_dict: the state_dict does not fit\n{report}{cure}")
        self.report = report


class StateDictWarning(UserWarning):
    """What `from_state_dict` left out with strict=False: `report` has the names in lists."""

    def __init__(self, report: Report):
        super().__init__(f"from_state_dict: these were left as they are\n{report}")
        self.report = report


def _names(path: str, leaf: Tensor) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Torch's names for the leaf at `path`, each with the index of its part: one for every layer of a stack."""
    parts = path.split(".")
    depth = parts.count(STACK)
    if leaf.dim() < depth:
        raise ValueError(f"leaf {path!r} of shape {tuple(leaf.shape)} has no axis for each {STACK!r} in its path")
    for index in itertools.product(*map(range, leaf.shape[:depth])):
        numbers = iter(index)
        yield ".".join(str(next(numbers)) if part == STACK else part for part in parts), index


def _count_beside(name: str, found: Mapping[str, Tensor]) -> str | None:
    """The name of the count that torch keeps after these running statistics, if they have none."""
    owner, _, last = name.rpartition(".")
    prefix = f"{owner}." if owner else ""
    if last != "running_var" or f"{prefix}running_mean" not in found or f"{prefix}{COUNT}" in found:
        return None
    return f"{prefix}{COUNT}"


def _check_tied(who: str, second: str, first: str, found: Mapping[str, Any]) -> None:
    if first not in found:
        raise ValueError(f"{who}: tied={{{second!r}: {first!r}}}, but there is no leaf {first!r}{_near(first, found)}")
    if second in found:
        raise ValueError(f"{who}: tied={{{second!r}: {first!r}}}, but {second!r} is a leaf of its own")


def _untie(given: dict[str, Tensor], tied: Tied, wanted: Mapping[str, Tensor]) -> None:
    """Take the second names out of `given`, after a check that they say the same as the first."""
    for second, first in tied.items():
        _check_tied("from_state_dict", second, first, wanted)
        if second not in given:
            continue
        value = given.pop(second)
        if not torch.equal(given.setdefault(first, value), value):
            raise ValueError(
                f"from_state_dict: {second!r} and {first!r} are tied, but differ in the state_dict; "
                "it comes from a model whose weights are not tied"
            )


def _compare(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Report:
    common = [name for name in wanted if name in given]
    misshapen = [
        (name, _show(wanted[name]), _show(given[name]))
        for name in common
        if given[name].shape != wanted[name].shape or _kind(given[name]) != _kind(wanted[name])
    ]
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    return Report(missing, unexpected, misshapen, len(common) - len(misshapen))


def _loaded(path: str, leaf: Tensor, given: Mapping[str, Tensor], refused: set[str]) -> Tensor:
    """The leaf at `path` with the values that `given` has for it."""
    values = [
        leaf.detach()[index] if name in refused or name not in given else given[name].detach()
        for name, index in _names(path, leaf)
    ]
    device = values[0].device if values and leaf.is_meta else leaf.device
    values = [value.to(device, leaf.dtype, copy=True) for value in values]
    return values[0] if STACK not in path.split(".") else torch.stack(values).reshape(leaf.shape)


def _show(value: Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _kind(value: Tensor) -> str:
    """Numbers of one kind convert into each other without losing what they are."""
    if value.dtype == torch.bool:
        return "bool"
    return "complex" if value.is_complex() else "float" if value.is_floating_point() else "int"


def _listed(what: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = [f"    ... and {len(entries) - SHOWN} more"] if len(entries) > SHOWN else []
    return [f"  {len(entries)} {what}:", *(f"    {entry}" for entry in entries[:SHOWN]), *more]


def _near(name: str, others: Any) -> str:
    near = difflib.get_close_matches(name, list(others), n=1)
    return f" (is it {near[0]!r}?)" if near else ""
