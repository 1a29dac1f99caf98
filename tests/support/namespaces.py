"""Machines made of network namespaces: an address for each on one bridge, links that can be cut (root on Linux; the host has no part in it)."""

import os
import shutil
import subprocess
import uuid
from types import TracebackType
from typing import Self

from tests.support.required import missing


class Machines:
    """`with Machines(3) as machines`: number 0, 1, 2 at `address(n)`; a command runs on one with `inside(n)` before its words."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._names = f"mw{uuid.uuid4().hex[:6]}"

    def __enter__(self) -> Self:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            missing("netns", "needs root and the command `ip` (iproute2)")
        try:
            self._ip("netns", "add", self._switch)
        except subprocess.CalledProcessError as error:
            missing("netns", error.stderr.strip())
        try:
            self._ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            self._ip("-n", self._switch, "link", "set", "bridge", "up")
            for number in range(self._count):
                self._add(number)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name in (*map(self._name, range(self._count)), self._switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def address(self, number: int) -> str:
        """Of a machine, on its interface eth0."""
        return f"10.77.0.{number + 1}"

    def host(self, number: int) -> str:
        """Name of a machine, where it has a mount of its own."""
        return self._name(number)

    def inside(self, number: int, own_mount: str | None = None) -> list[str]:
        """Words before a command that is to run on a machine; with `own_mount` it alone sees what it writes below that folder, under its `host`."""
        words = ["ip", "netns", "exec", self._name(number)]
        if own_mount is None:
            return words
        script = 'mount -t tmpfs tmpfs "$0" && echo "$1" > /proc/sys/kernel/hostname && shift && exec "$@"'
        return [*words, "unshare", "--mount", "--uts", "sh", "-c", script, own_mount, self.host(number)]

    def cut(self, number: int) -> None:
        """The machine's cable is pulled."""
        self._ip("-n", self._switch, "link", "set", f"port{number}", "down")

    def heal(self, number: int) -> None:
        """It is put back."""
        self._ip("-n", self._switch, "link", "set", f"port{number}", "up")

    @property
    def _switch(self) -> str:
        return f"{self._names}s"

    def _name(self, number: int) -> str:
        return f"{self._names}m{number}"

    def _add(self, number: int) -> None:
        name = self._name(number)
        self._ip("netns", "add", name)
        self._ip("-n", self._switch, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
        self._ip("-n", self._switch, "link", "set", f"port{number}", "master", "bridge")
        self._ip("-n", self._switch, "link", "set", f"port{number}", "up")
        self._ip("-n", name, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            self._ip("-n", name, "link", "set", interface, "up")

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
