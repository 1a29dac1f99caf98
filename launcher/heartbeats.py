"""The seam between ranks and the driver while an attempt runs: what ranks say when Ray Train's controller polls them, and commands to them."""

import importlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_pipeline.errors import UnreachableError
from data_pipeline.storage import Location
from launcher.aside import Aside
from launcher.clusters.existing import Process, draining_nodes, remove_placement_groups, starting_processes
from launcher.group_watch import Member
from launcher.health import UNHEARD, Beat, Seen
from launcher.lease import process_start
from launcher.process_table import see_processes
from launcher.rank_log import keep_logs_of_killed
from launcher.rank_watch import Reply, watch_of_process

_ANSWER_S = 5.0
_KEEP_LOGS_S = 15.0
_LOOK_AT_PROCESSES_S = 5.0
"""Between two looks at all processes of a group that has no ranks yet, which the head is asked for."""


@dataclass
class Status(WorkerStatus):
    """Ray Train's, of a rank that says where it is."""

    reply: Reply | None = None


class Rank(RayTrainWorker):
    """Ray Train's worker, an actor whose own thread does not train: it says where the rank is when it is polled, and takes commands.

    A thread of Ray's that has nothing to do asks Python for signals a hundred times a second, each time for the interpreter that training
    needs: half a percent of a core, and more where ranks wait for each other. While it waits in a call of ours, it does not. A command is taken
    when that is over.
    """

    def poll_status(self) -> Status:
        """See Ray's; with it goes what the rank's watch says, while there is one, when a beat is due or the rank has ended."""
        watch = watch_of_process()
        if watch is not None:
            watch.rest()
        return Status(**vars(super().poll_status()), reply=watch.reply() if watch else None)

    def obey(self, command: str) -> None:
        """Do what the driver tells; it tells again until the rank has said that it did."""
        if (watch := watch_of_process()) is not None:
            watch.obey(command)


def is_driver_there() -> bool | None:
    """Whether the cluster knows this rank's driver to be alive, be it stopped or slow; None where nobody answers."""

    def ask() -> bool:
        head: Any = importlib.import_module("ray._private.worker").global_worker.gcs_client
        name = ray.get_runtime_context().get_job_id()
        # By default the head asks the driver, too.
        found = head.get_all_job_info(
            job_or_submission_id=name, skip_submission_job_info_field=True, skip_is_running_tasks_field=True, timeout=_ANSWER_S
        )
        return not found[ray.JobID(bytes.fromhex(name))].is_dead

    try:
        return Aside(ask).ask(_ANSWER_S)
    except Exception:  # noqa: BLE001 - whatever keeps the head from answering: the network was cut
        return None


class Polls(WorkerGroupCallback):
    """Tells a group what Ray Train's controller hears of its ranks."""

    def __init__(self, group: "RayGroup") -> None:
        self._group = group

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Ranks have their numbers. What stops or hangs before it says anything is seen all the same."""
        self._group.expect({worker.distributed_context.world_rank: _member_of(worker) for worker in worker_group.get_workers()})

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Some ranks have answered."""
        statuses: dict[int, Any] = worker_group_status.worker_statuses
        self._group.hear({rank: reply for rank, status in statuses.items() if (reply := getattr(status, "reply", None)) is not None})

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Nobody is polled any more."""
        self._group.is_ending = True


def _member_of(worker: Any) -> Member:
    """What Ray knows of a worker's process."""
    known = worker.metadata
    return Member(known.pid, "", known.node_id, known.hostname, worker.actor)


@dataclass
class RayGroup:
    """`Group` through the polls of Ray Train's controller, Ray and the process table. Polls come in on another thread than questions."""

    node: str
    """The driver's."""
    is_ending: bool = False
    """Ray Train has found what ends the group, and ends it: from now on silence means nothing."""
    _ranks: dict[int, Member] | None = None
    _unnumbered: dict[int, Member] = field(default_factory=dict[int, Member])
    _heard: dict[int, tuple[int, Reply]] = field(default_factory=dict[int, tuple[int, Reply]])
    _commands: tuple[str, ...] = ()
    _seen: dict[int, tuple[Seen, str]] = field(default_factory=dict[int, tuple[Seen, str]])
    _looking: dict[str, Any] = field(default_factory=dict[str, Any])
    _processes: Aside[dict[int, Process]] = field(default_factory=lambda: Aside(starting_processes))
    _processes_at: float = field(default_factory=time.monotonic)

    @classmethod
    def here(cls) -> "RayGroup":
        """A group of this driver's, of which no rank is there yet."""
        return cls(ray.get_runtime_context().get_node_id())

    @property
    def members(self) -> dict[int, Member]:
        """See `Group.members`."""
        return self._unnumbered if self._ranks is None else self._ranks

    def expect(self, ranks: dict[int, Member]) -> None:
        """These are the ranks."""
        self._ranks, self._heard, self.is_ending = ranks, {}, False

    def hear(self, replies: Mapping[int, Reply]) -> None:
        """What ranks have said when they were polled. One that has not obeyed yet is told again."""
        ranks, heard = dict(self.members), dict(self._heard)
        for rank, reply in replies.items():
            ranks[rank] = replace(ranks[rank], started=reply.started)
            heard[rank] = (heard[rank][0] + 1 if rank in heard else 1, reply)
            self._send(rank, [command for command in self._commands if command not in reply.obeyed])
        self._ranks, self._heard = ranks, heard

    def look(self) -> dict[int, tuple[int, Beat]] | None:
        """See `Group.look`."""
        if self.is_ending:
            return None
        if self._ranks is None:
            return self._look_at_processes()
        heard = self._heard
        return {rank: (heard[rank][0], heard[rank][1].beat) if rank in heard else (0, UNHEARD) for rank in self._ranks}

    def _look_at_processes(self) -> dict[int, tuple[int, Beat]]:
        """Processes that Ray has started and given no rank yet, as it does once all of them answer: one that is stopped keeps it from that."""
        if time.monotonic() > self._processes_at + _LOOK_AT_PROCESSES_S:
            with suppress(UnreachableError, TimeoutError):
                self._unnumbered = {-1 - number: Member(*process, actor=None) for number, process in self._processes.ask(_ANSWER_S).items()}
                self._processes_at = time.monotonic()
        return dict.fromkeys(self._unnumbered, (0, UNHEARD))

    def tell(self, command: str) -> None:
        """Give a command to all ranks."""
        if command not in self._commands:
            self._commands = (*self._commands, command)
            for rank in self.members:
                self._send(rank, [command])

    def _send(self, rank: int, commands: Iterable[str]) -> None:
        if (actor := self.members[rank].actor) is not None:
            for command in commands:
                with suppress(RayError):
                    actor.obey.remote(command)

    def obeyed(self, command: str) -> int:
        """How many ranks have said that they did what they were told."""
        return sum(command in reply.obeyed for _, reply in self._heard.values())

    def see(self, ranks: Iterable[int]) -> Mapping[int, tuple[Seen, str]]:
        """What is seen of the processes of silent ranks, and what the system says of them, as far as their nodes answer. Does not wait."""
        by_node: dict[str, dict[int, Member]] = {}
        for rank in ranks:
            if rank in self.members:
                by_node.setdefault(self.members[rank].node, {})[rank] = self.members[rank]
        asked = {rank for processes in by_node.values() for rank in processes}
        self._seen = {rank: seen for rank, seen in self._seen.items() if rank in asked}
        for node, members in by_node.items():
            processes = {rank: (member.pid, member.started) for rank, member in members.items()}
            if node == self.node:
                self._seen |= see_processes(processes)
            else:
                self._ask(node, processes)
        return self._seen

    def _ask(self, node: str, processes: dict[int, tuple[int, str]]) -> None:
        if (asked := self._looking.get(node)) is not None:
            if not ray.wait([asked], timeout=0)[0]:
                return
            with suppress(RayError):
                self._seen |= ray.get(asked)
        self._looking[node] = _on(node, see_processes).remote(processes)

    def end(self) -> None:
        """End every rank, whatever state it is in: Ray forgets its actor at once, and kills a process that does not answer within seconds.

        A rank that has not joined goes with the place that is reserved for it.
        """
        for member in self.members.values():
            with suppress(RayError, ValueError):
                ray.kill(member.actor)
            if member.node == self.node and member.started and process_start(member.pid) == member.started:
                with suppress(OSError):
                    os.kill(member.pid, signal.SIGKILL)  # a stopped process does not answer Ray; this spares its patience
        with suppress(UnreachableError):
            remove_placement_groups()

    def draining(self) -> Mapping[str, int]:
        """See `Group.draining`. Ray Train has a watcher of its own, whose answer is a barrier of all ranks."""
        try:
            nodes = draining_nodes()
        except UnreachableError:  # the head is busy or restarts, and is asked again in a second
            return {}
        own = {member.node for member in self.members.values()}
        return {node: deadline for node, deadline in nodes.items() if node in own}

    def keep_logs(self, logs: Mapping[int, Location]) -> None:
        """Have the nodes of ranks that were killed copy their logs to storage, as far as they do so within seconds."""
        by_node: dict[str, list[Location]] = {}
        for rank, log in logs.items():
            if rank in self.members:
                by_node.setdefault(self.members[rank].node, []).append(log)

        def copy() -> None:
            if copying := [_on(node, keep_logs_of_killed).remote(there) for node, there in by_node.items()]:
                ray.wait(copying, num_returns=len(copying), timeout=_KEEP_LOGS_S)

        with suppress(RayError, TimeoutError):  # why the attempt ended is the news
            Aside(copy).ask(_KEEP_LOGS_S + 1)  # a head that hangs does not even take the tasks


def _on(node: str, function: Callable[..., Any]) -> Any:
    """A function as a task of a node, which takes no place from a rank."""
    there: Any = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=there)
