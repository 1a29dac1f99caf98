"""A real Slurm on this machine: munged, slurmctld and two slurmd with a folder and ports of their own, ended by number, never by name."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.ray_nodes import free_port
from tests.support.required import missing

NODES = ("n1", "n2")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_START_S = 120.0


@dataclass
class Slurm:
    """`with Slurm(folder) as slurm`: two machines of `cpus` CPUs, both of them this one. `environment` is what Slurm's commands need to find it."""

    folder: Path
    """Of everything that it writes."""
    cpus: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            missing("slurm", "needs root")
        if lacks := [program for program in _PROGRAMS if shutil.which(program, path=_path()) is None]:
            missing("slurm", f"there is no {', '.join(lacks)} (apt-get install slurm-wlm munge)")
        for name in ("state", "munge", *NODES):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        (self.folder / "munge").chmod(0o700)
        (self.folder / "slurm.conf").write_text(self._configuration())
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            self._start_all()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name in (*NODES, "slurmctld", "munged"):
            self._end(name)
        deadline = time.monotonic() + 30
        while (alive := self.processes()) and time.monotonic() < deadline:
            _kill(alive)
            time.sleep(0.1)
        assert not self.processes(), "processes survived SIGKILL"

    def call(self, *words: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(words, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def job(self, name: str) -> str:
        """Number of the job with a name."""
        return self.call("squeue", "--noheader", "--states=all", f"--name={name}", "--format=%i")

    def state(self, name: str) -> str:
        """What Slurm says of it."""
        return self.call("squeue", "--noheader", "--states=all", f"--name={name}", "--format=%T")

    def restarts(self, name: str) -> int:
        """How often it was put back into the queue."""
        told = self.call("scontrol", "show", "job", self.job(name), "--oneliner")
        return int(told.partition(" Restarts=")[2].split()[0])

    def kill_node(self, name: str) -> None:
        """Take a machine away: its slurmd, and all that Slurm runs there."""
        self._end(name)
        tops = [pid for pid in self.processes() if _is_step_of(pid, self.folder / name)]
        assert tops, f"nothing runs on {name}"
        while alive := _with_descendants(tops):
            _kill(alive)
            tops = [pid for pid in alive if Path(f"/proc/{pid}").exists() and not _is_zombie(pid)]

    def start_node(self, name: str) -> None:
        """Start a machine."""
        self._start(name, "slurmd", "-D", "-N", name)

    def processes(self) -> list[int]:
        """All living processes that it has started, of jobs as well: they know its folder, or the one beside it that the jobs write to."""
        mark = str(self.folder.parent).encode()
        found: list[int] = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            try:
                words = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if mark in words and pid != os.getpid() and not _is_zombie(pid):
                found.append(pid)
        return found

    def _start_all(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").touch(mode=0o600)
        (munge / "key").write_bytes(secrets.token_bytes(1024))
        own = [f"--key-file={munge}/key", f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"]
        self._start("munged", "munged", "--foreground", "--force", f"--socket={self._socket}", "--num-threads=10", *own)
        self._wait_for(self._socket.exists, "munged")
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for name in NODES:
            self.start_node(name)
        self._wait_for(lambda: self._idle() == len(NODES), *NODES, "slurmctld")

    def _idle(self) -> int:
        words = ["sinfo", "--noheader", "--Node", "--format=%T"]
        done = subprocess.run(words, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.split().count("idle")

    @property
    def _socket(self) -> Path:
        return self.folder / "munge.socket"

    def _start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                words,
                env={**os.environ, **self.environment, "PATH": _path()},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _end(self, name: str) -> None:
        if (daemon := self._daemons.pop(name, None)) is not None:
            daemon.kill()
            daemon.wait()

    def _wait_for(self, condition: Callable[[], bool], *names: str) -> None:
        deadline = time.monotonic() + _START_S
        while not condition():
            if time.monotonic() > deadline or any(self._daemons[name].poll() is not None for name in names):
                said = "\n".join((self.folder / f"{name}.out").read_text(errors="replace")[-2000:] for name in names)
                raise AssertionError(f"{', '.join(names)} did not start\n{said}")
            time.sleep(0.1)

    def _configuration(self) -> str:
        host, folder = socket.gethostname(), self.folder
        ports = {name: free_port("127.0.0.1") for name in ("slurmctld", *NODES)}
        nodes = "".join(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[name]} CPUs={self.cpus}\n" for name in NODES)
        return _CONFIGURATION.format(host=host, folder=folder, socket=self._socket, port=ports["slurmctld"]) + nodes + _PARTITION


_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n/pid
SlurmdLogFile={folder}/%n/log
SlurmdSpoolDir={folder}/%n
SlurmdParameters=config_overrides
SlurmdTimeout=120
MessageTimeout=60
BatchStartTimeout=120
ReturnToService=2
KillWait=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=5
"""
_PARTITION = "PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60\n"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _is_step_of(pid: int, spool: Path) -> bool:
    """Whether a process is the slurmstepd of a step on the machine with that folder."""
    try:
        if not Path(f"/proc/{pid}/exe").readlink().name.startswith("slurmstepd"):
            return False
        return any(str(link.readlink()).startswith(f"{spool}/") for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def _with_descendants(tops: list[int]) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(pid)
    found = list(tops)
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
