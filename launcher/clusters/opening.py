"""Opens the cluster that a cluster YAML describes: the dictionary of its kinds (starts or joins Ray)."""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError
from launcher.cluster_config import Cluster, LocalCluster, RayCluster
from launcher.clusters.local import Machine, Workers, local_cluster, resolve_workers
from launcher.clusters.sizing import Sizing
from launcher.elastic import Work, require_work


@dataclass(frozen=True)
class OpenCluster:
    """A cluster that this process drives."""

    scratch: Path
    """A folder on this machine that lives as long as the connection."""
    sizing: Sizing | None = None
    """Sizes each attempt; None where every one is the same."""


def open_cluster(
    config: Cluster, workers: Workers | None, machine: Machine, work: Callable[[], Sequence[Work]], stopped: Callable[[], bool]
) -> AbstractContextManager[OpenCluster]:
    """The cluster, for the length of a `with` block. Call it on the main thread: see `local_cluster`.

    Raises:
        EnvironmentMismatchError, UnreachableError: Ray does not start or answer. UsageError: it is driven from inside only.
    """
    require_driven_from_here(config)
    kinds: dict[str, Callable[[Any], AbstractContextManager[OpenCluster]]] = {
        "local": lambda found: _local(found, workers, machine),
        "ray": lambda found: _existing(found, work, stopped),
    }
    return kinds[config.kind](config)


def require_driven_from_here(config: Cluster) -> None:
    """Refuse a kind of cluster that takes a run only as a job.

    Raises:
        UsageError: it is one.
    """
    if not isinstance(config, LocalCluster | RayCluster):
        raise UsageError(f"no command here drives a cluster of kind {config.kind}", "Give the run to it: `maskwright submit CONFIG --cluster …`.")


def workers_of(config: Cluster, machine: Machine, num_micro_batches: int | None = None) -> Workers | None:
    """What is known of the worker groups before there is a cluster: all where it is this machine, nothing (None) elsewhere.

    Raises:
        ConfigError: the cluster file asks for what the machine, or a step of `num_micro_batches`, cannot give.
        UsageError: nobody drives a run from outside on this kind of cluster.
    """
    require_driven_from_here(config)
    if isinstance(config, LocalCluster):
        return resolve_workers(config, machine, num_micro_batches)
    assert isinstance(config, RayCluster)
    if num_micro_batches is not None:
        require_work(config.min_workers or (1 if config.num_workers == "auto" else config.num_workers), num_micro_batches)
    return None


@contextmanager
def _local(config: LocalCluster, workers: Workers | None, machine: Machine) -> Generator[OpenCluster]:
    group = workers or resolve_workers(config, machine)
    with local_cluster(config, group, machine) as scratch:
        yield OpenCluster(scratch)


@contextmanager
def _existing(config: RayCluster, work: Callable[[], Sequence[Work]], stopped: Callable[[], bool]) -> Generator[OpenCluster]:
    from launcher.clusters.existing import existing_cluster, live_nodes

    sizing = Sizing(config, live_nodes, work, stopped)
    with existing_cluster(config) as scratch:
        yield OpenCluster(scratch, sizing)
