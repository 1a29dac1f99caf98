"""Ray clusters of several nodes on this machine: each node a `ray start` of its own, ended by its mark, never by name."""

import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

from tests.support.commands import Command

LOOPBACK = "127.0.0.2"
START_S = 90.0


def free_port(address: str) -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


@dataclass
class RayNode(Command):
    """A node: `ray start --block` and all that it starts, its ranks included."""

    program: str = "ray.scripts.scripts"

    def raylet(self) -> int:
        """Process of its raylet."""
        found = [pid for pid in self.processes() if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(b"/raylet")]
        assert len(found) == 1, f"{len(found)} raylets\n{self.text()}"
        return found[0]

    def id(self) -> str:
        """Ray's id of it."""
        return re.findall(r"--node_id=(\w+)", Path(f"/proc/{self.raylet()}/cmdline").read_text().replace("\0", " "))[0]


@dataclass
class RayCluster:
    """A head without CPUs, where the driver runs, and nodes that come and go. Use as a context manager."""

    folder: Path
    """Of the nodes' output; what they share."""
    environment: dict[str, str] = field(default_factory=dict)
    token: bool = True
    """Whether its ports answer only to who has a token; `environment` then says where it lies."""
    address: str = LOOPBACK
    inside: Sequence[str] = ()
    head_cpus: int = 0
    takes_jobs: bool = False
    """Whether it has a dashboard, through which jobs are submitted."""
    nodes: list[RayNode] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray puts sockets below it
        self.environment = {**_QUIET, **(self._new_token() if self.token else {"RAY_AUTH_MODE": "disabled"}), **self.environment}
        self.port = free_port("127.0.0.1")
        head = [
            "--head",
            f"--port={self.port}",
            f"--temp-dir={self.temporary}",
            *self._dashboard_options(),
            "--disable-usage-stats",
            f"--num-cpus={self.head_cpus}",
        ]
        self.head = self._start(head, self.address, self.inside)
        try:
            self._wait_for(1)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _dashboard_options(self) -> list[str]:
        if not self.takes_jobs:
            return ["--include-dashboard=false"]
        port = free_port("127.0.0.1")
        self.dashboard = f"http://{self.address}:{port}"
        return ["--include-dashboard=true", f"--dashboard-host={self.address}", f"--dashboard-port={port}"]

    def _new_token(self) -> dict[str, str]:
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for node in [*self.nodes, self.head]:
            node.kill_everything()
        subprocess.run(["rm", "-rf", self.temporary], check=True)

    def add_node(
        self, num_cpus: int = 1, address: str | None = None, inside: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> RayNode:
        """Start a node, with more in its environment than the others have, and wait until it has joined."""
        joins = [f"--address={self.address}:{self.port}", f"--num-cpus={num_cpus}"]
        if self.takes_jobs:  # a node unpacks a job's packages anew, over those that others use where they share a folder: machines do not
            joins.append(f"--temp-dir={self.temporary}/{len(self.nodes)}")
        node = self._start(joins, address or self.address, inside, environment)
        self.nodes.append(node)
        self._wait_for(1 + len(self.nodes))
        return node

    def kill_node(self, node: RayNode) -> None:
        """Take a machine away: every process of the node at once."""
        self.nodes.remove(node)
        node.kill_everything()

    def drain(self, node: RayNode, deadline_s: int) -> None:
        """As a cloud does that takes a machine back."""
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", f"--deadline-remaining-seconds={deadline_s}"]
        self._call(["-m", "ray.scripts.scripts", "drain-node", f"--address={self.address}:{self.port}", f"--node-id={node.id()}", *reason])

    def write_config(self, path: Path, **settings: object) -> Path:
        """A cluster YAML for it."""
        config = {"kind": "ray", "address": f"{self.address}:{self.port}", "threads_per_worker": 1, "use_gpu": False, **settings}
        if self.takes_jobs:
            config |= {"dashboard": self.dashboard, "environment": {"venv": sys.prefix}}
        path.write_text(yaml.safe_dump(config))
        return path

    def ask(self, program: str) -> str:
        """What a Python program prints that has joined the cluster."""
        join = f"import ray; ray.init(address='{self.address}:{self.port}', logging_level='ERROR', log_to_driver=False)\n"
        return self._call(["-c", join + program])

    def _call(self, arguments: Sequence[str]) -> str:
        command = [*self.inside, sys.executable, "-P", *arguments]
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _start(self, arguments: Sequence[str], address: str, inside: Sequence[str], environment: Mapping[str, str] | None = None) -> RayNode:
        own = ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        words = ["start", "--block", *arguments, f"--node-ip-address={address}", *own]
        return RayNode(words, self.folder, {**self.environment, **(environment or {})}, inside=inside or self.inside).start()

    def _wait_for(self, count: int) -> None:
        node = (self.nodes or [self.head])[-1]
        node.wait_until(lambda: "Ray runtime started" in node.text(), START_S)


_QUIET = {
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def cluster_of(folder: Path, num_nodes: int) -> Generator[RayCluster]:
    """A cluster with so many nodes of one CPU."""
    with RayCluster(folder) as cluster:
        for _ in range(num_nodes):
            cluster.add_node()
        yield cluster
