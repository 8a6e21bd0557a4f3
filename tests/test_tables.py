"""Tables of measurements and the choice that follows from them, on a card that is only claimed to be there."""

import json

import pytest
import torch
from torch._subclasses import FakeTensorMode

import triton_kernels as kernels
from fnn import ops
from triton_kernels import _choice, _launch, _tables
from triton_kernels._matmul import choice

CARD = "A card"
CONFIG = {"kernel": "pointer", "block_m": 64, "block_n": 64, "block_k": 32, "num_warps": 4, "num_stages": 3}


@pytest.fixture(autouse=True)
def card(monkeypatch):
    """No table but those of the test, and a card of that name with Triton."""
    monkeypatch.setattr(_tables, "_loaded", {})
    monkeypatch.setattr(_choice, "card_name", lambda device: CARD)
    monkeypatch.setattr(_launch, "INSTALLED", True)
    _tables.nearest.cache_clear()
    yield
    _tables.nearest.cache_clear()


def entry(operation, kind, sizes, *, config=CONFIG, milliseconds=1.0, library=2.0, **more):
    row = {"operation": operation, "kind": kind, "sizes": sizes, "config": config}
    return {**row, "milliseconds": milliseconds, "library_milliseconds": library, **more}


def load(tmp_path, *entries, device=CARD, name="table.json"):
    path = tmp_path / name
    path.write_text(json.dumps({"device": device, "entries": list(entries)}))
    return kernels.load_table(path)


def on_card(*shape, dtype=torch.bfloat16):
    """A tensor without values that says of itself to be on CUDA."""
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


def softmax_choice(rows, columns, backend="auto"):
    return _choice.on_cuda("softmax", "float32 last", (rows, columns), torch.device("cuda"), torch.float32, backend)


def test_load_table_returns_the_name_of_its_card(tmp_path):
    assert load(tmp_path, entry("softmax", "float32 last", [8, 8])) == CARD
    assert _tables.any_loaded()
    assert _tables.covered(CARD)
    assert not _tables.covered("Another card")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1000, 1000), [1000, 1000]),
        ((2000, 500), [1000, 1000]),  # twice and half: still covered
        ((2001, 1000), [4000, 1000]),
        ((8001, 1000), [16000, 1000]),
        ((33_000, 1000), None),
        ((1000, 499), None),
        ((3000, 1000), [4000, 1000]),  # nearest in ratio: 4/3 against 3
        ((1900, 1000), [1000, 1000]),  # 1.9 against 2.1, which is not covered
        ((0, 1000), None),
    ],
)
def test_an_entry_speaks_for_sizes_within_a_factor_of_two(tmp_path, sizes, expected):
    load(tmp_path, *(entry("softmax", "float32 last", size) for size in ([1000, 1000], [4000, 1000], [16000, 1000])))
    found = _tables.nearest(CARD, "softmax", "float32 last", sizes)
    assert (found and list(found.sizes)) == expected


def test_the_first_of_equally_near_entries_is_taken_every_time(tmp_path):
    load(tmp_path, entry("softmax", "k", [512]), entry("softmax", "k", [2048]))
    found = set()
    for _ in range(5):
        _tables.nearest.cache_clear()
        found.add(_tables.nearest(CARD, "softmax", "k", (1024,)).sizes)
    assert found == {(512,)}


def test_a_later_table_replaces_what_it_measured_and_nothing_else(tmp_path):
    load(tmp_path, entry("softmax", "a", [8]), entry("softmax", "b", [8]))
    assert _tables.nearest(CARD, "softmax", "a", (8,)).library_milliseconds == 2
    load(tmp_path, entry("softmax", "a", [8], library=5.0))
    assert _tables.nearest(CARD, "softmax", "a", (8,)).library_milliseconds == 5
    assert _tables.nearest(CARD, "softmax", "b", (8,)).library_milliseconds == 2


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("not json", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"device": "A card"}', "entries"),
        ('{"entries": []}', "device"),
        ('{"device": "A card", "entries": [{"operation": "softmax"}]}', "milliseconds|sizes|config"),
        (json.dumps({"device": CARD, "entries": [entry("softmax", "k", [0, 8])]}), r"positive integers, got \[0, 8\]"),
        (json.dumps({"device": CARD, "entries": [entry("softmax", "k", [])]}), "positive integers"),
    ],
)
def test_a_file_that_is_no_table_is_named_with_what_is_wrong(tmp_path, text, wrong):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"broken.json is not a table of .*tune.*({wrong})"):
        kernels.load_table(path)
    assert not _tables.any_loaded()


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.json"):
        kernels.load_table(tmp_path / "absent.json")


def test_the_choice_is_what_the_table_says_and_names_its_reason(tmp_path):
    load(
        tmp_path,
        entry("softmax", "float32 last", [1024, 1024], config={}, milliseconds=1.0, library=1.5, fastest={}),
        entry("softmax", "float32 last", [8192, 1024], config=None, milliseconds=2.0, library=1.5, fastest={}),
    )
    fast, slow, unknown = softmax_choice(1000, 1000), softmax_choice(8000, 1000), softmax_choice(7, 7)
    assert (fast.kernel, fast.config) == ("Triton", {})
    assert str(fast) == f"Triton: measured at 1024 x 1024 on {CARD}: 1.50 times as fast as the library"
    assert str(slow) == f"PyTorch: measured at 8192 x 1024 on {CARD}: the library is as fast"
    assert unknown.kernel == "PyTorch"
    assert "no table covers this size" in unknown.reason
    assert "python -m triton_kernels.tune" in unknown.reason


def test_without_a_table_of_the_card_it_is_the_librarys(tmp_path):
    load(tmp_path, entry("softmax", "float32 last", [8, 8], config={}), device="Another card")
    found = softmax_choice(8, 8)
    assert found.kernel == "PyTorch"
    assert f"no table is of {CARD}" in found.reason


def test_without_triton_it_is_the_librarys(tmp_path, monkeypatch):
    load(tmp_path, entry("softmax", "float32 last", [8, 8], config={}))
    monkeypatch.setattr(_launch, "INSTALLED", False)
    assert str(softmax_choice(8, 8)) == "PyTorch: Triton is not installed"
    with pytest.raises(RuntimeError, match="pip install triton"):
        softmax_choice(8, 8, "triton")


def test_triton_when_asked_for_is_the_fastest_one_that_was_measured(tmp_path):
    load(
        tmp_path,
        entry("softmax", "float32 last", [8, 8], config=None, fastest=CONFIG),
        entry("softmax", "float32 last", [64, 64], config=CONFIG),
    )
    assert softmax_choice(8, 8, "triton") == _choice.Choice("Triton", "asked for", CONFIG)
    assert softmax_choice(64, 64, "triton").config == CONFIG  # a table may leave it out
    assert softmax_choice(999, 999, "triton") == _choice.Choice("Triton", "asked for")


def test_float64_is_left_to_the_library(tmp_path):
    load(tmp_path, entry("softmax", "float64 last", [8, 8], config={}))
    found = kernels.explain(kernels.softmax, on_card(8, 8, dtype=torch.float64))
    assert found.kernel == "PyTorch"
    assert "float64" in found.reason


def kind_of(a, b, precision="ieee"):
    return choice.kind(a, b, precision)


def test_every_operation_follows_its_entry(tmp_path):
    a, b, x = torch.zeros(64, 32, dtype=torch.bfloat16), torch.zeros(32, 48, dtype=torch.bfloat16), on_card(64, 32)
    load(
        tmp_path,
        entry("matmul", kind_of(a, b), [1, 64, 48, 32]),
        entry("linear", kind_of(a, b.mT.contiguous().mT), [1, 64, 48, 32], config=None),
        entry("softmax", "bfloat16 last", [64, 32], config={}),
        entry("cross_entropy", "bfloat16", [64, 32], config=None),
    )
    found = choice.on_cuda(a, b, "ieee", None, "auto")
    assert (found.kernel, found.config) == ("Triton", CONFIG)
    assert choice.on_cuda(a, b.mT.contiguous().mT, "ieee", None, "auto", activated=True).kernel == "cuBLAS"
    assert ops.explain(ops.softmax, x).kernel == "Triton"
    assert ops.explain(ops.log_softmax, x).kernel == "Triton"
    assert ops.explain(ops.softmax, x, 0).kernel == "PyTorch"  # strided: another kind
    labels = on_card(64).long()
    assert ops.explain(ops.cross_entropy, x, labels).kernel == "PyTorch"
    with ops.use("triton"):
        assert ops.explain(ops.cross_entropy, x, labels).kernel == "Triton"
    with ops.use("torch"):
        assert ops.explain(ops.softmax, x).kernel == "PyTorch"


def test_rows_of_a_batch_count_as_rows_and_a_batch_of_products_as_a_batch(tmp_path):
    a, b = torch.zeros(4, 16, 32), torch.zeros(32, 48)
    load(
        tmp_path,
        entry("matmul", kind_of(a, b), [1, 64, 48, 32]),
        entry("matmul", kind_of(a, b), [16, 16, 48, 32], config=None),
    )
    with torch.no_grad():
        assert choice.on_cuda(a, b, "ieee", None, "auto").kernel == "Triton"
        assert choice.on_cuda(a.repeat(4, 1, 1), b.expand(16, 32, 48), "ieee", None, "auto").kernel == "cuBLAS"


def test_a_precision_that_cublas_does_not_have_is_tritons(tmp_path):
    a, b = torch.zeros(64, 32), torch.zeros(32, 48)
    before = torch.get_float32_matmul_precision()
    assert before == "highest"
    load(tmp_path, entry("matmul", kind_of(a, b, "bf16x3"), [1, 64, 48, 32], fastest=CONFIG))
    assert choice.on_cuda(a, b, "bf16x3", None, "auto").config == CONFIG
    found = choice.on_cuda(a, b, "tf32", None, "auto")
    assert found.kernel == "Triton"
    assert "'ieee'" in found.reason
    assert choice.on_cuda(a, b, "ieee", None, "auto").kernel == "cuBLAS"
