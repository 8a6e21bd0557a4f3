"""Text as tokens: characters or bytes."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TextDataset:
    """A text as tokens, its end held out.

    train, test: (n,) int64, the tokens of the text's beginning and of its end
    vocabulary: the characters in the order of their tokens, a plain string for a JSON file; None where tokens are
        bytes

    >>> text = TextDataset("three", torch.tensor([0, 1]), torch.tensor([2]), "abc")
    >>> text.encode("cab"), text.decode([0, 1])
    (tensor([2, 0, 1]), 'ab')
    """

    name: str
    train: Tensor
    test: Tensor
    vocabulary: str | None

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are: the classes that a model tells apart."""
        return 256 if self.vocabulary is None else len(self.vocabulary)

    def encode(self, text: str) -> Tensor:
        """The tokens of `text`, (n,) int64; raises `ValueError` naming a character that the vocabulary lacks."""
        if self.vocabulary is None:
            return _bytes(text.encode())
        if not text:
            return torch.empty(0, dtype=torch.int64)
        known, wanted = _codes(self.vocabulary), _codes(text)
        order = known.argsort()
        tokens = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
        if len(wrong := np.flatnonzero(known[tokens] != wanted)):
            raise ValueError(
                f"encode: {text[wrong[0]]!r} at position {wrong[0]} is none of the {len(known)} characters of the "
                f"vocabulary, that is of the text {self.name}; leave it out, or take tokens='bytes', which know all"
            )
        return torch.from_numpy(tokens).long()

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of tokens (n,); bytes that are no UTF-8 become U+FFFD. Raises `ValueError` for other tokens."""
        tokens = torch.as_tensor(tokens).cpu()
        if tokens.ndim != 1 or (len(tokens) and tokens.is_floating_point()):
            raise ValueError(
                f"decode: tokens have shape {tuple(tokens.shape)} and dtype {tokens.dtype}, expected integers in one "
                f"row, (n,)"
            )
        numbers = [int(token) for token in tokens.tolist()]
        for position, token in enumerate(numbers):
            if not 0 <= token < self.vocabulary_size:
                raise ValueError(
                    f"decode: the token at position {position} is {token}, expected 0 to {self.vocabulary_size - 1}"
                )
        if self.vocabulary is None:
            return bytes(numbers).decode(errors="replace")
        return "".join(self.vocabulary[token] for token in numbers)

    def __repr__(self) -> str:
        kind = "bytes" if self.vocabulary is None else f"characters, {len(self.vocabulary)} different ones"
        return f"TextDataset({self.name}: {len(self.train)} training and {len(self.test)} test {kind})"


def text(
    path: str | os.PathLike[str] | None = None, *, tokens: str = "characters", test_fraction: float = 0.1
) -> TextDataset:
    """A text file as tokens; without a path, Python's language reference, which comes with Python.

    path: a text in UTF-8, its line ends made "\\n"; for bytes any file, read as it is. None takes the topics of
        Python's `help`, about 370,000 characters of English with examples in Python 3.11, each paragraph once; other
        versions of Python have another text
    tokens: "characters", numbered in the order of their code points, or "bytes", which are 0 to 255
    test_fraction: the share of the text's end that is held out, between 0 and 1
    returns train and test tokens, (n,) int64. The vocabulary is that of the whole text, so the test part has no
        character without a token

    Raises `FileNotFoundError` for a path without a file, `ValueError` for a file that is not UTF-8 or too short and
    for bad arguments, `ImportError` where the text that comes with Python is absent.

    Example:
        >>> reference = text()
        >>> reference.decode(reference.encode("def f(x):"))
        'def f(x):'
    """
    if tokens not in ("characters", "bytes"):
        raise ValueError(f"text: tokens is {tokens!r}, expected 'characters' or 'bytes'")
    if not 0 < test_fraction < 1:
        raise ValueError(f"text: test_fraction is {test_fraction!r}, expected between 0 and 1, such as 0.1")
    name, content = _reference() if path is None else _file(Path(path).expanduser())
    if tokens == "bytes":
        vocabulary, whole = None, _bytes(content)
    else:
        characters = _decoded(name, content)
        vocabulary = "".join(sorted(set(characters)))
        whole = TextDataset(name, torch.empty(0), torch.empty(0), vocabulary).encode(characters)
    border = round(len(whole) * (1 - test_fraction))
    if not 0 < border < len(whole):
        raise ValueError(
            f"text: {name} has {len(whole)} {tokens}, too few for a training and a test part with "
            f"test_fraction={test_fraction}"
        )
    return TextDataset(name, whole[:border], whole[border:], vocabulary)


def _reference() -> tuple[str, bytes]:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ImportError("text: this Python comes without its pydoc_data; give the path of a text file") from error
    # Some topics are parts of others: kept twice, the held-out end would have been seen in training.
    paragraphs = dict.fromkeys(part.strip("\n") for topic in topics.values() for part in topic.split("\n\n"))
    return f"reference of Python {platform.python_version()}", "\n\n".join(part for part in paragraphs if part).encode()


def _file(path: Path) -> tuple[str, bytes]:
    if not path.is_file():
        raise FileNotFoundError(f"text: {path.absolute()} is not a file; give the path of a text file")
    return path.name, path.read_bytes()


def _decoded(name: str, content: bytes) -> str:
    try:
        return content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: {name} is not UTF-8: {error.reason} at byte {error.start}; save it in that encoding, or take "
            f"tokens='bytes'"
        ) from error


def _codes(text: str) -> np.ndarray:
    """The code point of each character; a lone surrogate, which is no text, has one too."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _bytes(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).astype(np.int64))
