"""Processes, how they agree, and what they say where they do not."""

import os

import pytest
import ranks
import torch
import torch.distributed as dist

from fnn import _ranks, distributed
from fnn.distributed import _init


def _shapes():
    mesh = distributed.init(quiet=False)
    wide = distributed.init(model=dist.get_world_size(), quiet=False)
    return mesh.mesh_dim_names, mesh.size(), wide.mesh_dim_names, tuple(wide.shape), _ranks.rank(), _ranks.is_main()


def test_a_mesh_has_a_process_for_each_device():
    assert ranks.run(2, _shapes) == [
        (("data",), 2, ("data", "model"), (1, 2), 0, True),
        (("data",), 2, ("data", "model"), (1, 2), 1, False),
    ]


def _on_main(fail):
    def action():
        if fail:
            raise FileExistsError("the folder is there")
        return os.getpid()

    try:
        return _ranks.on_main("save", action), os.getpid()
    except FileExistsError as error:
        return str(error)


def test_what_rank_0_does_is_told_to_all():
    (first, pid), (second, other) = ranks.run(2, _on_main, False)
    assert first == second == pid != other
    assert ranks.run(2, _on_main, True) == ["the folder is there"] * 2


def _group_of_errors():
    def action():
        if _ranks.is_main():
            raise ExceptionGroup("two", [ValueError("a"), OSError("b")])

    with pytest.raises((ExceptionGroup, RuntimeError)) as caught:
        _ranks.everywhere("save", action)
    return str(caught.value)


def test_an_error_that_is_not_made_of_a_message_reaches_all():
    first, second = ranks.run(2, _group_of_errors)
    assert second == f"ExceptionGroup: {first}"


def _different():
    with pytest.raises(ValueError, match="rank 0 and") as caught:
        _ranks.check_same("fit", {"epochs": 3, "lr": 0.1 * (1 + _ranks.rank())}, "start all alike")
    return str(caught.value)


def test_a_difference_is_named_on_every_rank():
    assert set(ranks.run(2, _different)) == {"fit: lr is 0.1 on rank 0 and 0.2 on rank 1; start all alike"}


def _alone():
    if _ranks.rank() == 1:
        return None
    return _ranks.gather("save", 1)


def test_a_process_that_waits_in_vain_says_for_how_long(monkeypatch):
    monkeypatch.setattr(ranks, "TIMEOUT", 2.0)
    ranks.stop(2)
    with pytest.raises(ranks.RankError, match=r"rank 0 of 2 was waiting for the other processes for at most 2 s"):
        ranks.run(2, _alone)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True, "600"])
def test_a_timeout_is_a_number_of_seconds(seconds):
    with pytest.raises(ValueError, match=r"timeout is .*, expected a number of seconds above 0"):
        distributed.init(timeout=seconds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none():
    with pytest.raises(ValueError, match="device is 'cuda', but torch finds none here; give device='cpu', or 'auto'"):
        distributed.init(device="cuda")


def test_a_device_needs_a_local_rank(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert _init._local_rank() == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="LOCAL_RANK is not set, which says what device of its machine a process has"):
        _init._local_rank()
