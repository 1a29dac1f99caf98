"""A process on each node of a cluster, pinned to it by Ray's id, whose answers are awaited for a limited time (starts Ray actors)."""

import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_pipeline.errors import MaskwrightError
from launcher.aside import Aside
from launcher.clusters.existing import asking_the_head
from launcher.measurements import KnownNode
from launcher.node_facts import DASHBOARD, GCS, RAYLET
from launcher.roster import Answer, Call

_ANSWER_S = 10.0
_ON_THE_WAY_S = 5.0
"""What an answer may take beyond the call itself."""
_RECENT_S = 3600.0
"""Nodes that died longer ago are history: somebody has gone on without them."""
_DEAD, _UNEXPECTED = 1, 2
"""Ray's numbers (gcs.proto) for the state of a node, and for a death that nobody had asked for."""


def known_nodes() -> list[KnownNode]:
    """Every node that Ray has, those first on which ranks may be placed, and those that it has lost in the last hour and that did not come back.

    Raises:
        UnreachableError: the head does not answer now.
    """
    from ray._private.state import available_resources_per_node, state
    from ray._private.worker import global_worker

    worker: Any = global_worker
    with asking_the_head():
        nodes: Collection[Any] = worker.gcs_client.get_all_node_info(timeout=_ANSWER_S).values()
        free, leaving = available_resources_per_node(), state.get_draining_nodes()
    here = ray.get_runtime_context().get_node_id()
    known = [_as_known(node, free, here, node.node_id.hex() in leaving) for node in there_or_missed(nodes, time.time())]
    return sorted(known, key=lambda node: (not node.trains, node.address, node.id))


def there_or_missed(nodes: Collection[Any], now: float) -> list[Any]:
    """Ray's records of nodes that live, and of those that nobody took away, lost not long ago and not replaced (pure)."""
    alive = [node for node in nodes if node.state != _DEAD]
    dead = [node for node in nodes if node.state == _DEAD and node.death_info.reason == _UNEXPECTED]
    return [*alive, *(node for node in dead if node.end_time_ms / 1000 > now - _RECENT_S and not _came_back(node, alive))]


def _came_back(node: Any, alive: Collection[Any]) -> bool:
    """Under another id: Ray was started there again."""
    return any(other.node_manager_address == node.node_manager_address and other.start_time_ms >= node.end_time_ms for other in alive)


def _as_known(node: Any, free: Mapping[str, Mapping[str, float]], here: str, is_leaving: bool) -> KnownNode:
    name, has = node.node_id.hex(), dict(node.resources_total)
    unused = free.get(name, has)
    return KnownNode(
        id=name,
        address=node.node_manager_address,
        host=node.node_manager_hostname,
        num_cpus=has.get("CPU", 0.0),
        num_gpus=has.get("GPU", 0.0),
        object_store_bytes=has.get("object_store_memory", 0.0),
        is_here=name == here,
        is_busy=any(unused.get(kind, 0.0) < has.get(kind, 0.0) for kind in ("CPU", "GPU")),
        is_leaving=is_leaving,
        gone=(node.death_info.reason_message or "Ray has lost it") if node.state == _DEAD else "",
        ports={RAYLET: node.node_manager_port, **(_ports_of_head() if node.is_head_node else {})},
    )


def _ports_of_head() -> dict[str, int]:
    from ray._private.worker import global_worker

    here: Any = global_worker.node
    addresses = {GCS: here.gcs_address, DASHBOARD: here.address_info.get("webui_url") or ""}
    return {what: int(port) for what, address in addresses.items() if (port := address.rpartition(":")[2]).isdigit()}


class _Process:
    """Runs calls on its node. One that hangs costs a thread; the next is answered all the same."""

    def call(self, call: Call, within_s: float) -> Answer:
        try:
            return Answer(Aside(call).ask(within_s))
        except MaskwrightError as error:
            return Answer(error=error.cause)
        except BaseException as error:  # noqa: BLE001  # the driver is told
            return Answer(error=_told(error))


class RayProbes:
    """`Probes` through Ray. They take none of what Ray gives out, so that a busy node answers, too."""

    def __init__(self, nodes: Sequence[str]) -> None:
        actor: Any = ray.remote(num_cpus=0, max_restarts=0)(_Process)
        self._processes = {node: actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes}

    def ask(self, calls: Mapping[str, Call], within_s: float) -> Mapping[str, Answer]:
        """See `Probes.ask`."""
        asked = {node: self._processes[node].call.remote(call, within_s) for node, call in calls.items()}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=within_s + _ON_THE_WAY_S)
        return {node: _answer(reference, within_s) for node, reference in asked.items()}

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes.values():
            with suppress(RayError, ValueError):
                ray.kill(process)


@contextmanager
def probing(nodes: Sequence[str]) -> Generator[RayProbes]:
    """A process on each of these nodes, for the length of a `with` block."""
    probes = RayProbes(nodes)
    try:
        yield probes
    finally:
        probes.close()


def _answer(reference: Any, within_s: float) -> Answer:
    try:
        return ray.get(reference, timeout=0)
    except GetTimeoutError:
        return Answer(lost=f"no answer in {within_s + _ON_THE_WAY_S:.0f} s")
    except RayError as error:
        return what_failed(error)


def what_failed(error: RayError) -> Answer:
    """A process that lives and cannot import what it is sent is no dead node."""
    has_run = isinstance(error, RayTaskError) or (isinstance(error, RayActorError) and error.actor_init_failed)
    return Answer(error=_told(error)) if has_run else Answer(lost=_told(error))


def _told(error: BaseException) -> str:
    """The line of an exception that says something; Ray's are whole pages, the cause at their end."""
    text = str(error).partition(" Some common causes include")[0].removesuffix(_NEVER_RAN)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


_NEVER_RAN = "The actor never ran - it was cancelled before it started running."
