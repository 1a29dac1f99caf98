"""What a job on Slurm runs: Ray on its allocation, and on the first machine the driver of the run (starts and ends processes).

`python -m launcher.clusters.allocation RUN NUMBER` is the job's command; it starts the same with `--node ADDRESS` on every other machine.
"""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from data_pipeline.errors import ExitCode, MaskwrightError
from data_pipeline.storage import Location
from launcher.clusters.ray_node import LOOK_S, LOOPBACK, address_towards, ending, free_ports, own_address, place
from launcher.clusters.requeueing import (
    JobEnd,
    count_start,
    goes_back,
    idle_starts,
    is_stopped,
    put_back,
    record_spent,
    require_programs,
    waits_again,
)
from launcher.submission import submission_folder
from trainer.runlog import RunFolder

_PAUSE_S = 5.0
"""Between two starts of Ray on a machine."""

Process = subprocess.Popen[bytes]


def run_allocation(root: str, number: int, told: threading.Event) -> int:
    """Drive the run on the whole allocation, until it ends or the job is told to; the job's exit code.

    A run that had to end because the job did waits again, which is said before Ray takes its time to end, and the job goes back into the queue.

    Raises:
        EnvironmentMismatchError: this machine has no commands of Slurm.
    """
    require_programs()
    run, job, is_alone = RunFolder(Location(root)), int(os.environ["SLURM_JOB_ID"]), os.environ["SLURM_JOB_NUM_NODES"] == "1"
    address, started_at, start = LOOPBACK if is_alone else own_address(), time.time(), count_start(run, number)
    port = free_ports(address, job)
    print(f"job {job} on {os.environ['SLURM_JOB_NODELIST']}, start {1 + _restarts()}: Ray at {address}:{port}", flush=True)
    with ExitStack() as stack:
        token = stack.enter_context(_new_token(submission_folder(run, number).path))
        here = stack.enter_context(place({**token, "RAY_ADDRESS": f"{address}:{port}"}))
        head = stack.enter_context(ending(here.ray(*_head_arguments(address, port))))
        if here.wait_for(head, told.is_set):
            nodes = None if is_alone else stack.enter_context(ending(_start_nodes(f"{address}:{port}", token)))
            driver = stack.enter_context(ending(here.python("-m", "launcher.submitted", root, str(number))))
            end = _follow(driver, head, nodes, told)
        else:
            print("Ray did not start", flush=True)
            end = JobEnd(int(ExitCode.INTERRUPTED if told.is_set() else ExitCode.ENVIRONMENT), told.is_set(), lost_ray=True)
        if head.poll() is not None:
            print(here.said(), flush=True)
        end = replace(end, by_person=is_stopped(run, started_at), is_restart=_restarts() > 0, idle_starts=idle_starts(run, start))
        is_back = goes_back(end) and waits_again(run, number)
    if is_back:
        put_back(str(job), 120.0)
    elif end.is_spent:
        record_spent(run)
    return end.exit_code


def run_node(address: str, told: threading.Event) -> int:
    """Keep a node of Ray on this machine until told to end: one that ends by itself is started again."""
    with place({"RAY_ADDRESS": address}) as here:
        while not told.is_set():
            with ending(here.ray(f"--address={address}", f"--node-ip-address={address_towards(address)}")) as ray:
                while ray.poll() is None and not told.is_set():
                    told.wait(LOOK_S)
            if not told.wait(_PAUSE_S):
                print(here.said(), flush=True)
    return int(ExitCode.INTERRUPTED)


def _follow(driver: Process, head: Process, nodes: Process | None, told: threading.Event) -> JobEnd:
    """Wait for the driver, which is told to save and end when the job is, or when Ray has ended."""
    cause = None
    while (code := driver.poll()) is None:
        if cause is None and (cause := _why_to_end(head, nodes, told.is_set())):
            print(f"{cause.words}: the run is told to save and end", flush=True)
            driver.terminate()
        time.sleep(LOOK_S)
    cause = cause or _why_to_end(head, nodes, told.is_set())
    return JobEnd(code, cause is not None and cause.by_slurm, cause is not None and not cause.by_slurm)


class _Cause(NamedTuple):
    """Why a driver is told to end."""

    words: str
    by_slurm: bool = False


def _why_to_end(head: Process, nodes: Process | None, is_told: bool) -> _Cause | None:
    if is_told or (nodes is not None and nodes.poll() == ExitCode.INTERRUPTED):  # those were: `scancel --signal` without `--batch`, or preemption
        return _Cause("Slurm ends the job", by_slurm=True)
    if nodes is not None and nodes.poll() is not None:
        return _Cause(f"Ray on the other machines has ended (exit code {nodes.poll()})")
    return _Cause("Ray's head has ended") if head.poll() is not None else None


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _head_arguments(address: str, port: int) -> Sequence[str]:
    return ("--head", f"--node-ip-address={address}", f"--port={port}", f"--ray-client-server-port={port + 1}", "--include-dashboard=false")


def _start_nodes(head: str, token: Mapping[str, str]) -> Process:
    return subprocess.Popen(node_command(head, os.environ), env={**os.environ, **token}, stdin=subprocess.DEVNULL)


def node_command(head: str, environment: Mapping[str, str]) -> list[str]:
    """The srun that keeps Ray on the other machines (pure). All that the job has there is theirs, and one that is lost ends no other."""
    count, cpus = int(environment["SLURM_JOB_NUM_NODES"]) - 1, environment.get("SLURM_CPUS_PER_TASK")  # which steps do not inherit
    where = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--exclude={environment['SLURMD_NODENAME']}"]
    how = ["--export=ALL", "--mpi=none", "--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0", "--no-kill", "--unbuffered", "--quiet"]
    sizes = [f"--cpus-per-task={cpus}"] if cpus else []
    return ["srun", *where, *how, *sizes, sys.executable, "-P", "-m", "launcher.clusters.allocation", "--node", head]


@contextmanager
def _new_token(folder: Path) -> Generator[dict[str, str]]:
    """A token for this start of the job alone, in a file that only its user can read; the environment says where."""
    path = folder / "token"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        yield {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    finally:
        path.unlink(missing_ok=True)


def main(arguments: Sequence[str]) -> int:
    """Entry point: see the top of this file."""
    told = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        del number, frame
        told.set()

    for wanted in (signal.SIGTERM, signal.SIGINT):
        signal.signal(wanted, note)
    if arguments[0] == "--node":
        return run_node(arguments[1], told)
    try:
        return run_allocation(arguments[0], int(arguments[1]), told)
    except MaskwrightError as error:
        print(f"error: {error.cause}\n{error.remedy}", file=sys.stderr, flush=True)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
