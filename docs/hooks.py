"""What the site's build does beyond mkdocs: it refuses public names without a docstring, and shows formulas as text."""

import importlib
import inspect
import re
import types

import griffe

PACKAGES = ("fnn", "triton_kernels") + tuple(
    f"fnn.{name}"
    for name in ("nn", "losses", "optim", "train", "data", "models", "interop", "diff", "ops", "random", "tree")
)


def undocumented(module: types.ModuleType) -> list[str]:
    """Public functions and classes of a module without a docstring of their own, and methods without any."""
    found = []
    for name, value in vars(module).items():
        ours = getattr(value, "__module__", "").partition(".")[0] in ("fnn", "triton_kernels")
        if name.startswith("_") or not callable(value) or not ours:
            continue
        path = f"{module.__name__}.{name}"
        generated = inspect.isclass(value) and (value.__doc__ or "").startswith(f"{value.__name__}(")
        if not inspect.getdoc(value) or generated:
            found.append(path)
        if inspect.isclass(value):
            found += [f"{path}.{method}" for method in _methods(value) if not inspect.getdoc(getattr(value, method))]
    return found


def _methods(value: type) -> list[str]:
    def own(member: object) -> bool:  # a function that is a field's default belongs to no class
        name = getattr(member, "__qualname__", "")
        return isinstance(member, property) or (inspect.isroutine(member) and name.startswith(value.__name__))

    return [name for name, member in vars(value).items() if not name.startswith("_") and own(member)]


def on_config(config):
    """Fail the build where a public name has no docstring."""
    missing = [path for name in PACKAGES for path in undocumented(importlib.import_module(name))]
    if missing:
        raise SystemExit(f"public names without a docstring: {', '.join(missing)}")
    return config


class Mathematics(griffe.Extension):
    """Docstrings write formulas in reStructuredText; the pages show them as code, without a script from elsewhere."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)


def shown(text: str) -> str:
    """`:math:` and `.. math::` as code.

    Example:
        >>> shown(":math:`x^2`")
        '`x^2`'
    """
    text = re.sub(r":math:`([^`]*)`", r"`\1`", text)
    return re.sub(
        r"^\.\. math::[ ]*(.*)\n((?:\n|[ ]+.*\n?)*)",
        lambda match: _block(match[1] + "\n" + match[2]),
        text,
        flags=re.MULTILINE,
    )


def _block(formula: str) -> str:
    return "```latex\n" + inspect.cleandoc(formula).strip() + "\n```\n\n"
