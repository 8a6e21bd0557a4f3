"""What the site's build does beyond mkdocs: it refuses public names without a docstring, and shows formulas as text."""

import importlib
import inspect
import re
import types

import griffe

ROOMS = ("nn", "losses", "optim", "train", "data", "models", "interop", "diff", "ops", "random", "tree")
PACKAGES = ("fnn", "triton_kernels", *(f"fnn.{room}" for room in ROOMS))


def public(module: types.ModuleType) -> dict[str, object]:
    """The functions and classes that a module offers under names of its own."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", "").partition(".")[0] in ("fnn", "triton_kernels")
    }


def undocumented(module: types.ModuleType) -> list[str]:
    """Public functions and classes of a module without a docstring of their own, and methods without any."""
    found = []
    for name, value in public(module).items():
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


def on_page_markdown(markdown, page, config, files):
    """Lists the public names of a module on its page; those of `fnn` itself that have no other page."""
    if not page.file.src_uri.startswith("api/"):
        return markdown
    room = page.file.name
    module = importlib.import_module("fnn" if room == "fnn" else f"fnn.{room}")
    names = public(module)
    if room == "fnn":
        names = {name: value for name, value in names.items() if not hasattr(importlib.import_module("fnn.diff"), name)}
    entries = [f"::: {module.__name__}.{name}\n    options:\n      show_root_heading: true\n" for name in sorted(names)]
    return "\n".join([markdown, *entries])


class Docstrings(griffe.Extension):
    """Docstrings as the site shows them."""

    def on_instance(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)


def shown(text: str) -> str:
    """A docstring in Markdown: formulas as code, without a script from elsewhere, arguments as a list.

    Example:
        >>> shown("The square :math:`x^2`.\\n\\nx: a number\\ny: another\\n")
        'The square `x^2`.\\n\\n- `x`: a number\\n- `y`: another\\n'
    """
    text = re.sub(r":math:`([^`]*)`", r"`\1`", text)
    text = re.sub(
        r"^\.\. math::[ ]*(.*)\n((?:\n|[ ]+.*\n?)*)",
        lambda match: _block(match[1] + "\n" + match[2]),
        text,
        flags=re.MULTILINE,
    )
    text = re.sub(r"^Example:", "Examples:", text, flags=re.MULTILINE)
    return "\n\n".join(_arguments(paragraph) for paragraph in text.split("\n\n"))


def _block(formula: str) -> str:
    return "```latex\n" + inspect.cleandoc(formula).strip() + "\n```\n\n"


def _arguments(paragraph: str) -> str:
    """Lines `name: what it is` as a list; other paragraphs as they are."""
    argument = re.compile(r"([a-z_][\w, ]*): ")
    lines = [line for line in paragraph.splitlines() if line and not line.startswith(" ")]
    if not lines or not all(argument.match(line) for line in lines):
        return paragraph
    return re.sub(rf"^{argument.pattern}", r"- `\1`: ", paragraph, flags=re.MULTILINE)
