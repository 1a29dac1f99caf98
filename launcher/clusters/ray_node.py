"""A node of Ray on this machine, for the length of a job that a batch system has started here (starts and ends processes)."""

import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import EnvironmentMismatchError
from launcher.clusters.local import OBJECT_STORE_BYTES, RAY_ENVIRONMENT, session_folder

LOOK_S = 0.25
_START_S = 180.0
"""For Ray, from a cold file system on a busy machine."""
_END_S = 20.0
"""For what is told to end; then it is killed."""
_CONNECT_S = 5.0
_STARTED = "Ray runtime started"
"""What `ray start` prints when it takes work."""
_NODE_ENVIRONMENT = {
    "RAY_raylet_start_wait_time_s": f"{_START_S:.0f}",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # the run has saved, or cannot: nothing is left to wait for
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill for what others take on a shared machine; Slurm keeps the job to its own
}
_FOREIGN = ("SLURM", "SBATCH", "SRUN", "PMI")
"""Variables whose names begin so mean nothing to Ray, and much to libraries which look for a launcher of their own."""
_FIRST_PORT, _NUM_PORTS = 20_000, 12_000
"""Below those that the kernel gives to whoever asks for any."""


@dataclass(frozen=True)
class Place:
    """What a job has on this machine: a folder that goes with it, and the environment of its processes."""

    folder: Path
    environment: Mapping[str, str]

    def python(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a Python program."""
        return subprocess.Popen([sys.executable, "-P", *arguments], env=self.environment, stdin=subprocess.DEVNULL)

    def ray(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a node of Ray, which ends with the process; what that prints goes to a file."""
        own = [
            "--disable-usage-stats",
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
            "--log-color=false",
            "--include-log-monitor=false",
        ]
        sizes = [f"--object-store-memory={OBJECT_STORE_BYTES}", *resources(os.environ), f"--temp-dir={self.folder / 'ray'}"]
        words = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", *arguments, *own, *sizes]
        with self._output.open("wb") as out:
            return subprocess.Popen(words, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)

    def said(self) -> str:
        """What Ray has printed."""
        return self._output.read_text(errors="replace")

    def wait_for(self, ray: subprocess.Popen[bytes], told: Callable[[], bool]) -> bool:
        """Whether a node that was started takes work; it may take long, and may not come. Not waited for when this job is `told` to end."""
        deadline = time.monotonic() + _START_S
        while ray.poll() is None and time.monotonic() < deadline and not told():
            if _STARTED in self.said():
                return True
            time.sleep(LOOK_S)
        return False

    @property
    def _output(self) -> Path:
        return self.folder / "ray.txt"


@contextmanager
def place(own: Mapping[str, str]) -> Generator[Place]:
    """A folder with our packages, which come as a zip, and room for Ray's files; gone with the block, or with who comes after one that was killed."""
    packages = Path(__file__).parents[2]
    scratch = session_folder()
    try:
        if zipfile.is_zipfile(packages):
            with zipfile.ZipFile(packages) as archive:
                archive.extractall(scratch.path / "packages")
            packages = scratch.path / "packages"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        yield Place(scratch.path, {**inherited, **RAY_ENVIRONMENT, **_NODE_ENVIRONMENT, **own, "PYTHONPATH": str(packages)})
    finally:
        scratch.remove()


@contextmanager
def ending(process: subprocess.Popen[bytes], by: signal.Signals = signal.SIGTERM) -> Generator[subprocess.Popen[bytes]]:
    """A process that ends with the block: asked to by a signal, and killed if it does not."""
    try:
        yield process
    finally:
        process.send_signal(by)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        process.kill()
        process.wait()


def resources(environment: Mapping[str, str]) -> list[str]:
    """What Slurm has given the job of this machine; of GPUs that it does not count, Ray finds those it may see (pure)."""
    gpus = environment.get("SLURM_GPUS_ON_NODE")
    return [f"--num-cpus={environment['SLURM_CPUS_ON_NODE']}", *([f"--num-gpus={gpus}"] if gpus else [])]


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


def answers(address: str, within_s: float, told: Callable[[], bool]) -> bool:
    """Whether somebody listens at an address, now or in so many seconds. When this job is `told` to end, it does not matter."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + within_s
    while not told():
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=_CONNECT_S):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_S)
    return True


def own_address(names: Iterable[str]) -> str:
    """Where other machines reach this one: what the first of its names stands for that means more than the machine itself.

    Raises:
        EnvironmentMismatchError: none of them does.
    """
    for name in names:
        with suppress(OSError):
            found = socket.gethostbyname(name)
            if not found.startswith("127."):
                return found
    raise EnvironmentMismatchError(
        f"machine {socket.gethostname()} knows no address of its own at which the other machines of the job reach it",
        "Let its name stand for one on every machine (DNS or /etc/hosts), or use a single machine (nodes: 1).",
    )


def address_towards(other: str) -> str:
    """The address of this machine from where it would send to another; nothing is sent."""
    host, _, port = other.rpartition(":")
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return probe.getsockname()[0]
    return LOOPBACK


LOOPBACK = "127.0.0.2"
"""Nobody else reaches it; 127.0.0.1 Ray would replace."""
