"""The driver's watch over one attempt: names ranks that stand still, collects stacks, ends the group, asks it to save (a thread).

It must see and act while storage or the head hangs, so that it waits for neither: what asks them is done aside.
"""

import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from data_pipeline.errors import MaskwrightError
from launcher.aside import Aside
from launcher.attempts import stacks_folder
from launcher.elastic import Pace
from launcher.health import Beat, Deadlines, Health, Seen, State, Verdict, is_numbered, judge
from launcher.rank_watch import SAVE, STACKS
from trainer.runlog import RunFolder

_LOOK_S = 0.5
_ASK_FOR_REASONS_S = 1.0
_ANSWER_S = 0.25
"""How long a look waits for what may hang, storage and the cluster's head; what they answer later is taken at a later look."""
_RECORD_S = 3.0
"""How long the end of a group waits for what is written about it."""
_STACKS_S = 4.0
"""How long ranks are given to write down their stacks."""
_MOST_DESCRIBED = 8
"""Of the ranks of a lost node; the others are like them."""


class SaveReason(Enum):
    """Why all ranks were asked to save and end."""

    REQUEST = "request"
    """A person wants it: stop, Ctrl-C."""
    PREEMPTION = "preemption"
    """A node is about to be taken away."""
    GROWTH = "growth"
    """The cluster has grown, and more ranks pay."""


@dataclass(frozen=True)
class Member:
    """Where a rank is, and what ends it."""

    pid: int
    started: str
    """When its process started (`process_start`): a later one may have its number. Empty until the rank itself has said it."""
    node: str
    """Ray's id of its node."""
    host: str
    actor: Any


class Group(Protocol):
    """The ranks of an attempt, as far as the driver can see and reach them."""

    @property
    def members(self) -> Mapping[int, Member]:
        """The ranks whose processes are known, or processes that are to become ranks (see `is_numbered`)."""
        ...

    def look(self) -> Mapping[int, tuple[int, Beat]] | None:
        """By rank, how many beats there were, and the last (`UNHEARD` before the first); None once the group is being ended."""
        ...

    def see(self, ranks: list[int]) -> Mapping[int, tuple[Seen, str]]:
        """What is seen of these ranks' processes, and what the system says of them. Does not wait."""
        ...

    def tell(self, command: str) -> None:
        """Give a command to all ranks."""
        ...

    def obeyed(self, command: str) -> int:
        """How many ranks have done what they were told."""
        ...

    def draining(self) -> Mapping[str, int]:
        """Nodes of its ranks that are about to be taken away, with the instant (Unix milliseconds, 0 where unknown)."""
        ...

    def end(self) -> None:
        """End every rank, whatever state it is in."""
        ...


@dataclass
class GroupWatch:
    """Watches one attempt. What it finds is in `verdict` and `save_reason` when the attempt has ended."""

    run: RunFolder
    attempt: int
    world_size: int
    deadlines: Deadlines
    say: Callable[[str], None]
    why_save: Callable[[], SaveReason | None]
    """Asked about once a second whether the ranks should save and end; nodes that are taken away are found without it."""
    verdict: Verdict | None = None
    save_reason: SaveReason | None = None
    leaving: tuple[str, ...] = ()
    """Hosts that are about to be taken away."""
    members: Mapping[int, Member] = field(default_factory=dict[int, Member])
    health: Health = field(default_factory=Health)
    pace: Pace = field(default_factory=Pace)
    _asked_at: float = 0.0
    _reasons: Aside[tuple[SaveReason | None, Mapping[str, int]]] | None = None

    @contextmanager
    def over(self, group: Group) -> Generator[None]:
        """Watch over `group` from a thread for the length of the block."""
        done, failures = threading.Event(), list[Exception]()

        def watch() -> None:
            looked_at = time.monotonic()
            while not done.wait(_LOOK_S) and self.verdict is None:
                looked_at, before = time.monotonic(), looked_at
                try:
                    self.look(group, looked_at - before)
                except Exception as error:  # noqa: BLE001 - raised on the thread that waits for the group, which must not run unwatched
                    failures.append(error)
                    group.end()
                    return

        thread = threading.Thread(target=watch, daemon=True, name="group watch")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(timeout=30.0)
        if failures:
            raise failures[0]

    def look(self, group: Group, elapsed_s: float) -> None:
        """Follow the ranks, and act on what is found."""
        if (sightings := group.look()) is None:
            return
        self.members = group.members
        self.pace = self.pace.after(self.health.step(self.world_size), elapsed_s)
        # A driver that was itself held up has not been looking: that time says nothing about the ranks.
        self.health = self.health.after(sightings, min(elapsed_s, 4 * _LOOK_S))
        seen = group.see(self.health.suspects(self.deadlines.interval_s))
        verdict = judge(self.health, {rank: state for rank, (state, _) in seen.items()}, self.world_size, self.deadlines)
        if verdict is not None:
            self._end(group, verdict, {rank: text for rank, (_, text) in seen.items()})
            return
        self._ask_to_save(group)

    def _ask_to_save(self, group: Group) -> None:
        if self.save_reason is not None or time.monotonic() - self._asked_at < _ASK_FOR_REASONS_S:
            return
        self._asked_at = time.monotonic()
        self._reasons = self._reasons or Aside(lambda: self._find_reason(group))
        with suppress(MaskwrightError, OSError):  # what fails or hangs for a moment ends no run; the next look is soon
            self.save_reason, draining = self._reasons.ask(_ANSWER_S)
            if self.save_reason is SaveReason.PREEMPTION:
                self._note_preemption(draining)
        if self.save_reason is not None:
            group.tell(SAVE)

    def _find_reason(self, group: Group) -> tuple[SaveReason | None, Mapping[str, int]]:
        draining = group.draining()
        return (SaveReason.PREEMPTION if draining else self.why_save()), draining

    def _note_preemption(self, draining: Mapping[str, int]) -> None:
        """Say which hosts are taken away, and when (Unix milliseconds; 0 where nobody knows)."""
        self.leaving = tuple(sorted({member.host for member in self.members.values() if member.node in draining}))
        deadline = min((at / 1000 for at in draining.values() if at), default=None)
        self.say(f"  {', '.join(self.leaving)} will be taken away: saving a checkpoint")
        Aside(lambda: self.run.append_event("preempted", attempt=self.attempt, nodes=list(self.leaving), deadline=deadline)).ask(_ANSWER_S)

    def _end(self, group: Group, verdict: Verdict, texts: Mapping[int, str]) -> None:
        self.verdict = verdict
        self.say(f"  {describe(verdict, group.members)}; ending the attempt")
        try:
            self._wait_for_stacks(group, len(texts))
            Aside(lambda: self._record(group.members, verdict, texts)).ask(_RECORD_S)
        except (MaskwrightError, OSError) as error:
            self.say(f"  what is wrong could not be recorded: {error}")
        finally:
            group.end()

    def _wait_for_stacks(self, group: Group, num_silent: int) -> None:
        """Ranks that answer write their own."""
        group.tell(STACKS)
        deadline = time.monotonic() + _STACKS_S + self.deadlines.interval_s
        while group.obeyed(STACKS) < len(group.members) - num_silent and time.monotonic() < deadline:
            time.sleep(0.1)

    def _record(self, members: Mapping[int, Member], verdict: Verdict, texts: Mapping[int, str]) -> None:
        """The verdict; and of ranks that do not answer, what the system says of their process."""
        folder = stacks_folder(self.run, self.attempt)
        for rank in verdict.ranks[:_MOST_DESCRIBED]:
            if rank in texts and is_numbered(rank):
                with suppress(MaskwrightError, OSError):
                    (folder / f"rank-{rank:05d}.txt").write_bytes(f"{describe(verdict, members)}\n\n{texts[rank]}".encode())
        member = members.get(verdict.rank)
        self.run.append_event(
            "rank_unhealthy",
            attempt=self.attempt,
            step=verdict.step,
            rank=verdict.rank if is_numbered(verdict.rank) else None,
            ranks=list(filter(is_numbered, verdict.ranks)),
            node=member.host if member else None,
            pid=member.pid if member else None,
            phase=verdict.phase,
            state=verdict.state.value,
            seconds=round(verdict.seconds, 1),
            stacks=folder.url,
        )


def describe(verdict: Verdict, members: Mapping[int, Member]) -> str:
    """A verdict in a line: who, where, what, since when."""
    member = members.get(verdict.rank)
    where = f" on {member.host} (process {member.pid})" if member else ""
    more, has = (f" and {len(verdict.ranks) - 1} more", "have") if len(verdict.ranks) > 1 else ("", "has")
    what = f"{has} {_WHAT[verdict.state]} for {verdict.seconds:.0f} s"
    who = f"rank {verdict.rank}" if is_numbered(verdict.rank) else "a rank"
    return f"{who}{where}{more} {what} in {verdict.phase} of step {verdict.step}"


_WHAT = {State.STOPPED: "been stopped", State.HUNG: "made no progress", State.SILENT: "not been heard of"}
