"""Processes for tests of what several do together: `ranks.run(2, function, *arguments)`.

`function` is a function at the top of a test module; every process calls it as `function(*arguments)` after
`fnn.distributed.init()`, and what they return comes back as a list, by rank. Processes are started once and kept
for the next test; where one fails all are started anew. An error of one is raised here, with its trace.
"""

import atexit
import multiprocessing
import os
import socket
import traceback

_groups: dict = {}
TIMEOUT = 120.0
"""Seconds that a process waits for the others in an operation of all."""


class RankError(AssertionError):
    """What went wrong in the processes, by rank: `errors[rank]` is (class name, message) or None."""

    def __init__(self, message, errors):
        super().__init__(message)
        self.errors = errors


def run(count, function, *arguments, limit=240.0):
    """What `function(*arguments)` returns in each of `count` processes, by rank."""
    if count not in _groups:
        _groups[count] = _start(count)
    _, pipes = _groups[count]
    for pipe in pipes:
        pipe.send((function, arguments))
    answers = []
    for pipe in pipes:
        try:
            answers.append(pipe.recv() if pipe.poll(limit) else ("error", ("TimeoutError", f"none in {limit} s", "")))
        except EOFError:
            answers.append(("error", ("EOFError", "the process has ended", "")))
    errors = [value[:2] if kind == "error" else None for kind, value in answers]
    if any(errors):
        stop(count)
        said = [f"rank {n}: {value[2] or value[1]}" for n, (kind, value) in enumerate(answers) if kind == "error"]
        raise RankError("\n".join(said), errors)
    return [value for _, value in answers]


def stop(count):
    processes, pipes = _groups.pop(count, ((), ()))
    for process in processes:
        process.kill()
    for pipe in pipes:
        pipe.close()


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _start(count):
    context = multiprocessing.get_context("spawn")
    port, processes, pipes = free_port(), [], []
    for rank in range(count):
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, count, port, TIMEOUT, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(mine)
    return processes, pipes


def _serve(rank, count, port, timeout, pipe):
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    from fnn import distributed

    torch.set_num_threads(1)
    distributed.init(device="cpu", timeout=timeout, quiet=False)
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        torch.compiler.reset()
        try:
            pipe.send(("value", function(*arguments)))
        except BaseException as error:
            pipe.send(("error", (type(error).__name__, str(error), traceback.format_exc())))


@atexit.register
def _stop_all():
    for count in list(_groups):
        stop(count)
