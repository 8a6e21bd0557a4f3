"""The tuner and the GPU benchmark without a GPU: their dry runs, what they measure, and what they conclude."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triton_kernels as kernels
from triton_kernels import _measure, _tables, tune

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_tables(monkeypatch):
    monkeypatch.setattr(_tables, "_loaded", {})
    _tables.nearest.cache_clear()
    yield
    _tables.nearest.cache_clear()


def run(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_dry_run_writes_a_table_that_can_be_read_and_gone_on_with(tmp_path, no_tables):
    path = tmp_path / "folder" / "table.json"
    command = ["-m", "triton_kernels.tune", "--dry-run", "--out", str(path), "--operations", "linear", "softmax"]
    said = run(*command)
    assert "3 sizes measured, 0 not reached" in said
    assert "IS WRONG" not in said
    assert "does not run" not in said
    table = json.loads(path.read_text())
    assert {*table} == {"device", "torch", "triton", "date", "entries"}
    assert (table["device"], table["torch"]) == ("dry run", torch.__version__)
    for entry in table["entries"]:
        assert entry["milliseconds"] > 0
        assert entry["library_milliseconds"] > 0
        assert entry["config"] in (None, entry["fastest"])
    assert kernels.load_table(path) == "dry run"
    linear = _tables.nearest("dry run", "linear", "float16 nt tma", (1, 24, 16, 40))
    assert linear is not None
    assert {"kernel", "block_m", "split_k"} <= linear.fastest.keys()
    assert _tables.nearest("dry run", "softmax", "float32 last", (6, 70)).fastest == {}

    # What is measured is not measured again, and more operations join it.
    assert "0 sizes measured" in run(*command)
    assert "2 sizes measured" in run(*command[:5], "--operations", "matmul")
    assert len(json.loads(path.read_text())["entries"]) == 5
    assert not path.with_suffix(".tmp").exists()


@pytest.mark.slow
def test_the_gpu_benchmark_goes_through_everything_dry():
    said = run("benchmarks/gpu.py", "--kernels", "--dry-run", "--budget", "1000")
    path = Path(said.splitlines()[-1].split(":")[0])
    result = json.loads(path.read_text())
    assert result["dry_run"]
    assert result["checks"]
    assert all(check["right"] for check in result["checks"])
    assert result["errors"] == []
    sections = {row["section"] for row in result["rows"]}
    assert {"matmul", "linear + gelu", "softmax", "cross_entropy", "linear_cross_entropy", "auto"} <= sections
    assert all(row["ours"]["milliseconds"] > 0 and row["speed_against_library"] > 0 for row in result["rows"])
    assert "speed_against_max_autotune" in {name for row in result["rows"] for name in row}


def test_without_a_gpu_it_says_what_it_needs(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        tune.main([])
    assert "needs Triton and a CUDA device; --dry-run does without" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--dry-run"])
    assert "--out FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ([(1.0, 1.5)], True),
        ([(1.0, 1.01)], False),  # within noise
        ([(1.0, 3.0), (1.01, 1.0)], True),  # much faster in one, as fast in the other
        ([(1.0, 3.0), (1.5, 1.0)], False),  # faster in all, but a pass that loses would be chosen too
        ([(2.0, 1.0)], False),
    ],
)
def test_faster_means_by_more_than_noise_and_in_no_pass_slower(passes, expected):
    assert tune.faster(passes) is expected


@pytest.mark.parametrize(
    ("times", "has_library", "config"),
    [({"0": 1.0, "1": 2.0, "library": 1.5}, True, "first"), ({"0": 3.0, "1": 2.0, "library": 1.5}, True, None),
     ({"0": 3.0, "1": 2.0, "library": 1.5}, False, "second")],
)  # fmt: skip
def test_the_entry_names_the_winner(monkeypatch, times, has_library, config):
    from triton_kernels._matmul._configs import Config

    configs = {"first": Config("pointer", 64, 64, 32, 4, 3), "second": Config("pointer", 32, 32, 32, 4, 3)}
    timing = {name: _measure.Timing(value, value, value, False) for name, value in times.items()}
    monkeypatch.setattr(_measure, "interleaved", lambda calls, *_, **__: {name: timing[name] for name in calls})
    one = tune.Pass(lambda i: None, lambda i, config: None)
    key = ("matmul", "float32 ieee nn", (1, 8, 8, 8))
    task = tune.Problem(key, list(configs.values()), [one], lambda _: True, 1, has_library)
    entry = tune._entry(task, list(configs.values()), torch.device("cpu"))
    chosen = {None: None, **{name: tune._fields(each) for name, each in configs.items()}}
    fastest = min(("0", "1"), key=lambda name: times[name])
    assert entry["config"] == chosen[config]
    assert entry["fastest"] == list(chosen.values())[1 + int(fastest)]
    assert (entry["milliseconds"], entry["library_milliseconds"]) == (times[fastest], 1.5)
    assert tune._entry(task, [], torch.device("cpu"))["config"] is None  # nothing that works: the library


def test_a_configuration_that_is_wrong_or_fails_is_left_out_aloud(capsys):
    case = tune.TINY[0]
    assert not tune._works(case, "a config", lambda _: False)
    assert "a config IS WRONG" in capsys.readouterr().out

    def raises(_):
        raise ValueError("out of resource: shared memory")

    assert not tune._works(case, "a config", raises)
    assert "does not run: ValueError: out of resource" in capsys.readouterr().out
    assert tune._works(case, "a config", lambda _: True)


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    cases = list(tune.TINY[:3])

    def measured(case, *_):
        if case is cases[2]:
            raise KeyboardInterrupt
        return {"operation": case.operation, "kind": "k", "sizes": list(case.sizes), "config": None,
                "milliseconds": 1.0, "library_milliseconds": 1.0}  # fmt: skip

    monkeypatch.setattr(tune, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(cases, torch.device("cpu"), path, "card")
    assert len(json.loads(path.read_text())["entries"]) == 2
    assert tune.tune(cases[:2], torch.device("cpu"), path, "card") == (0, 0)  # both are known
    assert tune.tune(cases[:2], torch.device("cpu"), path, "another card") == (2, 0)  # a table is of one card
    assert tune.tune([cases[2]], torch.device("cpu"), path, "another card", budget=-1) == (0, 1)


def test_the_cases_are_distinct_and_look_up_where_the_operators_do():
    cases = tune.cases()
    assert len({str(case) for case in cases}) == len(cases)
    assert {case.operation for case in cases} == set(tune.OPERATIONS)
    assert {case.operation for case in tune.cases(("softmax",))} == {"softmax"}
    for case in tune.TINY:
        task = tune.problem(case, torch.device("cpu"), 1)
        operation, kind, sizes = task.key
        assert (operation, sizes) == (case.operation, case.sizes)
        assert kind.startswith(str(case.dtype).removeprefix("torch."))
        assert task.configs


def test_every_softmax_of_a_common_size_is_near_a_case():
    measured = [case.sizes for case in tune.cases(("softmax",)) if case.dtype == torch.bfloat16]
    for rows in (32, 512, 3000, 50_000):
        for columns in (64, 1000, 4096, 32_000, 200_000):
            if rows * columns <= tune.ELEMENTS:
                near = [max(a / rows, rows / a, b / columns, columns / b) for a, b in measured]
                assert min(near) <= _tables.COVERED, (rows, columns)


class Card:
    """Stands in for `torch.cuda`: calls take the time that they add to the clock, a graph replays them for a tenth."""

    def __init__(self, monkeypatch, capturable):
        self.now, self.capturing, self.captured, self.replayed = 0.0, False, 0.0, 0
        card = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = card.now

            def synchronize(self):
                pass

            def elapsed_time(self, later):
                return later.at - self.at

        class Graph:
            def capture_begin(self, *, capture_error_mode):
                card.capturing, card.captured = True, 0.0

            def capture_end(self):
                card.capturing, self.milliseconds = False, card.captured
                if not capturable(card):
                    raise RuntimeError("operation not permitted when stream is capturing")

            def replay(self):
                card.replayed += 1
                card.now += self.milliseconds / 10

        class Stream:
            def wait_stream(self, other):
                pass

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def takes(self, milliseconds, seen=None):
        def call(i):
            if seen is not None:
                seen.add(i)
            if self.capturing:
                self.captured += milliseconds
            else:
                self.now += milliseconds

        return call


def test_short_calls_are_replayed_from_graphs_and_rotate_their_inputs(monkeypatch):
    card, seen = Card(monkeypatch, lambda card: True), set()
    calls = {"a": card.takes(0.02, seen), "b": card.takes(0.04)}
    found = _measure.interleaved(calls, torch.device("cuda"), sets=7, seconds=0.0, rounds=(4, 9))
    assert seen == set(range(7))
    assert found["a"] == pytest.approx((0.002, 0.002, 0.002, 1))
    assert found["b"].milliseconds == pytest.approx(0.004)
    assert card.replayed == 2 * (1 + 4)


def test_graphs_are_for_all_or_for_none(monkeypatch):
    card = Card(monkeypatch, lambda card: card.captured < 1.5)  # the second cannot be captured
    calls = {"a": card.takes(0.02), "b": card.takes(0.9)}
    found = _measure.interleaved(calls, torch.device("cuda"), sets=3, seconds=0.0)
    assert not found["a"].graph
    assert not found["b"].graph
    assert found["a"].milliseconds == pytest.approx(0.02)
    assert found["b"].milliseconds == pytest.approx(0.9)
    long = {"a": card.takes(0.02), "b": card.takes(20.0)}
    assert not _measure.interleaved(long, torch.device("cuda"), seconds=0.0)["a"].graph


def test_medians_and_quantiles():
    timing = _measure._timing([1.0, 2.0, 3.0, 4.0, 100.0], True)
    assert timing == pytest.approx((3.0, 1.8, 23.2, 1))


def test_relative_error_sees_nan_and_shapes():
    x = torch.randn(8, 8, dtype=torch.float64)
    assert _measure.relative_error(x, x) == 0
    assert _measure.relative_error(x * 1.001, x) == pytest.approx(1e-3)
    assert _measure.relative_error(x.clone().fill_(torch.nan), x) == float("inf")
    with pytest.raises(AssertionError, match=r"expected shape \(8, 8\), got \(8, 7\)"):
        _measure.relative_error(x[:, 1:], x)
