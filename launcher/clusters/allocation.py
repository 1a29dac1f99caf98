"""What a job on Slurm runs: Ray on its allocation, and on the first machine the driver of the run (starts and ends processes).

`python -m launcher.clusters.allocation RUN NUMBER` is the job's command; it starts the same with `--node ADDRESS` on every other machine.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from data_pipeline.errors import ExitCode
from data_pipeline.storage import Location
from launcher.clusters.local import OBJECT_STORE_BYTES, RAY_ENVIRONMENT, session_folder
from launcher.submission import read_submission, submission_folder, wait_again
from trainer.runlog import RunFolder

_LOOK_S = 0.25
_START_S = 120.0
"""For Ray's head, from a cold file system."""
_END_S = 20.0
"""For what is told to end; then it is killed."""
_PAUSE_S = 5.0
"""Between two starts of Ray on a machine."""
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000
"""Below those that the kernel gives to whoever asks for any."""
_MOST_LOST = 3
"""A job whose Ray ends by itself is put back into the queue so many times."""
_LOST = (ExitCode.INTERRUPTED, ExitCode.UNREACHABLE, ExitCode.ENVIRONMENT)
"""How a run ends whose Ray has gone."""
_FOREIGN = ("SLURM", "SBATCH", "SRUN", "PMI", "PMIX")
"""Names of variables that begin so mean nothing to Ray, and much to libraries which look for a launcher of their own."""


@dataclass(frozen=True)
class Place:
    """What Ray gets on this machine: a folder that goes with the job, and the environment of its processes."""

    folder: Path
    environment: Mapping[str, str]

    def python(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a Python program there."""
        return subprocess.Popen([sys.executable, "-P", *arguments], env=self.environment, stdin=subprocess.DEVNULL)

    def ray(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a node of Ray; its process ends with it."""
        own = ["--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        sizes = [f"--object-store-memory={OBJECT_STORE_BYTES}", *_resources(os.environ), f"--temp-dir={self.folder / 'ray'}"]
        return self.python("-m", "ray.scripts.scripts", "start", "--block", *arguments, *own, *sizes)


def run_allocation(root: str, number: int, told: threading.Event) -> int:
    """Drive the run on the whole allocation, until it ends or the job is told to; the job's exit code.

    A run that had to end because the job was told to waits again, and its job is put back into the queue.
    """
    run = RunFolder(Location(root))
    job, address = int(os.environ["SLURM_JOB_ID"]), _own_address()
    port = free_ports(address, job)
    print(f"job {job} on {os.environ['SLURM_JOB_NODELIST']}, start {1 + _restarts()}: Ray at {address}:{port}", flush=True)
    with ExitStack() as stack:
        token = stack.enter_context(_new_token(submission_folder(run, number).path))
        place = stack.enter_context(_place({**token, "RAY_ADDRESS": f"{address}:{port}"}))
        head = stack.enter_context(_ending(place.ray(*_head_arguments(address, port))))
        if not _wait_for(address, port, head, told):
            code = ExitCode.INTERRUPTED if told.is_set() else ExitCode.ENVIRONMENT
            return _ended(run, number, int(code), told, "Ray did not start")
        nodes = stack.enter_context(_other_nodes(f"{address}:{port}", token))
        driver = stack.enter_context(_ending(place.python("-m", "launcher.submitted", root, str(number))))
        code, cause = _follow(driver, head, nodes, told)
    return _ended(run, number, code, told, cause)


def run_node(address: str, told: threading.Event) -> int:
    """Keep a node of Ray on this machine until told to end: one that ends by itself is started again."""
    with _place({"RAY_ADDRESS": address}) as place:
        while not told.is_set():
            with _ending(place.ray(f"--address={address}", f"--node-ip-address={_address_towards(address)}")) as ray:
                while ray.poll() is None and not told.is_set():
                    told.wait(_LOOK_S)
            told.wait(_PAUSE_S)
    return int(ExitCode.INTERRUPTED)


def _follow(
    driver: subprocess.Popen[bytes], head: subprocess.Popen[bytes], nodes: subprocess.Popen[bytes] | None, told: threading.Event
) -> tuple[int, str]:
    """Wait for the driver, which is told to save and end when the job is, or when Ray has ended. Its exit code, and why it was told to, if it was."""
    cause = ""
    while (code := driver.poll()) is None:
        if not cause and (cause := _why_to_end(head, nodes, told)):
            print(f"{cause}: the run is told to save and end", flush=True)
            driver.terminate()
        time.sleep(_LOOK_S)
    return code, cause


def _why_to_end(head: subprocess.Popen[bytes], nodes: subprocess.Popen[bytes] | None, told: threading.Event) -> str:
    if nodes is not None and nodes.poll() == ExitCode.INTERRUPTED:
        told.set()  # they were, by Slurm: `scancel --signal` without `--batch`, or preemption
    if told.is_set():
        return "Slurm ends the job"
    if nodes is not None and nodes.poll() is not None:
        return f"Ray on the other machines has ended (exit code {nodes.poll()})"
    return "Ray's head has ended" if head.poll() is not None else ""


def _ended(run: RunFolder, number: int, code: int, told: threading.Event, cause: str) -> int:
    """The job's exit code; where its end is none of the run's doing, the job goes back into the queue."""
    was_told = code in {-signal.SIGTERM, ExitCode.INTERRUPTED}
    was_lost = bool(cause) and not told.is_set() and code in {*_LOST, -signal.SIGTERM} and _restarts() < _MOST_LOST
    job = os.environ["SLURM_JOB_ID"]
    if ((told.is_set() and was_told) or was_lost) and _is_wanted(job):
        wait_again(run, read_submission(run, number))
        if subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0:
            print(f"job {job} goes back into the queue", flush=True)
    return int(ExitCode.INTERRUPTED) if was_told else code if code >= 0 else 128 - code


def _is_wanted(job: str) -> bool:
    """Whether it is not being cancelled: Slurm would put it back all the same."""
    done = subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True, check=False)
    return done.stdout.strip() == "RUNNING"


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _head_arguments(address: str, port: int) -> Sequence[str]:
    return ("--head", f"--node-ip-address={address}", f"--port={port}", f"--ray-client-server-port={port + 1}", "--include-dashboard=false")


def _resources(environment: Mapping[str, str]) -> list[str]:
    """What Slurm has given the job of this machine; of GPUs that it does not count, Ray finds those it may see."""
    gpus = environment.get("SLURM_GPUS_ON_NODE")
    return [f"--num-cpus={environment['SLURM_CPUS_ON_NODE']}", *([f"--num-gpus={gpus}"] if gpus else [])]


@contextmanager
def _other_nodes(head: str, token: Mapping[str, str]) -> Generator[subprocess.Popen[bytes] | None]:
    """Ray on every other machine of the allocation."""
    count = int(os.environ["SLURM_JOB_NUM_NODES"]) - 1
    if not count:
        yield None
        return
    with _ending(subprocess.Popen(node_command(head, count, os.environ), env={**os.environ, **token}, stdin=subprocess.DEVNULL)) as nodes:
        yield nodes


def node_command(head: str, count: int, environment: Mapping[str, str]) -> list[str]:
    """The srun that keeps Ray on the other machines (pure). All that the job has there is theirs, and one that is lost ends no other."""
    cpus = environment.get("SLURM_CPUS_PER_TASK")  # which steps do not inherit
    where = [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--exclude={environment['SLURMD_NODENAME']}"]
    how = ["--export=ALL", "--mpi=none", "--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0", "--no-kill", "--unbuffered"]
    sizes = [f"--cpus-per-task={cpus}"] if cpus else []
    return ["srun", *where, *how, *sizes, sys.executable, "-P", "-m", "launcher.clusters.allocation", "--node", head]


@contextmanager
def _place(own: Mapping[str, str]) -> Generator[Place]:
    """A folder with our packages, which come as a zip, and room for Ray's files; gone with the block, or with whoever comes after a kill."""
    packages = Path(__file__).parents[2]
    scratch = session_folder()
    try:
        if zipfile.is_zipfile(packages):
            with zipfile.ZipFile(packages) as archive:
                archive.extractall(scratch.path / "packages")
            packages = scratch.path / "packages"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        yield Place(scratch.path, {**inherited, **RAY_ENVIRONMENT, **own, "PYTHONPATH": str(packages)})
    finally:
        scratch.remove()


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


@contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Generator[subprocess.Popen[bytes]]:
    """A process that ends with the block: asked to, and killed if it does not."""
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        process.kill()
        process.wait()


def _wait_for(address: str, port: int, head: subprocess.Popen[bytes], told: threading.Event) -> bool:
    """Whether Ray's head listens; it may take long, and may not come."""
    deadline = time.monotonic() + _START_S
    while head.poll() is None and time.monotonic() < deadline and not told.is_set():
        with suppress(OSError), socket.create_connection((address, port), timeout=1.0):
            return True
        time.sleep(_LOOK_S)
    return False


def free_ports(address: str, job: int) -> int:
    """The first of two ports that nobody listens at: by the number of the job, so that those of a machine do not look in the same place."""
    for tried in range(_NUM_PORTS // 2):
        port = _FIRST_PORT + 2 * (job + tried) % _NUM_PORTS
        with suppress(OSError):
            for number in (port, port + 1):
                with socket.socket() as probe:
                    probe.bind((address, number))
            return port
    raise OSError(f"no free port at {address}")


def _own_address() -> str:
    """Where the other machines reach this one; where there is no other, nobody else does."""
    if os.environ["SLURM_JOB_NUM_NODES"] == "1":
        return "127.0.0.2"
    with suppress(OSError):
        found = socket.gethostbyname(socket.gethostname())
        if not found.startswith("127."):
            return found
    return _address_towards("8.8.8.8:53")


def _address_towards(other: str) -> str:
    """The address of this machine from where it would send to another; nothing is sent."""
    host, _, port = other.rpartition(":")
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return probe.getsockname()[0]
    return "127.0.0.2"


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
    return run_allocation(arguments[0], int(arguments[1]), told)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
