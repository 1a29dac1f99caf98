"""A Ray cluster that is there already: joins it as a driver, sees its nodes, and leaves it as it was (talks to Ray)."""

import os
import socket
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import UnreachableError, UsageError
from launcher.aside import Aside
from launcher.cluster_config import RayCluster
from launcher.clusters.local import (
    RAY_ENVIRONMENT,
    environment,
    keep_from_connecting,
    read_token_again,
    session_folder,
    silence_driver,
    undisturbed,
)
from launcher.clusters.tokens import has_token, require_token
from launcher.elastic import Node
from launcher.submission import SUBMISSION_VARIABLE

_ANSWER_S = 1.0
_RANK_ACTOR = "Rank"
"""The class of the actors that become ranks."""
_HEAD_ANSWER_S = 10.0
"""How long a head is waited for that may hang: Ray knows no time-out for most of what it asks it."""
_WORKER_ENVIRONMENT = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DISABLE_IMPORT_WARNING": "1", "TOKENIZERS_PARALLELISM": "false"}
"""What processes on the cluster's nodes need and do not inherit from us. Anybody can read it there: never a secret."""


@contextmanager
def existing_cluster(config: RayCluster) -> Generator[Path]:
    """Join the cluster, yield a scratch folder on this machine, and leave.

    What was put on the cluster belongs to this driver's Ray job and goes with it, also when this process is killed. The cluster stays.

    Raises:
        UnreachableError: there is no such cluster, this machine is not one of its nodes, or it would be talked to without a token of our own.
        UsageError: its software comes with submitted runs only.
    """
    _require_software(config)
    scratch = session_folder()
    token = {"RAY_AUTH_MODE": "token"} if has_token() else {}
    try:
        with environment({**RAY_ENVIRONMENT, **token}):
            import ray

            read_token_again()
            require_token(find_address(config.address), has_token=bool(token))
            try:
                _join(ray, config, scratch.path)
                silence_driver(ray)
                keep_from_connecting(ray)
                yield scratch.path
            finally:
                ray.shutdown()
    finally:
        scratch.remove()


def _require_software(config: RayCluster) -> None:
    if config.environment is not None and config.environment.pip is not None and SUBMISSION_VARIABLE not in os.environ:
        raise UsageError("environment.pip is installed for a submitted run, which this is not", "Use `maskwright submit`, or environment.venv.")


def _join(ray: Any, config: RayCluster, folder: Path) -> None:
    import logging

    software = {"py_executable": config.environment.python} if config.environment and config.environment.venv else {}
    try:
        with undisturbed(folder):
            ray.init(
                address=config.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                runtime_env={"env_vars": _WORKER_ENVIRONMENT, **software},
            )
    except (RuntimeError, ConnectionError, TimeoutError, OSError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        remedy = "Start the command on a machine of the cluster, with the cluster's token, the same Python and the same Ray (`ray status` shows it)."
        raise UnreachableError(f"could not join the Ray cluster at {config.address}: {first}", remedy) from error


def find_address(address: str) -> str:
    """`host:port` of the cluster; `auto` is what Ray itself would take (RAY_ADDRESS, else the cluster on this machine).

    Raises:
        UnreachableError: there is none.
    """
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address(address)
    except (ConnectionError, ValueError, OSError) as error:
        raise UnreachableError(f"there is no Ray cluster at {address}: {error}", "Start one with `ray start --head`, or correct address.") from error
    if found is None:
        raise UnreachableError("there is no Ray cluster on this machine", "Start one with `ray start --head`, or set address.")
    return found


def live_nodes(sure: bool) -> list[Node]:
    """The nodes that take work now: alive, not about to be taken away, and (`sure`) answering, which one that has just died does not.

    Raises:
        UnreachableError: the head does not answer now.
    """
    import ray
    from ray._private.state import available_resources_per_node

    leaving = draining_nodes()
    with asking_the_head():
        free, known = available_resources_per_node(), ray.nodes()
    nodes = [node for node in known if node["Alive"] and node["NodeID"] not in leaving and node["NodeID"] in free]
    if sure:
        with ThreadPoolExecutor(max_workers=32) as threads:
            answering = list(threads.map(answers, nodes))
        nodes = [node for node, answer in zip(nodes, answering, strict=True) if answer]
    return [_as_node(node, free[node["NodeID"]]) for node in nodes]


def remove_placement_groups() -> None:
    """Give back what an attempt of this driver had reserved, if its controller did not; whatever runs there ends. (With the driver, all of it goes.)

    Raises:
        UnreachableError: the head does not answer within seconds. When it does at last, nothing is removed: that may be another attempt's.
    """
    given_up = threading.Event()
    with asking_the_head():
        try:
            Aside(lambda: _remove_placement_groups(given_up)).ask(_HEAD_ANSWER_S)
        finally:
            given_up.set()


def _remove_placement_groups(given_up: threading.Event) -> None:
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    groups: dict[str, dict[str, Any]] = placement_group_table()
    job: str = ray.get_runtime_context().get_job_id()
    for name, group in groups.items():
        if name.endswith(job) and group["state"] != "REMOVED" and not given_up.is_set():
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


class Process(NamedTuple):
    """A process of a worker group, as Ray knows it."""

    pid: int
    started: str
    """Empty: Ray does not know it."""
    node: str
    host: str


def starting_processes() -> dict[int, Process]:
    """Processes that are to become ranks of this driver's worker group, numbered from 0; where some have not begun to answer, those.

    Raises:
        UnreachableError: the head does not answer now.
    """
    import ray
    from ray._private.state import state

    with asking_the_head():
        job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
        hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
        actors = sorted(state.actor_table(None, job_id=job).items())
    ranks = [actor for _, actor in actors if actor["ActorClassName"] == _RANK_ACTOR]
    there = {number: actor for number, actor in enumerate(ranks) if actor["Pid"] and actor["State"] != "DEAD"}
    late = {number: actor for number, actor in there.items() if actor["State"] != "ALIVE"} or there
    places = {number: (actor["Pid"], actor["Address"]["NodeID"]) for number, actor in late.items()}
    return {number: Process(pid, "", node, hosts.get(node, node)) for number, (pid, node) in places.items()}


def draining_nodes() -> dict[str, int]:
    """Ids of the nodes that are about to be taken away, with the instant (Unix milliseconds; 0 where nobody knows).

    Raises:
        UnreachableError: the head does not answer now.
    """
    from ray._private.state import state

    with asking_the_head():
        return state.get_draining_nodes()


@contextmanager
def asking_the_head() -> Generator[None]:
    """Turn whatever a question to the head fails with into an UnreachableError."""
    try:
        yield
    except Exception as error:  # gRPC's errors as well as Ray's own, and RuntimeErrors of both
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnreachableError(f"the head of the Ray cluster does not answer: {first}", "Look at the cluster (`ray status`).") from error


def answers(node: dict[str, Any]) -> bool:
    """Whether something listens at the node's port. Ray itself may take half a minute to learn that a node has gone."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True


def _as_node(node: dict[str, Any], free: dict[str, float]) -> Node:
    total: dict[str, float] = node["Resources"]
    return Node(node["NodeManagerAddress"], total.get("CPU", 0), total.get("GPU", 0), free.get("CPU", 0), free.get("GPU", 0), node["NodeID"])
