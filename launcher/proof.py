"""Proof that the model saw the right data: the surviving records of a run against the pure function that its batches are (reads the corpus)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.config import Phase
from data_pipeline.micro_batch import step_digest
from data_pipeline.order import micro_batches_of_step
from launcher.history import Events, History, resumes

if TYPE_CHECKING:
    from data_pipeline.stream import MicroBatchStream

ALL_UP_TO_SAMPLES = 1_000_000
"""A run of at most so many samples is recomputed whole: some ten seconds of one core."""
_WINDOWS = 2000
"""Of a longer one as many steps, and newest resumes, as need so many windows each, a fortieth of a second for one; within the bounds that follow."""
_FEWEST, _MOST = 3, 300
_AROUND = 2
"""Steps before and after a resume that are recomputed with it: a lane's neighbours, which lie in one window."""
_FEWEST_RESUMES, _MOST_RESUMES = 1, 100
_LANES_AT_ONCE = 64
_MOST_NAMED = 20


@dataclass(frozen=True)
class Proof:
    """What was found. Steps are optimizer steps of the surviving history, which should have each one's record once."""

    steps: int
    """From the first to the last one that was recorded."""
    repeated: int
    """Micro-batches of steps that are in the surviving history more than once."""
    skipped: int
    """Micro-batches of steps that are not in it."""
    wrong_steps: tuple[int, ...]
    """The first steps that are there more than once or not at all."""
    deliberate: int
    """Steps whose batch was skipped on purpose, as their events say; not counted above."""
    checked: int
    """Steps whose batch was computed anew from the corpus."""
    different: tuple[int, ...]
    """Steps whose batch was not the one that it should have been."""
    unchecked: str
    """Why no batch could be computed anew; empty when they were."""

    @property
    def holds(self) -> bool:
        """Nothing repeated, nothing skipped, no other batch than there should have been, and batches were compared."""
        return not (self.repeated or self.skipped or self.different or self.unchecked) and self.checked > 0

    def to_json(self) -> dict[str, Any]:
        """JSON object: `answers.runs.ProofAnswer`."""
        return {"holds": self.holds, **asdict(self)}

    def verdict(self) -> str:
        """One line."""
        counts = f"micro-batches repeated {self.repeated}, skipped {self.skipped} in the {self.steps:,} steps of the surviving history"
        if self.deliberate:
            counts += f" ({self.deliberate} more were skipped on purpose)"
        if self.unchecked:
            return f"{counts}; batches were not compared: {self.unchecked}"
        compared = f"{self.checked:,} of {self.steps:,} batches computed anew from the corpus"
        if self.different:
            return f"{counts}; {compared}, {len(self.different)} DIFFER: steps {_named(self.different)}"
        return f"{counts}; {compared}, all the same"


def prove(history: History, events: Events, phases: tuple[Phase, ...], stream: "MicroBatchStream | None", *, all_steps: bool, why: str = "") -> Proof:
    """Count the steps of the surviving history, and compare batches with `stream`; without one, `why` says why not.

    Errors as `MicroBatchStream` has them.
    """
    kept, end = history.surviving(), phases[-1].first_step + phases[-1].num_steps
    skips = {int(event["step"]) for event in events if event["kind"] == "batch_skipped" and event["step"] is not None}
    num_steps = min(end, int(kept.step[-1]) + 1) if len(kept) else 0
    counts = np.bincount(kept.step, minlength=num_steps)[:num_steps]
    twice, never = np.flatnonzero(counts > 1).tolist(), [step for step in np.flatnonzero(counts == 0).tolist() if step not in skips]
    recorded = {step: digest for step, digest in zip(kept.step.tolist(), kept.digest.tolist(), strict=True) if digest}
    different: list[int] = []
    checked = 0
    if stream is not None:
        wanted = [step for step in _wanted(num_steps, phases, list(resumes(events).values()), all_steps=all_steps) if step in recorded]
        different = [step for step, digest in batch_digests(stream, phases, wanted).items() if digest != recorded[step]]
        checked = len(wanted)
    return Proof(
        steps=num_steps,
        repeated=sum(len(micro_batches_of_step(phases, step)) * int(counts[step] - 1) for step in twice),
        skipped=sum(len(micro_batches_of_step(phases, step)) for step in never),
        wrong_steps=tuple(sorted(twice + never)[:_MOST_NAMED]),
        deliberate=len(skips),
        checked=checked,
        different=tuple(different),
        unchecked=why if stream is None else "" if checked else "no digests were recorded",
    )


def _wanted(num_steps: int, phases: tuple[Phase, ...], resumed_at: Sequence[int], *, all_steps: bool) -> list[int]:
    samples = sum(phase.num_micro_batches * phase.micro_batch_size * max(0, min(phase.num_steps, num_steps - phase.first_step)) for phase in phases)
    if all_steps or samples <= ALL_UP_TO_SAMPLES:
        return list(range(num_steps))
    return steps_to_check(num_steps, max(phase.num_micro_batches for phase in phases), resumed_at)


def steps_to_check(num_steps: int, micro_batches: int, resumed_at: Sequence[int]) -> list[int]:
    """Steps of a long run: evenly from the first to the last, and around the newest resumes."""
    most = _WINDOWS // micro_batches
    evenly = np.linspace(0, num_steps - 1, min(num_steps, max(_FEWEST, min(_MOST, most)))).round().astype(int).tolist()
    newest = resumed_at[-max(_FEWEST_RESUMES, min(_MOST_RESUMES, most)) :]
    around = {step + near for step in newest for near in range(-_AROUND, _AROUND + 1)}
    return sorted({*evenly, *(step for step in around if 0 <= step < num_steps)})


def batch_digests(stream: "MicroBatchStream", phases: tuple[Phase, ...], steps: Sequence[int]) -> Mapping[int, int]:
    """The digest of each step's global batch. Some lanes at a time, so that memory holds only their windows."""
    digests = dict.fromkeys(steps, 0)
    for lanes in _groups(max((phase.num_micro_batches for phase in phases), default=0)):
        for step in steps:
            numbers = micro_batches_of_step(phases, step)
            parts = ((place, stream[numbers[place]].digest) for place in lanes if place < len(numbers))
            digests[step] = (digests[step] + step_digest(parts)) % 2**64
        stream.forget_windows()
    return digests


def _groups(count: int) -> Iterator[range]:
    return (range(first, min(first + _LANES_AT_ONCE, count)) for first in range(0, count, _LANES_AT_ONCE))


def _named(steps: Sequence[int]) -> str:
    more = f" and {len(steps) - _MOST_NAMED} more" if len(steps) > _MOST_NAMED else ""
    return ", ".join(map(str, steps[:_MOST_NAMED])) + more
