"""One attempt's dealings with checkpoints: resume from the newest intact one, commit new ones (every method is collective)."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.config import Phase
from data_pipeline.errors import ConfigError
from trainer.agreement import agreement_group
from trainer.checkpoint import Checkpoint, commit, has_same_layout, newest_usable, why_not_exact
from trainer.config import RunConfig
from trainer.context import RunContext
from trainer.engine import Engine
from trainer.manifest import Circumstances
from trainer.runlog import RunFolder
from trainer.state import TrainState

PROBE_TOKENS = 16


class Saver:
    """Checkpoints of one attempt of a run. Build it with `Saver.open`."""

    def __init__(self, run: RunFolder, config: RunConfig, context: RunContext, attempt: int, group: dist.ProcessGroup | None) -> None:
        self._run = run
        self._config = config
        self._context = context
        self._attempt = attempt
        self._group = group
        self._committed_step = 0
        self._stall_s = 0.0

    @classmethod
    def open(cls, run: RunFolder, config: RunConfig, context: RunContext, attempt: int) -> "Saver":
        """Make the process group on which ranks agree about checkpoints. Collective."""
        return cls(run, config, context, attempt, agreement_group(context.world_size))

    def resume(self, engine: Engine, fresh: TrainState) -> TrainState:
        """Load the newest intact checkpoint into `engine` and return its state, or `fresh` when the run has none.

        Raises:
            ConfigError: the checkpoint belongs to other data, another precision or another data position than this attempt's.
            NoCheckpointError: there were checkpoints, and none is intact.
        """
        rank, world_size = self._context.rank, self._context.world_size
        found = newest_usable(self._run, rank=rank, world_size=world_size, attempt=self._attempt, group=self._group)
        if found is None:
            return fresh
        require_same_data(found.state, fresh)
        require_same_position(found.state, self._config.phases)
        load = engine.load if has_same_layout(found.manifest, self._config, world_size) else engine.load_from_other_layout
        load(found.zero_folder)
        self._committed_step = found.step
        if rank == 0:
            self._record_resume(found)
        return found.state

    def save(self, engine: Engine, state: TrainState) -> None:
        """Commit a checkpoint of `state`, unless the newest one already is."""
        if state.step == self._committed_step:
            return
        self._context.heartbeat(state.step, "checkpoint")
        self._stall_s += commit(
            self._run,
            state,
            attempt=self._attempt,
            config=self._config,
            rank=self._context.rank,
            world_size=self._context.world_size,
            write_rank_files=engine.save,
            probe=probe_of(engine),
            group=self._group,
        )
        self._committed_step = state.step

    def take_stall_s(self) -> float:
        """Seconds for which checkpoints have held up training since this was last asked."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    def _record_resume(self, found: Checkpoint) -> None:
        """The event `resumed` (R8): nothing is repeated or skipped in the surviving history; what a failure cost is counted apart."""
        now = Circumstances.now(world_size=self._context.world_size, zero_stage=self._config.zero.stage, precision=self._config.precision)
        events = self._run.read_events()
        ended = next((event for event in reversed(events) if event["kind"] in ("stopped", "worker_failed", "failed")), {})
        committed = next((e for e in reversed(events) if e["kind"] == "checkpoint_committed" and e["step"] == found.step), {})
        steps_lost = max(0, steps_done(self._run.newest_metrics(), events) - found.step)
        lost_since = ended.get("time") if not steps_lost else committed.get("time")
        self._run.append_event(
            "resumed",
            attempt=self._attempt,
            step=found.step,
            repeated=0,
            skipped=0,
            deliberately_skipped=list(found.state.skipped_steps),
            steps_lost=steps_lost,
            seconds_lost=round(time.time() - lost_since, 3) if lost_since else 0.0,
            cause=ended.get("cause", "not recorded"),
            not_bit_exact_because=why_not_exact(found.manifest, now, self._config),
        )


def steps_done(newest: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> int:
    """How far training has got since it was last resumed: the newest record's step, or where an attempt resumed that took none."""
    resumed = next((event for event in reversed(events) if event["kind"] == "resumed"), None)
    if resumed is not None and resumed["attempt"] > newest.get("attempt", 0):
        return resumed["step"]
    return newest["step"] + 1 if newest else 0


def require_same_data(saved: TrainState, now: TrainState) -> None:
    """Refuse to continue on another corpus or tokenizer than the checkpoint's: its position would mean other data.

    Raises:
        ConfigError: they differ.
    """
    for what, before, after in [
        ("corpus", saved.corpus_fingerprint, now.corpus_fingerprint),
        ("tokenizer", saved.tokenizer_digest, now.tokenizer_digest),
    ]:
        if before != after:
            raise ConfigError(
                f"the checkpoint of step {saved.step} was trained on {what} {before[:12]}; this attempt has {what} {after[:12]}",
                "Restore the corpus of the run, or start a new run under another `name`.",
            )


def require_same_position(saved: TrainState, phases: tuple[Phase, ...]) -> None:
    """Refuse a checkpoint that has consumed another number of micro-batches than come before its step here: data would be repeated or skipped.

    Raises:
        ConfigError: the numbers differ.
    """
    phase = next(phase for phase in reversed(phases) if phase.first_step <= saved.step)
    expected = phase.first_micro_batch + (saved.step - phase.first_step) * phase.num_micro_batches
    if saved.micro_batches_consumed != expected:
        raise ConfigError(
            f"the checkpoint of step {saved.step} has consumed {saved.micro_batches_consumed} micro-batches; by this configuration, {expected}",
            "Restore `batch` as it was when the checkpoint was written, or start a new run under another `name`.",
        )


def probe_of(engine: Engine) -> Callable[[], dict[str, torch.Tensor]]:
    """A function that computes a checkpoint's probe: a fixed input and the engine's logits for it, in training precision."""

    def probe() -> dict[str, torch.Tensor]:
        vocab_size = engine.model.config.vocab_size
        input_ids_BT = (torch.arange(2 * PROBE_TOKENS, dtype=torch.int64) * 7919 % vocab_size).view(2, PROBE_TOKENS)
        token_type_ids_BT = (torch.arange(PROBE_TOKENS) >= PROBE_TOKENS // 2).long().expand(2, -1).contiguous()
        attention_mask_BT = torch.ones_like(input_ids_BT)
        attention_mask_BT[1, -3:] = 0  # so that a network that ignores the mask fails the comparison
        mlm_logits, nsp_logits = engine.logits(input_ids_BT, token_type_ids_BT, attention_mask_BT)
        return {
            "input_ids": input_ids_BT,
            "token_type_ids": token_type_ids_BT,
            "attention_mask": attention_mask_BT,
            "mlm_logits": mlm_logits,
            "nsp_logits": nsp_logits,
        }

    return probe
