"""Which rank stands still, and why: judged from what ranks say of themselves and what is seen of their processes (pure)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

DEADLINES_S: Mapping[str, float] = {
    "set-up": 900.0,
    "validation": 120.0,
    "checkpoint": 300.0,
    "data": 45.0,
    "agree": 45.0,
    "forward": 45.0,
    "backward": 45.0,
    "reduce": 45.0,
    "optimizer": 45.0,
}
"""Seconds that a rank may stay in a phase, on top of SLACK times the longest that any rank has taken for it in this attempt."""

FIRST_S = 900.0
"""Seconds for the first times in a phase, and at steps where shapes change: kernels are compiled, caches filled. A slow compile is not a hang."""

SLACK = 10.0
"""A rank that is some times slower than ever before (a busy machine, a throttled GPU) is slow, not hung."""

SUSPECT_S = 5.0
"""Silence after which somebody looks at the process itself."""

SET_UP_SUSPECT_S = 15.0
"""The same before a rank's first beat: connections are made in silence and for seconds, and to look costs a busy node a process."""

BEAT_S = 0.5
"""How long a rank rests before it replies; groups of up to 125 ranks are polled as often."""
BEATS_PER_S = 250.0
"""Of all ranks together: a poll costs the driver a millisecond or two."""


def beat_interval_s(world_size: int) -> float:
    """Seconds between two beats of a rank, which are its replies to the polls of the driver."""
    return max(BEAT_S, world_size / BEATS_PER_S)


def longest_interval_s(world_size: int) -> float:
    """The same where a rank does not reply: a round of polls waits so long for it."""
    return BEAT_S + beat_interval_s(world_size)


class Seen(Enum):
    """What is seen of the process of a rank that says nothing."""

    STOPPED = "stopped"
    ALIVE = "alive"
    GONE = "gone"
    NOTHING = "nothing"
    """Nobody on its node answers."""


SILENCE_S = {Seen.STOPPED: 10.0, Seen.GONE: 15.0, Seen.NOTHING: 45.0, Seen.ALIVE: 120.0}
"""Seconds of silence, by what is seen of the process. One that lives is late: its machine is overloaded, or a long call holds the interpreter.
One that is gone is Ray's to report; this is for when it does not."""


class State(Enum):
    """What is wrong with a rank."""

    STOPPED = "stopped"
    """Its process is stopped (SIGSTOP, a debugger, a frozen container)."""
    HUNG = "hung"
    """Its process lives and makes no progress."""
    SILENT = "silent"
    """Nothing is heard of it: its process, its node or the network is gone."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself whenever it is polled."""

    step: int
    phase: str
    moves: int
    """How often it has said where it is: grows as long as it makes progress."""
    place: int
    """How often since the step began. Ranks say the same things in the same order, so that this tells who is ahead."""
    waits: bool
    """Whether it is inside a collective, so that another rank may be what it waits for."""
    longest_s: float
    """The longest that it has taken for this phase, the first time left out; 0 when that is not known yet."""


UNHEARD = Beat(0, "set-up", 0, 0, waits=False, longest_s=0.0)
"""What stands for a beat of a rank whose process is known and has not said anything yet."""


def is_numbered(rank: int) -> bool:
    """Whether this is a rank. Ray gives ranks to processes once all of them answer; until then each goes by a negative number."""
    return rank >= 0


@dataclass(frozen=True)
class Pulse:
    """A rank as the driver has followed it."""

    count: int
    """Beats so far; 0 for a rank in set-up, of which only its process is known."""
    beat: Beat
    silent_s: float = 0.0
    """Since the last beat."""
    still_s: float = 0.0
    """Without progress, by its own word: silence does not count."""

    def after(self, count: int, beat: Beat, elapsed_s: float) -> "Pulse":
        """The pulse at a look `elapsed_s` after the one before."""
        silent_s = self.silent_s + elapsed_s
        if count == self.count:
            return replace(self, silent_s=silent_s)
        return Pulse(count, beat, still_s=self.still_s + silent_s if beat.moves == self.beat.moves else 0.0)

    def allowed_silence_s(self, seen: Seen) -> float:
        """By what is seen of the process. Before the first beat, silence alone says nothing: only a process that is stopped or gone does."""
        return SILENCE_S[seen] if self.count or seen in {Seen.STOPPED, Seen.GONE} else FIRST_S


@dataclass(frozen=True)
class Health:
    """All ranks of an attempt as the driver has followed them."""

    pulses: Mapping[int, Pulse] = field(default_factory=dict[int, Pulse])
    longest_s: Mapping[str, float] = field(default_factory=dict[str, float])
    """By phase, over all ranks."""
    age_s: float = 0.0
    """Since the first look."""

    def after(self, sightings: Mapping[int, tuple[int, Beat]], elapsed_s: float) -> "Health":
        """The health at a look that finds these beats (their number and the last), `elapsed_s` after the look before."""
        pulses, longest_s = dict[int, Pulse](), dict(self.longest_s)
        for rank, (count, beat) in sightings.items():
            known = self.pulses.get(rank)
            pulses[rank] = known.after(count, beat, elapsed_s) if known else Pulse(count, beat)
            longest_s[beat.phase] = max(longest_s.get(beat.phase, 0.0), beat.longest_s)
        return Health(pulses, longest_s, self.age_s + elapsed_s)

    def step(self, world_size: int) -> int | None:
        """The step that the slowest rank is at; None while one is in set-up."""
        beats = [pulse.beat for pulse in self.pulses.values() if pulse.count and pulse.beat.phase != UNHEARD.phase]
        return min((beat.step for beat in beats), default=None) if len(beats) == world_size else None

    def suspects(self, patience_s: float) -> list[int]:
        """Ranks that have been silent for so long that their processes should be looked at."""
        after_s = {rank: SUSPECT_S if pulse.count else SET_UP_SUSPECT_S for rank, pulse in self.pulses.items()}
        return [rank for rank, pulse in self.pulses.items() if pulse.silent_s > after_s[rank] + patience_s]


@dataclass(frozen=True)
class Deadlines:
    """How long ranks may stay where they are."""

    phases_s: Mapping[str, float] = field(default_factory=lambda: DEADLINES_S)
    fresh_steps: frozenset[int] = frozenset()
    """Steps whose shapes are new: what is known of earlier ones says nothing about them."""
    interval_s: float = 1.0
    """How far apart beats may be (`longest_interval_s`)."""

    def of(self, beat: Beat, longest_s: Mapping[str, float]) -> float:
        """Seconds that a rank may stay where it says that it is, given the longest that any has taken for the phase."""
        is_ahead = beat.phase == "data" and beat.step + 1 in self.fresh_steps  # on a GPU the next step's is read
        known_s = 0.0 if beat.step in self.fresh_steps or is_ahead else longest_s.get(beat.phase, 0.0)
        allowed_s = self.phases_s.get(beat.phase, FIRST_S)
        return allowed_s + SLACK * known_s if known_s else max(allowed_s, FIRST_S)

    @classmethod
    def for_stage(cls, *, trains: bool, data_s: float, fresh_steps: Iterable[int], interval_s: float) -> "Deadlines":
        """Deadlines of pretraining, where reading may take `data_s` seconds; those of other stages, whose phases are coarser, are long."""
        if not trains:
            return cls(dict.fromkeys(DEADLINES_S, FIRST_S), interval_s=interval_s)
        phases_s = {phase: seconds + data_s * (phase in {"data", "validation"}) for phase, seconds in DEADLINES_S.items()}
        return cls(phases_s, frozenset(fresh_steps), interval_s)


@dataclass(frozen=True)
class Verdict:
    """The ranks that hold up the others, the first of them named, and what is wrong with them."""

    ranks: tuple[int, ...]
    state: State
    seconds: float
    """For how long, as far as is known."""
    step: int = 0
    phase: str = "set-up"

    @property
    def rank(self) -> int:
        """The one that is named."""
        return self.ranks[0]


def judge(health: Health, seen: Mapping[int, Seen], world_size: int, deadlines: Deadlines) -> Verdict | None:
    """Name the ranks because of which nobody gets on; None while all is well, or may be.

    Ranks that say nothing come first: while one is silent, nobody is blamed for waiting.
    """
    patience_s = deadlines.interval_s
    silent = [rank for rank, pulse in health.pulses.items() if pulse.silent_s > pulse.allowed_silence_s(seen.get(rank, Seen.NOTHING)) + patience_s]
    if silent:
        return _silent_verdict(health, seen, silent)
    missing = [rank for rank in range(world_size) if rank not in health.pulses]
    if missing and health.age_s > FIRST_S:
        return Verdict(tuple(missing), State.SILENT, health.age_s)
    return None if missing or health.suspects(patience_s) else _hung(health, deadlines)


def _silent_verdict(health: Health, seen: Mapping[int, Seen], silent: Iterable[int]) -> Verdict:
    """The state of the rank that has been silent longest, and all that share it."""
    state_of = {rank: _SILENT_STATES[seen.get(rank, Seen.NOTHING)] for rank in silent}
    named = max(state_of, key=lambda rank: (health.pulses[rank].silent_s, -rank))
    alike = [named, *(rank for rank in sorted(state_of) if rank != named and state_of[rank] is state_of[named])]
    pulse = health.pulses[named]
    return Verdict(tuple(alike), state_of[named], pulse.silent_s, pulse.beat.step, pulse.beat.phase)


_SILENT_STATES = {Seen.STOPPED: State.STOPPED, Seen.ALIVE: State.HUNG, Seen.GONE: State.SILENT, Seen.NOTHING: State.SILENT}


def _hung(health: Health, deadlines: Deadlines) -> Verdict | None:
    """The rank that is furthest behind, when its phase's deadline has passed: all others wait for it."""
    if not health.pulses:
        return None
    rank = _culprit(health.pulses)
    pulse = health.pulses[rank]
    if pulse.still_s <= deadlines.of(pulse.beat, health.longest_s):
        return None
    return Verdict((rank,), State.HUNG, pulse.still_s, pulse.beat.step, pulse.beat.phase)


def _culprit(pulses: Mapping[int, Pulse]) -> int:
    """The rank that the others wait for: furthest behind, and not itself inside a collective. Where everybody waits, the one that began last."""
    behind = min(_position(pulse) for pulse in pulses.values())
    furthest = [rank for rank, pulse in pulses.items() if _position(pulse) == behind]
    at_work = [rank for rank in furthest if not pulses[rank].beat.waits] or [rank for rank, pulse in pulses.items() if not pulse.beat.waits]
    if at_work:
        return max(at_work, key=lambda rank: (pulses[rank].still_s, -rank))
    return min(furthest, key=lambda rank: (pulses[rank].still_s, rank))


def _position(pulse: Pulse) -> tuple[int, int]:
    return pulse.beat.step, pulse.beat.place
