"""What is made of Ray's records of nodes and of its exceptions; processes on real nodes: tests/chaos/test_doctor.py."""

from typing import Any

import pytest

NOW = 1_000_000.0
UNEXPECTED, ASKED_FOR = 2, 1


def record(address: str, *, started: float = 0.0, ended: float | None = None, reason: int = UNEXPECTED) -> Any:
    """As Ray's head keeps it, times in seconds before now."""
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    node = GcsNodeInfo(node_manager_address=address, start_time_ms=int(1000 * (NOW - started)))
    if ended is not None:
        node.state = GcsNodeInfo.GcsNodeState.DEAD
        node.end_time_ms = int(1000 * (NOW - ended))
        node.death_info.reason = reason
    return node


@pytest.mark.parametrize(
    ("dead", "is_missed"),
    [
        (record("10.0.0.2", ended=60), True),
        (record("10.0.0.2", ended=60, reason=ASKED_FOR), False),
        (record("10.0.0.2", ended=7200), False),
        (record("10.0.0.1", ended=60), False),
        (record("10.0.0.1", ended=10), True),
    ],
    ids=["just died", "was taken away", "died long ago", "came back under another id", "shared its address with one that lives"],
)
def test_dead_nodes_that_are_missed(dead: Any, is_missed: bool) -> None:
    from launcher.clusters.probing import there_or_missed

    alive = record("10.0.0.1", started=30)
    assert there_or_missed([dead, alive], NOW) == ([alive, dead] if is_missed else [alive])


def test_a_process_that_cannot_import_our_code_is_no_dead_node() -> None:
    from ray.exceptions import ActorDiedError, RayTaskError

    from launcher.clusters.probing import what_failed

    traceback = "ray::_Process.call()\nRuntimeError: The actor failed to import\n\nModuleNotFoundError: No module named 'launcher'\n"
    task = RayTaskError("call", traceback, ModuleNotFoundError("No module named 'launcher'"))
    for error in (task, ActorDiedError(task)):
        answer = what_failed(error)
        assert (answer.error, answer.lost) == ("ModuleNotFoundError: No module named 'launcher'", "")


def test_the_death_of_a_process_says_why() -> None:
    from ray.core.generated.common_pb2 import ActorDiedErrorContext
    from ray.exceptions import ActorDiedError

    from launcher.clusters.probing import what_failed

    cause = ActorDiedErrorContext(
        actor_id=bytes(16), class_name="_Process", error_message="The actor died because its node has died.", never_started=True
    )
    answer = what_failed(ActorDiedError(cause))
    assert (answer.error, answer.lost) == ("", "The actor died because its node has died.")
