"""`fnn.data.text` and `Windows`: tokens that read back as the text, and windows without a copy of it."""

import platform
import sys

import numpy as np
import pytest
import torch

from fnn import random
from fnn.data import Loader, TextDataset, Windows, text

VERSE = "Ähren, Öl\nund ein €uro 😀.\n" * 20


@pytest.fixture
def verse(tmp_path):
    path = tmp_path / "verse.txt"
    path.write_text(VERSE, encoding="utf-8")
    return path


# text


@pytest.mark.parametrize("tokens", ["characters", "bytes"])
def test_the_tokens_read_back_as_the_file(verse, tokens):
    data = text(verse, tokens=tokens, test_fraction=0.25)
    whole = torch.cat([data.train, data.test])
    assert (whole.dtype, whole.ndim) == (torch.int64, 1)
    assert data.decode(whole) == VERSE
    assert torch.equal(data.encode(VERSE), whole)
    assert len(data.test) == round(0.25 * len(whole))
    if tokens == "bytes":
        assert whole.tolist() == list(VERSE.encode("utf-8"))
        assert (data.vocabulary, data.vocabulary_size) == (None, 256)
        assert repr(data) == f"TextDataset(verse.txt: {len(data.train)} training and {len(data.test)} test bytes)"
    else:
        assert data.vocabulary == "".join(sorted(set(VERSE)))
        assert whole.tolist() == [data.vocabulary.index(character) for character in VERSE]
        assert (whole.min(), whole.max()) == (0, data.vocabulary_size - 1)
        assert f"{data.vocabulary_size} different ones" in repr(data)


def test_tokens_as_lists_and_half_a_character(verse):
    data = text(verse, tokens="bytes")
    assert data.decode([65, 0xF0]) == "A\N{REPLACEMENT CHARACTER}"
    assert text(verse).decode([]) == ""
    assert text(verse).encode("").shape == (0,)
    assert text(str(verse)).train.tolist() == text(verse).train.tolist()


def test_the_text_that_comes_with_python():
    data = text()
    assert data.name == f"reference of Python {platform.python_version()}"
    assert len(data.train) > 300_000
    assert 80 < data.vocabulary_size < 130
    whole = data.decode(torch.cat([data.train, data.test]))
    paragraphs = whole.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)  # none of those held out is in the training part
    assert 'The "if" statement is used for conditional execution:' in whole
    assert torch.equal(text().test, data.test)


def test_python_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ImportError, match="text: this Python comes without its pydoc_data; give the path"):
        text()


def test_unknown_characters_and_tokens(verse):
    data = text(verse)
    with pytest.raises(ValueError, match=r"encode: 'Z' at position 3 is none of the \d+ characters .*verse\.txt.*byte"):
        data.encode("undZ?")
    for unknown in ("\x00", "\U0010ffff", "\ud800"):
        with pytest.raises(ValueError, match="at position 0"):
            data.encode(unknown)
    assert text(verse, tokens="bytes").encode("Z").tolist() == [90]
    for bad in ([0, -1], [0, data.vocabulary_size]):
        with pytest.raises(ValueError, match=rf"decode: the token at position 1 is {bad[1]}, expected 0 to"):
            data.decode(torch.tensor(bad))
    for bad in (torch.zeros(1, 2).long(), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"decode: tokens have shape .* in one row, \(n,\)"):
            data.decode(bad)


def test_bad_files(verse, tmp_path):
    with pytest.raises(FileNotFoundError, match="text: .*nowhere is not a file"):
        text(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        text(tmp_path)
    verse.write_bytes(b"good \xff\xfe bad")
    with pytest.raises(ValueError, match=r"text: verse\.txt is not UTF-8: invalid start byte at byte 5; .*'bytes'"):
        text(verse)
    assert text(verse, tokens="bytes").train[5:7].tolist() == [0xFF, 0xFE]
    cut = "Öl €".encode()[:-1]  # a file cut in the middle of a character
    verse.write_bytes(cut)
    with pytest.raises(ValueError, match="is not UTF-8: unexpected end of data at byte 4"):
        text(verse)
    for content in ("", "a", "abcd"):
        verse.write_text(content)
        with pytest.raises(ValueError, match=rf"verse\.txt has {len(content)} characters, too few"):
            text(verse)
    verse.write_bytes(b"one\r\ntwo")
    assert text(verse).vocabulary == "\nenotw"
    assert 13 in text(verse, tokens="bytes").train


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"tokens": "words"}, "tokens is 'words'"),
        ({"test_fraction": 0}, "test_fraction is 0"),
        ({"test_fraction": 1}, "1"),
    ],
)
def test_bad_arguments_of_text(arguments, word):
    with pytest.raises(ValueError, match="text: ") as error:
        text(**arguments)
    assert word in str(error.value)


# Windows


@pytest.mark.parametrize(("size", "context", "stride"), [(23, 4, 1), (23, 4, 4), (21, 4, 4), (5, 4, 1), (20, 3, 5)])
@pytest.mark.parametrize("key", [None, 0])
def test_windows_are_those_of_unfold(size, context, stride, key):
    tokens = random.randint(random.key(9), (size,), 0, 100).long()
    expected = tokens.unfold(0, context + 1, stride)
    windows = Windows(tokens, context, stride)
    assert len(windows) == len(expected)
    loader = Loader(windows, 2, key=None if key is None else random.key(key), remainder="pad")
    order = torch.arange(len(expected))
    if key is not None:
        order = random.permutation(random.fold_in(random.key(key), 3), len(expected))
    x, y, mask = (torch.cat(parts) for parts in zip(*loader.epoch(3), strict=True))
    assert (x.dtype, y.dtype, x.shape) == (torch.int64, torch.int64, (2 * len(loader), context))
    assert torch.equal(x[mask], expected[order][:, :-1])
    assert torch.equal(y[mask], expected[order][:, 1:])
    for start in range(len(loader) + 1):
        tail = list(loader.epoch(3, start))
        assert len(tail) == len(loader) - start
        assert all(torch.equal(batch[1], y[2 * n : 2 * n + 2]) for n, batch in enumerate(tail, start))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, ">i2"])
def test_windows_of_any_integers_are_gathered_as_int64(dtype):
    x, y = next(iter(Loader(Windows(np.arange(9).astype(dtype), 3), 2)))
    assert (x.tolist(), y.tolist()) == ([[0, 1, 2], [1, 2, 3]], [[1, 2, 3], [2, 3, 4]])
    assert x.dtype == y.dtype == torch.int64


def test_batches_of_windows_own_their_memory_and_lie_on_the_device():
    tokens = torch.arange(9)
    x, y = next(iter(Loader(Windows(tokens, 3), 2)))
    x.zero_()
    assert y.tolist() == [[1, 2, 3], [2, 3, 4]]
    assert tokens.tolist() == list(range(9))
    assert all(leaf.is_meta for leaf in next(iter(Loader(Windows(tokens, 3), 2, device="meta", remainder="pad"))))


def test_a_text_s_windows():
    data = TextDataset("abc", torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1]), "abc")
    (batch,) = Loader(Windows(data.train, 2), 2)
    assert [[data.decode(row) for row in part] for part in batch] == [["ab", "bc"], ["bc", "cb"]]
    assert repr(Windows(data.train, 2)) == "Windows(2 of 2 tokens, stride 1)"


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((torch.zeros(9), 3), ValueError, ["float32", "integers in one row"]),
        ((torch.zeros(9, dtype=torch.bool), 3), ValueError, ["bool"]),
        ((torch.zeros(9, 2).long(), 3), ValueError, ["(9, 2)"]),
        (([1, 2, 3], 2), TypeError, ["tokens are list"]),
        ((torch.arange(9), 0), ValueError, ["context is 0"]),
        ((torch.arange(9), 2.0), ValueError, ["context is 2.0"]),
        ((torch.arange(9), 2, 0), ValueError, ["stride is 0"]),
        ((torch.arange(9), 9), ValueError, ["9 tokens", "at least 10"]),
    ],
)
def test_bad_windows(arguments, kind, words):
    with pytest.raises(kind, match="Windows: ") as error:
        Windows(*arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_windows_inside_other_data_are_refused():
    with pytest.raises(TypeError, match="leaf '0' of data is Windows"):
        Loader((Windows(torch.arange(9), 3), torch.arange(6)), 2)


def test_a_vocabulary_in_an_order_of_its_own():
    data = TextDataset("own", torch.tensor([0]), torch.tensor([1]), "cab")
    assert data.encode("abc").tolist() == [1, 2, 0]
    assert data.decode(data.encode("cabbac")) == "cabbac"
    with pytest.raises(ValueError, match="'d' at position 1"):
        data.encode("ad")
