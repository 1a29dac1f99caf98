"""What each optimizer step is measured by, and rank 0's records of it: metrics.jsonl, and what trackers are told."""

import logging
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import torch

from data_pipeline.micro_batch import SkippedBlock
from trainer.engine import Engine, StepOutcome
from trainer.flops import StepFlops
from trainer.numerics import continuity
from trainer.peaks import device_name, measured_peak, stated_peak
from trainer.runlog import RecordWriter, RunFolder
from trainer.state import TrainState
from trainer.timeline import Timeline
from trainer.totals import StepCounts, StepLosses
from trainer.trackers import Trackers

SAY_EVERY_S = 10.0
_SAID = ("loss", "mlm_loss", "nsp_loss", "grad_norm", "lr", "tokens_per_s", "data_wait_s", "checkpoint_stall_s")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl. `step` counts from 0, as `inspect --step` does: a run of S steps ends with the record of step S-1.

    A value that does not exist (the NSP loss of a batch without pairs, the norm of gradients that overflowed) is None.

    The time line is rank 0's: `data_wait_s`, `agree_s`, `forward_s`, `backward_s`, `reduce_s` and `optimizer_s` are parts of `step_s`, whose rest is
    counting and Python between them; `checkpoint_stall_s` and `validation_s` lie before it.
    """

    step: int
    attempt: int
    time: float
    """When the step was done, in seconds since 1970."""
    step_s: float
    """Seconds of the step, waiting for data included; saving and validation come between steps."""
    loss: float | None
    mlm_loss: float | None
    nsp_loss: float | None
    mlm_accuracy: float | None
    nsp_accuracy: float | None
    grad_norm: float | None
    lr: float
    tokens_per_s: float
    """Real tokens of the global batch per second of the whole step, waiting for data included."""
    mfu: float
    """Useful FLOPs of the global batch per second, as a share of what all ranks would do in bare matrix products."""
    data_wait_s: float
    checkpoint_stall_s: float
    """Seconds for which a checkpoint held up training since the step before."""
    memory_bytes: int
    batch_digest: str
    mfu_stated: float | None
    """The same as `mfu` as a share of what the maker of the GPU states for its dense matrix products; None where that is not known (a CPU)."""
    agree_s: float
    """Seconds in which the ranks agreed on the counts and the losses of the step: mostly waiting for the slowest of them."""
    forward_s: float
    backward_s: float
    """Seconds of the backward passes, without reductions where these are apart."""
    reduce_s: float | None
    """Seconds in which gradients were summed over the ranks and sorted into their parts, waiting for the slowest included. None where that happens
    beside the backward pass (ZeRO stage 3, `overlap_comm`), and is part of `backward_s`."""
    optimizer_s: float
    """Seconds of norm, clipping and update; at stages 1 to 3 also of gathering the weights."""
    validation_s: float
    """Seconds of a validation since the step before."""


class StepLog:
    """An attempt's records. Rank 0 writes, other ranks only keep the same time."""

    def __init__(self, run: RunFolder, engine: Engine, timeline: Timeline, trackers: Trackers, *, attempt: int, first_step: int) -> None:
        self._run = run
        self._flops = StepFlops.of(engine.model)
        self._device = engine.device
        self._attempt = attempt
        self._timeline = timeline
        self._reduces_apart = engine.reduces_apart
        self._writes = timeline.rank == 0
        self._first_step = first_step
        self._peak_flops = measured_peak(engine.device, engine.dtype) * timeline.world_size if self._writes else 0.0
        stated = stated_peak(device_name(engine.device), engine.dtype)
        self._stated_flops = None if stated is None else stated * timeline.world_size
        self._records = RecordWriter(run)
        self._trackers = trackers
        self._started_at = time.monotonic()
        self._wait_s = 0.0
        self._said_at = -math.inf

    def start_step(self) -> None:
        """Start the clock of a step."""
        self._started_at = time.monotonic()

    def waited(self, wait_s: float) -> None:
        """Data was read, for this step or for the next one while a GPU computes this: at most so many seconds of it were lost."""
        self._wait_s += wait_s

    def step(self, state: TrainState, counts: StepCounts, losses: StepLosses, outcome: StepOutcome, lr: float, *, stall_s: float) -> None:
        """Record the step that took `state` further."""
        if not self._writes:
            return
        elapsed_s, seconds = time.monotonic() - self._started_at, self._timeline.take()
        wait_s, self._wait_s = self._wait_s, 0.0
        flops_per_s = self._flops.of_step(counts) / elapsed_s
        record = StepRecord(
            step=state.step,
            attempt=self._attempt,
            time=time.time(),
            step_s=elapsed_s,
            loss=losses.loss,
            **asdict(losses),
            grad_norm=outcome.grad_norm,
            lr=lr,
            tokens_per_s=counts.tokens / elapsed_s,
            mfu=flops_per_s / self._peak_flops,
            data_wait_s=min(wait_s, seconds.get("data", 0.0)),
            checkpoint_stall_s=stall_s,
            memory_bytes=peak_memory_bytes(self._device),
            batch_digest=f"{counts.digest:016x}",
            mfu_stated=None if self._stated_flops is None else flops_per_s / self._stated_flops,
            agree_s=seconds.get("agree", 0.0),
            forward_s=seconds.get("forward", 0.0),
            backward_s=seconds.get("backward", 0.0),
            reduce_s=seconds.get("reduce", 0.0) if self._reduces_apart else None,
            optimizer_s=seconds.get("optimizer", 0.0),
            validation_s=seconds.get("validation", 0.0),
        )
        values = finite(asdict(record))
        if state.step == self._first_step:
            self._records.add_event("first_step", attempt=self._attempt, step=state.step, step_s=round(elapsed_s, 3))
        if state.step == self._first_step > 0:
            self._continued(state, values["loss"])
        self._records.add(values)
        self._say(values)
        self._trackers.log("train", values, state.step)

    def _continued(self, state: TrainState, loss: float | None) -> None:
        """Record how the first loss after a resume goes on from what was there before."""
        same_step = self._run.metrics_of(state.step).get("loss")
        before = state.recent_losses[-1] if state.recent_losses else None
        self._records.add_event("continued", attempt=self._attempt, step=state.step, **continuity(loss, same_step, before))

    def validated(self, state: TrainState, losses: StepLosses, unigram_entropy: float) -> None:
        """Record held-out losses after `state.step` steps, beside what a model that knows only token frequencies would reach."""
        if self._writes:
            values = finite(asdict(losses) | {"unigram_entropy": unigram_entropy})
            self._records.add_event("validation", attempt=self._attempt, step=state.step, **values)
            self._trackers.log("validation", values, state.step)

    def skipped(self, state: TrainState, blocks: Sequence[SkippedBlock]) -> None:
        """Record damaged blocks that the run goes on without."""
        if self._writes:
            for block in blocks:
                self._records.add_event("data_skipped", attempt=self._attempt, step=state.step, **asdict(block))

    def stopped(self, state: TrainState) -> None:
        """Record that the run ended on request, with `state` saved."""
        if self._writes:
            self._records.add_event("stopped", attempt=self._attempt, step=state.step, cause="requested")
            self._records.flush()

    def flush(self) -> None:
        """Write what is held back for a store. The history of a checkpoint has to be complete when it is committed."""
        self._records.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Write what is held back, of an attempt that fails, too; and let the trackers finish."""
        try:
            self._records.close()
        except Exception as lost:  # noqa: BLE001 - of steps that no checkpoint holds; why the attempt ends is the news
            _log.warning("the records of the last steps are lost: %s", lost)
        self._trackers.close(failed=error is not None)

    def _say(self, values: dict[str, Any]) -> None:
        """A line in the log now and then: who reads it sees that the run moves."""
        if time.monotonic() - self._said_at >= SAY_EVERY_S:
            self._said_at = time.monotonic()
            shown = {name: "-" if values[name] is None else f"{values[name]:.4g}" for name in _SAID}
            _log.info("step %d: %s", values["step"], ", ".join(f"{name} {value}" for name, value in shown.items()))


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same with None for numbers that JSON cannot hold."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held: of the GPU, or the process' resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
