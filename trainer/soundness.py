"""One attempt's dealings with numeric trouble: an update is made only from sound numbers; what is not sound is answered by the policy."""

import math
from dataclasses import replace
from typing import Any

from data_pipeline.errors import DivergedError, NumericTroubleError
from trainer.checkpoint_store import checkpoints_of
from trainer.config import RunConfig
from trainer.engine import Engine, StepOutcome
from trainer.numerics import Response, Trouble, TroubleHistory, loss_trouble, response, rewind_target
from trainer.runlog import RunFolder
from trainer.saving import Saver
from trainer.state import TrainState
from trainer.totals import StepLosses, on_rank_zero


class Soundness:
    """Judges every step, alike on all ranks. Build it with `Soundness.open`."""

    def __init__(self, run: RunFolder, config: RunConfig, saver: Saver, attempt: int, history: TroubleHistory) -> None:
        self._run = run
        self._config = config
        self._saver = saver
        self._attempt = attempt
        self._history = history

    @classmethod
    def open(cls, run: RunFolder, config: RunConfig, saver: Saver, attempt: int) -> "Soundness":
        """Learn from the run's events what trouble it has had. Collective."""
        history = on_rank_zero("read the run's events", lambda: TroubleHistory.of(run.read_events()))
        return cls(run, config, saver, attempt, history)

    @property
    def resume_before(self) -> int | None:
        """The newest step to resume from, where trouble has ended the attempt before this one with a rewind."""
        return self._history.resume_before

    def step(self, engine: Engine, lr: float, losses: StepLosses, state: TrainState, num_micro_batches: int) -> StepOutcome:
        """The optimizer step, if loss and gradients are sound; otherwise nothing changes, and the batch is skipped or the attempt ends.

        Both are sums over all ranks, known before the update, so that a NaN on one rank is every rank's in the same step. (Gradients that
        overflow in fp16 are no trouble: the loss scale follows.) Collective.

        Raises:
            NumericTroubleError: another attempt is to resume from an earlier checkpoint.
            DivergedError: the policy is `stop`, or the budget is spent.
        """
        numbers = (state.micro_batches_consumed, state.micro_batches_consumed + num_micro_batches - 1)
        kind = loss_trouble(losses.loss, state.recent_losses, self._config.numerics)
        outcome = engine.drop() if kind else engine.step(lr)
        if kind:
            self._answer(Trouble(state.step, kind, losses.loss, numbers))
        elif not outcome.applied and self._config.precision != "fp16":
            self._answer(Trouble(state.step, "non_finite_gradients", outcome.grad_norm, numbers))
        return outcome

    def require_finite(self, held_out: StepLosses, state: TrainState) -> None:
        """Refuse weights that give no finite loss on held-out text: they went bad after the step. Collective; raises as `step` does."""
        if not math.isfinite(held_out.loss):
            self._answer(self._bad_weights(state, held_out.loss))

    def save(self, engine: Engine, state: TrainState, validation_loss: float | None) -> None:
        """`Saver.save`, which refuses weights that are not finite. Collective; for these it raises as `step` does."""
        try:
            self._saver.save(engine, state, validation_loss)
        except NumericTroubleError:
            self._answer(self._bad_weights(state, math.nan))

    def _bad_weights(self, state: TrainState, value: float) -> Trouble:
        last = state.step - 1
        phase = next(phase for phase in reversed(self._config.phases) if phase.first_step <= last)
        consumed = state.micro_batches_consumed
        return Trouble(last, "non_finite_weights", value, (consumed - phase.num_micro_batches, consumed - 1))

    def _answer(self, trouble: Trouble) -> None:
        """Record the trouble, then skip its batch (return) or raise: the group ends with the first rank that does."""
        answer = response(trouble.step, trouble.kind, self._config.numerics, self._history)
        if answer == "rewind":
            self._saver.finish()  # the checkpoint under way may be the one to resume from
        target = on_rank_zero("record numeric trouble", lambda: self._record(trouble, answer))
        if answer == "skip":
            self._history = replace(self._history, skipped=self._history.skipped | {trouble.step})
        elif answer == "rewind":
            raise NumericTroubleError(
                f"{trouble}; resuming from {f'the checkpoint of step {target}' if target else 'the start'}",
                self._inspect(trouble),
                step=trouble.step,
                kind=trouble.kind,
                value=trouble.value,
            )
        else:
            raise DivergedError(self._why_stopped(trouble), self._inspect(trouble))

    def _record(self, trouble: Trouble, answer: Response) -> int | None:
        """Append the events; returns the checkpoint to rewind to."""
        about: dict[str, Any] = {"attempt": self._attempt, "step": trouble.step, "micro_batches": list(trouble.micro_batches)}
        value = trouble.value if math.isfinite(trouble.value) else None
        checkpoints, target = self._config.numerics.rewind_checkpoints, None
        if answer == "rewind" and checkpoints is not None:
            committed = [entry.step for entry in checkpoints_of(self._run).committed()]
            target = rewind_target(committed, trouble.step, checkpoints)
        policy = self._config.numerics.policy
        self._run.append_event("numeric_trouble", **about, trouble=trouble.kind, value=value, policy=policy, response=answer, rewind_to=target)
        if answer == "skip":
            self._run.append_event("batch_skipped", **about, cause=str(trouble))
        return target

    def _why_stopped(self, trouble: Trouble) -> str:
        first, last = trouble.micro_batches
        config = self._config.numerics
        if config.policy == "stop":
            reason = "numerics.policy is stop"
        elif self._history.spent >= config.budget:
            reason = f"numerics.budget {config.budget} is spent"
        elif trouble.kind == "non_finite_weights":
            reason = "that batch is learned from, and cannot be skipped" + (
                ", nor was a rewind of help" if trouble.step in self._history.rewound else ""
            )
        else:
            reason = "nor was that of the step before, whose batch was skipped: training has diverged"
        return f"{trouble}; its batch is micro-batches {first} to {last}; {reason}"

    def _inspect(self, trouble: Trouble) -> str:
        if trouble.kind == "non_finite_weights":
            return (
                f"`maskwright resume {self._run.root.name}` goes on from the newest checkpoint; where that ends alike, set the newest folder of "
                "`checkpoints` aside, lower optimizer.lr, or look for a machine that computes wrongly."
            )
        return (
            f"`maskwright inspect {self._run.config} --step {trouble.step}` shows the batch. Go on without it by --set numerics.policy=skip_batch, "
            "or lower optimizer.lr or lengthen the warm-up."
        )
