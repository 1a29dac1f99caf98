"""A real Ray cluster of several nodes on this machine, for tests that lose some of them. Ends exactly what it started."""

import os
from pathlib import Path
from typing import Any, Self


class Nodes:
    """A head without CPUs and worker nodes of one CPU each: `with Nodes(workers=2) as cluster`. Jobs connect to `address`."""

    def __init__(self, workers: int) -> None:
        self._wanted = workers
        self._cluster: Any = None

    def __enter__(self) -> Self:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        for _ in range(self._wanted):
            self.add_node()
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()

    @property
    def address(self) -> str:
        """Of the head."""
        return self._cluster.address

    def worker_nodes(self) -> list[Any]:
        """The living nodes but the head."""
        return sorted(self._cluster.worker_nodes, key=lambda node: node.node_id)

    def add_node(self) -> Any:
        """One more node of one CPU."""
        return self._cluster.add_node(num_cpus=1)

    def kill_node(self, node: Any) -> None:
        """As a power cut does: its raylet and its workers are gone."""
        self._cluster.remove_node(node, allow_graceful=False)

    def raylet_pid(self, node: Any) -> int:
        """Process of a node's raylet."""
        return node.all_processes["raylet"][0].process.pid

    def node_of(self, pid: int) -> Any:
        """The node under whose raylet a process runs."""
        parents = {self.raylet_pid(node): node for node in self.worker_nodes()}
        while pid > 1 and pid not in parents:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return parents[pid]
