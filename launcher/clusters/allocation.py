"""What a job on Slurm runs: Ray on its allocation, and on the first machine the driver of the run (starts and ends processes).

`python -m launcher.clusters.allocation RUN NUMBER` is the job's command; it starts the same with `--node ADDRESS` on every other machine.
"""

import math
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from data_pipeline.errors import ExitCode, MaskwrightError
from data_pipeline.storage import Location
from launcher.cluster_config import SlurmCluster
from launcher.clusters.ray_node import LOOK_S, LOOPBACK, address_towards, answers, ending, free_ports, own_address, place
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
from launcher.clusters.slurm_jobs import call_slurm
from launcher.config import load_cluster_config
from launcher.control import GRACE_VARIABLE
from launcher.submission import submission_folder
from trainer.runlog import RunFolder

_PAUSE_S = 5.0
"""Between two starts of Ray on a machine."""
END_NODES = signal.SIGUSR1
"""srun hands it on to its tasks, which tidy up; at SIGTERM it kills them."""
_ANSWER_S = 20.0
HEAD_S = 60.0
"""A head that cannot be reached for so long is gone."""
_RAY_END_S, _END_S = 60, 45
"""Of the grace, the driver has all but so many seconds to save in; one that still lives so many before its end is killed: the job has to go back."""

Process = subprocess.Popen[bytes]


def run_allocation(root: str, number: int, told: threading.Event) -> int:
    """Drive the run on the whole allocation, until it ends or the job is told to; the job's exit code.

    A run that had to end because the job did waits again, which is said before Ray takes its time to end, and the job goes back into the queue.

    Raises:
        EnvironmentMismatchError: this machine has no commands of Slurm, or no address for the others.
    """
    require_programs()
    run = RunFolder(Location(root))
    cluster = load_cluster_config(str(submission_folder(run, number) / "cluster.yaml"))
    assert isinstance(cluster, SlurmCluster)
    started_at, start = time.time(), count_start(run, number)
    with ExitStack() as stack:
        end = _drive(stack, run, number, cluster, told)
        end = replace(end, by_person=is_stopped(run, started_at), is_restart=_restarts() > 0, idle_starts=idle_starts(run, start))
        is_back = goes_back(end) and waits_again(run, number)
    if is_back:
        put_back(os.environ["SLURM_JOB_ID"], cluster.grace_s)
    elif end.is_spent:
        record_spent(run)
    return end.exit_code


def _drive(stack: ExitStack, run: RunFolder, number: int, cluster: SlurmCluster, told: threading.Event) -> JobEnd:
    """Start Ray, which `stack` ends, and drive the run with it."""
    job, is_alone = int(os.environ["SLURM_JOB_ID"]), os.environ["SLURM_JOB_NUM_NODES"] == "1"
    address = LOOPBACK if is_alone else own_address(own_names())
    port = free_ports(address, job)
    where = f"{address}:{port}"
    print(f"job {job} on {os.environ['SLURM_JOB_NODELIST']}, start {1 + _restarts()}: Ray at {where}", flush=True)
    token = stack.enter_context(_new_token(submission_folder(run, number).path))
    here = stack.enter_context(place({**token, "RAY_ADDRESS": where, GRACE_VARIABLE: str(cluster.grace_s - _RAY_END_S)}))
    head = stack.enter_context(ending(here.ray(*_head_arguments(address, port))))
    if here.wait_for(head, told.is_set):
        nodes = None if is_alone else stack.enter_context(ending(_start_nodes(where, token), by=END_NODES))
        driver = stack.enter_context(ending(here.python("-m", "launcher.submitted", run.root.url, str(number))))

        def why() -> Cause | None:
            others = nodes.poll() if nodes is not None else None
            return why_to_end(head.poll(), others, is_told=told.is_set(), is_elastic=cluster.min_workers is not None)

        end = follow(driver, why, cluster.grace_s - _END_S)
    else:
        print("Ray did not start", flush=True)
        end = JobEnd(int(ExitCode.INTERRUPTED if told.is_set() else ExitCode.ENVIRONMENT), told.is_set(), lost_ray=True)
    if head.poll() is not None:
        print(here.said(), flush=True)
    return end


def run_node(address: str, told: threading.Event) -> int:
    """Keep a node of Ray on this machine until told to end: one that ends by itself is started again, while there is a head.

    With `--no-kill` a job outlives the machine that drives it; then the others put it back into the queue, each of them, which is once.
    """
    with place({"RAY_ADDRESS": address}) as here:
        words = (f"--address={address}", f"--node-ip-address={address_towards(address)}")
        return keep_node(lambda: here.ray(*words), here.said, address, told)


def keep_node(start: Callable[[], Process], said: Callable[[], str], address: str, told: threading.Event) -> int:
    """Start a node again and again that belongs to the head at `address`; `said` is what it has printed."""
    while not told.is_set():
        with ending(start()) as ray:
            while ray.poll() is None and not told.is_set():
                told.wait(LOOK_S)
        if not answers(address, HEAD_S, told.is_set):
            print(f"Ray's head at {address} is gone", flush=True)
            put_back(os.environ["SLURM_JOB_ID"], HEAD_S)
            return int(ExitCode.UNREACHABLE)
        if not told.wait(_PAUSE_S):
            print(said(), flush=True)
    return int(ExitCode.INTERRUPTED)


class Cause(NamedTuple):
    """Why a driver is told to end."""

    words: str
    by_slurm: bool = False


def follow(driver: Process, why: Callable[[], Cause | None], allowed_s: float) -> JobEnd:
    """Wait for the driver, which is told to save and end when there is a cause, and killed if it still lives so many seconds later."""
    cause, deadline = None, math.inf
    while (code := driver.poll()) is None:
        if cause is None and (cause := why()):
            print(f"{cause.words}: the run is told to save and end", flush=True)
            deadline = time.monotonic() + allowed_s
            driver.terminate()
        if time.monotonic() >= deadline:
            print(f"the run did not end within {allowed_s:g} s and is killed", flush=True)
            driver.kill()
            code = driver.wait() and -signal.SIGTERM  # what counts is that it had to end
            break
        time.sleep(LOOK_S)
    cause = cause or why()
    return JobEnd(code, cause is not None and cause.by_slurm, cause is not None and not cause.by_slurm)


def why_to_end(head: int | None, nodes: int | None, *, is_told: bool, is_elastic: bool) -> Cause | None:
    """Why a driver has to end (pure), by the exit codes of Ray's head and of the srun that keeps it on the other machines, None where they live.

    An elastic run goes on without other machines, down to `min_workers`: sizing decides.
    """
    if is_told or nodes == ExitCode.INTERRUPTED:  # those were told: `scancel --signal` without `--batch`, or preemption
        return Cause("Slurm ends the job", by_slurm=True)
    if nodes is not None and not is_elastic:
        return Cause(f"Ray on the other machines has ended (exit code {nodes})")
    return Cause("Ray's head has ended") if head is not None else None


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def own_names() -> Iterator[str]:
    """What this machine is called: by itself, by Slurm, by who sends to it for Slurm, and by whom it would send to abroad."""
    node = os.environ["SLURMD_NODENAME"]
    yield from (socket.gethostname(), node)
    with suppress(MaskwrightError):
        yield from re.findall(r"\bNodeAddr=(\S+)", call_slurm(_ANSWER_S, "scontrol", "show", "node", node, "--oneliner"))
    yield address_towards("8.8.8.8:53")


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

    for wanted in (signal.SIGTERM, signal.SIGINT, *([END_NODES] if arguments[0] == "--node" else [])):
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
