"""What each optimizer step is measured by, and rank 0's records of it: metrics.jsonl and TensorBoard."""

import logging
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from data_pipeline.micro_batch import SkippedBlock
from trainer.context import RunContext
from trainer.engine import Engine, StepOutcome
from trainer.flops import StepFlops
from trainer.numerics import continuity
from trainer.runlog import RunFolder
from trainer.state import TrainState
from trainer.totals import StepCounts, StepLosses

SAY_EVERY_S = 10.0
_SAID = ("loss", "mlm_loss", "nsp_loss", "grad_norm", "lr", "tokens_per_s", "data_wait_s", "checkpoint_stall_s")
_log = logging.getLogger(__name__)
_PEAK_SECONDS = 0.2
_PEAK_SIZE = 1024


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl. `step` counts from 0, as `inspect --step` does: a run of S steps ends with the record of step S-1.

    A value that does not exist (the NSP loss of a batch without pairs, the norm of gradients that overflowed) is None.
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


class StepLog:
    """An attempt's records. Rank 0 writes, other ranks only keep the same time."""

    def __init__(self, run: RunFolder, engine: Engine, context: RunContext, attempt: int, *, first_step: int) -> None:
        self._run = run
        self._flops = StepFlops.of(engine.model)
        self._device = engine.device
        self._attempt = attempt
        self._writes = context.rank == 0
        self._first_step = first_step
        self._peak_flops = measured_peak(engine.device, engine.dtype) * context.world_size if self._writes else 0.0
        self._tensorboard: Any = None
        self._started_at = time.monotonic()
        self._said_at = -math.inf

    def start_step(self) -> None:
        """Start the clock of a step."""
        self._started_at = time.monotonic()

    def step(
        self, state: TrainState, counts: StepCounts, losses: StepLosses, outcome: StepOutcome, lr: float, *, wait_s: float, stall_s: float
    ) -> None:
        """Record the step that took `state` further."""
        if not self._writes:
            return
        elapsed_s = time.monotonic() - self._started_at
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
            mfu=self._flops.of_step(counts) / elapsed_s / self._peak_flops,
            data_wait_s=wait_s,
            checkpoint_stall_s=stall_s,
            memory_bytes=peak_memory_bytes(self._device),
            batch_digest=f"{counts.digest:016x}",
        )
        values = finite(asdict(record))
        if state.step == self._first_step > 0:
            self._continued(state, values["loss"])
        self._run.append_metrics(values)
        self._say(values)
        self._draw("train", state.step, values)

    def _continued(self, state: TrainState, loss: float | None) -> None:
        """Record how the first loss after a resume goes on from what was there before."""
        same_step = self._run.metrics_of(state.step).get("loss")
        before = state.recent_losses[-1] if state.recent_losses else None
        self._run.append_event("continued", attempt=self._attempt, step=state.step, **continuity(loss, same_step, before))

    def validated(self, state: TrainState, losses: StepLosses, unigram_entropy: float) -> None:
        """Record held-out losses after `state.step` steps, beside what a model that knows only token frequencies would reach."""
        if self._writes:
            values = finite(asdict(losses) | {"unigram_entropy": unigram_entropy})
            self._run.append_event("validation", attempt=self._attempt, step=state.step, **values)
            self._draw("validation", state.step, values)

    def skipped(self, state: TrainState, blocks: Sequence[SkippedBlock]) -> None:
        """Record damaged blocks that the run goes on without."""
        if self._writes:
            for block in blocks:
                self._run.append_event("data_skipped", attempt=self._attempt, step=state.step, **asdict(block))

    def stopped(self, state: TrainState) -> None:
        """Record that the run ended on request, with `state` saved."""
        if self._writes:
            self._run.append_event("stopped", attempt=self._attempt, step=state.step, cause="requested")

    def close(self) -> None:
        """Flush TensorBoard's file."""
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _say(self, values: dict[str, Any]) -> None:
        """A line in the log now and then: who reads it sees that the run moves."""
        if time.monotonic() - self._said_at >= SAY_EVERY_S:
            self._said_at = time.monotonic()
            shown = {name: "-" if values[name] is None else f"{values[name]:.4g}" for name in _SAID}
            _log.info("step %d: %s", values["step"], ", ".join(f"{name} {value}" for name, value in shown.items()))

    def _draw(self, group: str, step: int, values: dict[str, Any]) -> None:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._run.tensorboard), purge_step=self._first_step)
        for name, value in values.items():
            if isinstance(value, float) and name != "time":
                self._tensorboard.add_scalar(f"{group}/{name}", value, step)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same with None for numbers that JSON cannot hold."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a bare square matrix product on this rank, the best of some; takes a fraction of a second."""
    size = _PEAK_SIZE * (8 if device.type == "cuda" else 1)
    left = torch.ones(size, size, dtype=dtype, device=device)
    best, deadline = 0.0, time.monotonic() + _PEAK_SECONDS
    while best == 0.0 or time.monotonic() < deadline:
        started_at = time.perf_counter()
        torch.mm(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - started_at))
    return best


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held: of the GPU, or the process' resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
