"""Runs the `maskwright` command in processes of its own, and ends exactly those (never by name)."""

import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

MARK = "MASKWRIGHT_TEST_SESSION"


HEARS_SIGNALS = ("env", "--default-signal")
"""Before a command: `nohup`, and a script's `&`, have what they start ignore signals, the tests included, and the product respects that."""


@dataclass
class Command:
    """One `maskwright` command (or another `program`); all it starts carries its mark in the environment, Ray's processes included."""

    arguments: list[str]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    program: str = "launcher.cli"
    inside: Sequence[str] = ()
    """Words before the command, such as `ip netns exec NAME`."""

    def start(self) -> Self:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MASKWRIGHT_"))}
        self.output = self.folder / f"output-{self.mark}.txt"
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [*self.inside, *HEARS_SIGNALS, sys.executable, "-P", "-m", self.program, *self.arguments],
                cwd=self.folder,
                env={**clean, "OMP_NUM_THREADS": "1", **self.environment, MARK: self.mark},
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self

    def wait(self, timeout_s: float = 240.0) -> int:
        """The exit code; on time-out everything is killed and the output shown."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            raise AssertionError(f"{self.arguments} took over {timeout_s} s\n{self.text()}") from None

    def text(self) -> str:
        """Everything it printed so far."""
        return self.output.read_text(errors="replace")

    def wait_until(self, condition: Callable[[], Any], timeout_s: float = 120.0) -> None:
        """Poll until `condition` holds while the command runs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                code = self.process.poll()
                self.kill_everything()
                raise AssertionError(f"{self.arguments} never came so far (exit code {code})\n{self.text()}")
            time.sleep(0.01)

    def wait_until_gone(self, timeout_s: float = 90.0) -> None:
        """Everything that the command started ends by itself after it: Ray's agents may try to reach their dead server for a minute."""
        deadline = time.monotonic() + timeout_s
        while alive := self.processes():
            assert time.monotonic() < deadline, f"outlived the command that started them: {[_name(pid) for pid in alive]}"
            time.sleep(0.1)

    def processes(self) -> list[int]:
        """Every living process of this command."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_ours(pid)]

    def _is_ours(self, pid: int) -> bool:
        try:
            return f"{MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False

    def kill_driver(self) -> None:
        """SIGKILL to the command itself."""
        self.process.kill()
        self.process.wait()

    def kill_everything(self) -> None:
        """SIGKILL to the command and all that it started, again until nothing is left."""
        deadline, doomed = time.monotonic() + 30, set[psutil.Process]()
        while time.monotonic() < deadline:
            doomed |= self._family()
            alive = [process for process in doomed if _lives(process)]
            if not alive:
                return
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
            self.process.poll()
        raise AssertionError(f"processes survived SIGKILL: {[process.pid for process in doomed if _lives(process)]}")

    def _family(self) -> set[psutil.Process]:
        """Also children without the mark: Ray's agents write their titles over it."""
        family: set[psutil.Process] = set()
        for pid in self.processes():
            with suppress(psutil.NoSuchProcess):
                family |= {psutil.Process(pid), *psutil.Process(pid).children(recursive=True)}
        return family


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
    except OSError:
        return str(pid)


def maskwright(*arguments: str, folder: Path, timeout_s: float = 240.0, **environment: str) -> tuple[int, str]:
    """Run a command to its end: exit code and output."""
    command = Command(list(arguments), folder, environment).start()
    try:
        return command.wait(timeout_s), command.text()
    finally:
        command.kill_everything()


def worker_pid(run: Path, attempt: int, rank: int) -> int | None:
    """Process of a rank, from the first line of its log; None before it has written it."""
    log = run / f"logs/attempt-{attempt:04d}/rank-{rank:05d}.log"
    found = re.search(r"rank \d+ of \d+, process (\d+)", log.read_text(errors="replace")) if log.exists() else None
    return int(found[1]) if found else None
