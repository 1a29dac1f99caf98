"""The seam between ranks and the driver while an attempt runs: a board, on which ranks say where they are and find commands (a Ray actor)."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_pipeline.errors import UnreachableError
from data_pipeline.storage import Location
from launcher.aside import Aside
from launcher.clusters.existing import Process, draining_nodes, remove_placement_groups, starting_processes
from launcher.group_watch import BoardLostError, Member
from launcher.health import UNHEARD, Beat, Seen
from launcher.lease import process_start
from launcher.process_table import see_processes
from launcher.rank_log import keep_logs_of_killed

_ANSWER_S = 5.0
_KEEP_LOGS_S = 15.0
_LOOK_AT_PROCESSES_S = 5.0
"""Between two looks at all processes of a group that has no ranks yet, which costs the head more than a look at the board."""


class Board:
    """Beats of all ranks and commands to them. Knows nothing and decides nothing; one per attempt, on the driver's node."""

    def __init__(self) -> None:
        self._members: dict[int, Member] = {}
        self._beats: dict[int, tuple[int, Beat]] = {}
        self._obeyed: dict[int, tuple[str, ...]] = {}
        self._commands: tuple[str, ...] = ()

    def expect(self, members: dict[int, Member]) -> None:
        """Ranks whose processes are there: what stops or hangs before its first beat is seen all the same."""
        for rank, member in members.items():
            self._members.setdefault(rank, member)
            self._beats.setdefault(rank, (0, UNHEARD))

    def join(self, rank: int, member: Member) -> None:
        """A rank's first words."""
        self._members[rank] = member

    def beat(self, rank: int, beat: Beat, obeyed: tuple[str, ...]) -> tuple[str, ...]:
        """What a rank says about once a second; the answer is every command that was ever given."""
        self._beats[rank] = (self._beats.get(rank, (0, beat))[0] + 1, beat)
        self._obeyed[rank] = obeyed
        return self._commands

    def tell(self, command: str) -> None:
        """Give a command to all ranks."""
        if command not in self._commands:
            self._commands = (*self._commands, command)

    def look(self) -> dict[int, tuple[int, Beat]]:
        """By rank, how many beats there were, and the last."""
        return dict(self._beats)

    def members(self) -> dict[int, Member]:
        """All ranks that have joined."""
        return dict(self._members)

    def obeyed(self, command: str) -> list[int]:
        """The ranks that have done what they were told."""
        return [rank for rank, done in self._obeyed.items() if command in done]


@dataclass
class BoardLine:
    """`Line` through the board. Never more than one call is under way, so that a lost board costs a rank no memory."""

    board: Any
    rank: int
    _pending: Any = None

    def join(self) -> None:
        """Say who this rank is."""
        context = ray.get_runtime_context()
        member = Member(os.getpid(), process_start(os.getpid()), context.get_node_id(), socket.gethostname(), context.current_actor)
        self.board.join.remote(self.rank, member)

    def beat(self, beat: Beat, obeyed: tuple[str, ...]) -> tuple[str, ...] | None:
        """Say where this rank is; the commands so far, or None when the board has not answered."""
        if self._pending is None:
            self._pending = self.board.beat.remote(self.rank, beat, obeyed)
        try:
            answer: tuple[str, ...] | None = ray.get(self._pending, timeout=_ANSWER_S)
        except GetTimeoutError:
            return None
        except RayError:
            answer = None
        self._pending = None
        return answer

    def tell(self, command: str) -> None:
        """Give a command to all ranks, this one included."""
        with suppress(RayError):
            ray.get(self.board.tell.remote(command), timeout=_ANSWER_S)


@dataclass
class RayGroup:
    """`Group` through the board, Ray and the process table."""

    board: Any
    node: str
    """The driver's."""
    members: dict[int, Member] = field(default_factory=dict[int, Member])
    _seen: dict[int, tuple[Seen, str]] = field(default_factory=dict[int, tuple[Seen, str]])
    _looking: dict[str, Any] = field(default_factory=dict[str, Any])
    _processes: Aside[dict[int, Process]] = field(default_factory=lambda: Aside(starting_processes))
    _processes_at: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls) -> "RayGroup":
        """Make a board on this node."""
        node = ray.get_runtime_context().get_node_id()
        here: Any = NodeAffinitySchedulingStrategy(node, soft=False)
        return cls(ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote(), node)

    def look(self) -> dict[int, tuple[int, Beat]] | None:
        """By rank, how many beats there were, and the last; None when the board does not answer in time.

        Raises:
            BoardLostError: the board is gone.
        """
        try:
            sightings: dict[int, tuple[int, Beat]] = ray.get(self.board.look.remote(), timeout=_ANSWER_S)
            if not sightings:
                return self._look_at_processes()
            if any(self._is_new(rank, count) for rank, (count, _) in sightings.items()):
                self.members = ray.get(self.board.members.remote(), timeout=_ANSWER_S)
        except GetTimeoutError:
            return None
        except RayError as error:
            raise BoardLostError(str(error)) from error
        return sightings

    def _look_at_processes(self) -> dict[int, tuple[int, Beat]]:
        """Processes that Ray has started and given no rank yet, as it does once all of them answer: one that is stopped keeps it from that."""
        if time.monotonic() > self._processes_at + _LOOK_AT_PROCESSES_S:
            with suppress(UnreachableError, TimeoutError):
                self.members = {-1 - number: Member(*process, actor=None) for number, process in self._processes.ask(_ANSWER_S).items()}
                self._processes_at = time.monotonic()
        return dict.fromkeys(self.members, (0, UNHEARD))

    def _is_new(self, rank: int, count: int) -> bool:
        """Whether more is known of a rank than was: that it is there, and from its first beat on when its process started."""
        return rank not in self.members or (count > 0 and not self.members[rank].started)

    def tell(self, command: str) -> None:
        """Give a command to all ranks."""
        with suppress(RayError):
            ray.get(self.board.tell.remote(command), timeout=_ANSWER_S)

    def obeyed(self, command: str) -> int:
        """How many ranks have done what they were told."""
        try:
            return len(ray.get(self.board.obeyed.remote(command), timeout=_ANSWER_S))
        except RayError:
            return 0

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

    def close(self) -> None:
        """End the board."""
        with suppress(RayError, ValueError):
            ray.kill(self.board)


def _on(node: str, function: Callable[..., Any]) -> Any:
    """A function as a task of a node, which takes no place from a rank."""
    there: Any = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=there)
