"""Runs a function on several real processes joined by gloo, or on one with a GPU; a test that hangs is killed and every rank's output is shown."""

import gc
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

# Imported once by the fork server: a rank then starts in milliseconds instead of the seconds that importing deepspeed takes.
PRELOAD = ["torch", "deepspeed.runtime.zero.muon.muon_optimizer", "trainer.zero_files", "trainer.pretrain", "tests.support.distributed"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
_FOR_A_CPU = ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")
GRACE_S = 10.0


class DistributedFailure(AssertionError):
    """A rank raised, died or did not end in time. `errors` holds each rank's exception, where it could be had."""

    def __init__(self, message: str, errors: list[BaseException | None]) -> None:
        super().__init__(message)
        self.errors = errors


def run_distributed(
    fn: Callable[..., Any], world_size: int = 2, args: Sequence[Any] = (), timeout_s: float = 60.0, group_timeout_s: float = 60.0
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on `world_size` processes with torch.distributed initialised; return the results by rank.

    `fn` must be importable (a function of a module). Each process runs one thread.

    Raises:
        DistributedFailure: a rank raised, died or was still running after `timeout_s`. All ranks are dead by then.
    """
    os.environ.update(ENVIRONMENT)
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return _run(context.Process, fn, world_size, (tuple(args), group_timeout_s, "gloo"), timeout_s)


def run_on_gpu(fn: Callable[..., Any], args: Sequence[Any] = (), timeout_s: float = 60.0) -> Any:
    """Call `fn(0, 1, *args)` on one process that has the machine's GPU, with NCCL; return its result.

    Raises:
        DistributedFailure: as `run_distributed`.
    """
    return _run(get_context("spawn").Process, fn, 1, (tuple(args), timeout_s, "nccl"), timeout_s)[0]


def on_machines_of_their_own() -> None:
    """Called by all ranks: from now on they take each other to be on other machines, and so share no memory."""
    from trainer import shared_vectors

    shared_vectors._machine = lambda: ("another", os.getpid())


def _run(start: Callable[..., BaseProcess], fn: Callable[..., Any], world_size: int, given: tuple[Any, ...], timeout_s: float) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [start(target=_run_rank, args=(fn, rank, world_size, folder, *given), daemon=False) for rank in range(world_size)]
        try:
            for process in ranks:
                process.start()
            timed_out = _wait(ranks, timeout_s)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
        outcomes = [_read_outcome(Path(folder), rank) for rank in range(world_size)]
        if timed_out or any(kind != "result" for kind, _ in outcomes):
            raise _failure(outcomes, ranks, Path(folder), timeout_s if timed_out else None)
        return [value for _, value in outcomes]


def _wait(ranks: Sequence[BaseProcess], timeout_s: float) -> bool:
    """Wait until all have ended, or GRACE_S after the first has failed. Returns whether the time was up."""
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode not in (None, 0) for process in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            return True
        time.sleep(0.02)
    return False


def _run_rank(
    fn: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...], group_timeout_s: float, backend: Literal["gloo", "nccl"]
) -> None:
    output = os.open(f"{folder}/output-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    wanted = ENVIRONMENT | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ.update({name: value for name, value in wanted.items() if backend == "gloo" or name not in _FOR_A_CPU})
    import torch
    import torch.distributed as dist

    gc.freeze()  # as a worker does
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=group_timeout_s)
        )
        outcome: tuple[str, Any] = ("result", fn(rank, world_size, *args))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test wants to see it
        traceback.print_exc()
        outcome = ("error", error)
    _write_outcome(Path(folder), rank, outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if outcome[0] == "result" else 1)  # gloo's destructors may wait for peers that have failed


def _write_outcome(folder: Path, rank: int, outcome: tuple[str, Any]) -> None:
    try:
        data = pickle.dumps(outcome)
    except Exception as error:  # noqa: BLE001 - an exception that cannot travel still has a text
        data = pickle.dumps(("error", RuntimeError(f"{outcome[1]!r} ({error})")))
    temporary = folder / f"outcome-{rank}.tmp"
    temporary.write_bytes(data)
    temporary.replace(folder / f"outcome-{rank}")


def _read_outcome(folder: Path, rank: int) -> tuple[str, Any]:
    path = folder / f"outcome-{rank}"
    return pickle.loads(path.read_bytes()) if path.exists() else ("nothing", None)


def _failure(outcomes: list[tuple[str, Any]], ranks: Sequence[BaseProcess], folder: Path, timeout_s: float | None) -> DistributedFailure:
    lines = [f"not all ranks ended within {timeout_s} s" if timeout_s else "a rank failed"]
    for rank, (kind, value) in enumerate(outcomes):
        path = folder / f"output-{rank}"
        output = path.read_text(errors="replace")[-6000:] if path.exists() else ""
        lines.append(f"--- rank {rank}: {kind}, exit code {ranks[rank].exitcode}\n{output}")
        if kind == "error":
            lines.append(repr(value))
    return DistributedFailure("\n".join(lines), [value if kind == "error" else None for kind, value in outcomes])
