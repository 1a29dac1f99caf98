"""One attempt's dealings with checkpoints: resume from the newest intact one, save new ones beside training (every method is collective but `error`,
`failed` and `close`)."""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from safetensors.torch import save as to_safetensors

from data_pipeline.errors import MaskwrightError
from trainer.agreement import Ranks, agreement_group
from trainer.background_save import COMMIT_TIMEOUT_S, Save, SaveRequest
from trainer.checkpoint import PROBE_FILE, STATE_FILE, Checkpoint, has_same_layout, newest_usable, why_not_exact
from trainer.checkpoint_store import checkpoints_of
from trainer.config import RunConfig
from trainer.context import RunContext
from trainer.engine import Engine
from trainer.interruption import Interruption, steps_done
from trainer.manifest import Circumstances, nothing
from trainer.refusals import require_finite, require_room, require_same_data, require_same_position, require_same_software, require_shared
from trainer.runlog import RunFolder
from trainer.snapshot import Snapshot
from trainer.software import software
from trainer.state import TrainState
from trainer.tracking_config import require_installed
from trainer.writing import as_known

PROBE_TOKENS = 16
_CLOSE_S = 5.0
_GRACE_S = 10.0
"""How much longer than for their own part ranks wait for each other's word."""


class Saver:
    """Checkpoints of one attempt of a run; at most one is being written. Build it with `Saver.open`."""

    before_commit: Callable[[], None] = staticmethod(nothing)
    """What rank 0 does before each commit, beside training."""

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        context: RunContext,
        attempt: int,
        group: dist.ProcessGroup | None,
        timeout_s: float = COMMIT_TIMEOUT_S,
    ) -> None:
        self._run = run
        self._config = config
        self._context = context
        self._attempt = attempt
        self._timeout_s = timeout_s
        self._ranks = Ranks(context.rank, context.world_size, group, timeout_s + _GRACE_S)
        self._snapshot = Snapshot()
        self._save: Save | None = None
        self._saved_step = 0
        self._stall_s = 0.0

    @classmethod
    def open(cls, run: RunFolder, config: RunConfig, context: RunContext, attempt: int) -> "Saver":
        """Make the process group on which ranks agree about checkpoints, and see that they share software and the run folder (R11).

        Raises:
            EnvironmentMismatchError: a rank has other releases than rank 0. StorageError: a rank does not see what rank 0 writes.
            ConfigError: rank 0 lacks a tracker.
        """
        saver = cls(run, config, context, attempt, agreement_group(context.world_size))
        require_same_software(saver._ranks, software())
        require_shared(run.checkpoints, saver._ranks)
        saver._ranks.rank_zero_does("look for the trackers", lambda: require_installed(config.tracking))
        return saver

    def resume(self, engine: Engine, fresh: TrainState, before_step: int | None = None) -> TrainState:
        """Load the newest intact checkpoint into `engine` and return its state, or `fresh` when the run has none.

        `before_step` goes back in history, to a checkpoint of at most that step; later ones are set aside.

        Raises:
            ConfigError: the checkpoint belongs to other data, another precision or another data position than this attempt's.
            NoCheckpointError: there were checkpoints, and none is intact.
        """
        rank, world_size = self._context.rank, self._context.world_size
        found = newest_usable(
            self._run,
            rank=rank,
            world_size=world_size,
            attempt=self._attempt,
            group=self._ranks.group,
            before_step=before_step,
            config=self._config,
            on_piece=partial(self._context.heartbeat, 0, "set-up"),
        )
        if found is None:
            return fresh
        started_at = time.monotonic()
        try:
            require_same_data(found.state, fresh)
            require_same_position(found.state, self._config.phases)
            load = engine.load if has_same_layout(found.manifest, self._config, world_size) else engine.load_from_other_layout
            self._context.heartbeat(0, "set-up")
            load(found.zero_folder)
        finally:
            found.discard_copy()
        self._saved_step = found.step
        if rank == 0:
            self._record_resume(engine, found, load_s=time.monotonic() - started_at, rewinds=before_step is not None)
        return found.state

    def save(self, engine: Engine, state: TrainState, validation_loss: float | None = None) -> None:
        """Save `state`, unless the newest checkpoint is of it. Training stands still until it is copied; it is written and committed beside training.

        A save that is still under way is waited for first: at most one is. `validation_loss` is what was measured at this step, for `keep_best`.

        Raises:
            StorageError: there is no room for it; nothing has been written. The same on every rank.
            MaskwrightError: the save before has failed on some rank; or this rank could not copy its part, which only this rank knows then.
        """
        if state.step == self._saved_step:
            return
        started_at = time.monotonic()
        self._context.heartbeat(state.step, "checkpoint")
        free_bytes = self._ranks.all_do("save the checkpoint before", lambda: self._wait(state.step))[0]
        probe = self._take_snapshot(engine)
        sizes = self._ranks.all_do("copy its part of the checkpoint", lambda: self._complete_snapshot(probe, state))
        require_room(self._run, state.step, sum(sizes), free_bytes)
        request = SaveRequest(
            run=self._run,
            config=self._config,
            state=state,
            circumstances=self._circumstances(engine),
            attempt=self._attempt,
            rank=self._context.rank,
            require_current=self._context.require_current,
            before_commit=self.before_commit,
            validation_loss=validation_loss,
            stall_s=time.monotonic() - started_at,
            timeout_s=self._timeout_s,
        )
        self._save = Save(request, self._snapshot).start()
        self._saved_step = state.step
        self._stall_s += time.monotonic() - started_at

    def is_saving(self) -> bool:
        """Whether this rank's part of a save is under way."""
        return self._save is not None and not self._save.is_done

    def finish(self) -> None:
        """Wait, on all ranks, until the save under way is committed.

        Raises:
            MaskwrightError: it failed on some rank, or did not end in time; the same on every rank.
        """
        if self._save is not None:
            started_at = time.monotonic()
            self._context.heartbeat(self._saved_step, "checkpoint")
            self._ranks.all_do("save the checkpoint", lambda: self._wait(self._saved_step))
            self._stall_s += time.monotonic() - started_at

    @property
    def error(self) -> MaskwrightError | None:
        """What the save under way has failed with on this rank for good."""
        return self._save.error if self._save is not None else None

    def failed(self) -> bool:
        """Whether the save under way has failed on this rank for good: all ranks must hear of it at the next step."""
        return self.error is not None

    def close(self) -> None:
        """Give a save that is under way a moment to end, or to record why it failed, then end it. Not collective: other ranks may be dead."""
        if self._save is not None and self.is_saving():
            try:
                self._save.wait(_CLOSE_S)
            except MaskwrightError:
                self._save.cancel()

    def take_stall_s(self) -> float:
        """Seconds for which checkpoints have held up training since this was last asked."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    def _wait(self, step: int) -> int | None:
        """Wait at `step` for this rank's part of the save under way; returns the free bytes of the storage, on rank 0."""
        if self._save is not None:
            self._save.wait(self._timeout_s, on_progress=partial(self._context.heartbeat, step, "checkpoint"))
            self._save = None
        return checkpoints_of(self._run).free_bytes() if self._context.rank == 0 else None

    def _take_snapshot(self, engine: Engine) -> dict[str, torch.Tensor]:
        """Copy what this rank has to save into the memory of the last save; returns the probe.

        DeepSpeed's collectives are in it. A rank that fails raises at once, as it does in a step: the others are in a collective, where they cannot
        hear of it, and the end of the group takes seconds, their waiting for each other minutes.
        """
        self._snapshot.clear()
        try:
            engine.snapshot(self._snapshot)
            return probe_of(engine)()
        except Exception as error:
            raise as_known(error, f"rank {self._context.rank} could not copy its part of the checkpoint") from error

    def _complete_snapshot(self, probe: dict[str, torch.Tensor], state: TrainState) -> int:
        """Add what is ours; returns the bytes of this rank's part."""
        require_finite(probe, state.step)
        if self._context.rank == 0:
            self._snapshot.add(PROBE_FILE, to_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in probe.items()}))
            self._snapshot.add_json(STATE_FILE, state.to_json())
        return self._snapshot.num_bytes

    def _circumstances(self, engine: Engine) -> Circumstances:
        config = self._config
        return Circumstances.now(
            world_size=self._context.world_size, zero_stage=config.zero.stage, precision=config.precision, attention=engine.model.kernels
        )

    def _record_resume(self, engine: Engine, found: Checkpoint, *, load_s: float, rewinds: bool) -> None:
        """The event `resumed` (R8): nothing is repeated or skipped in the surviving history; what a failure cost is counted apart."""
        events = self._run.read_events()
        reached = steps_done(self._run.newest_metrics(), events)
        interruption = Interruption.before_resume(events, reached=reached, resumed_at=found.step, now=time.time())
        self._run.append_event(
            "resumed",
            attempt=self._attempt,
            step=found.step,
            repeated=0,
            skipped=0,
            deliberately_skipped=list(found.state.skipped_steps),
            blocks_left_out=list(found.state.skipped_blocks),
            steps_lost=interruption.steps_lost,
            seconds_lost=interruption.seconds_lost,
            rewound_from=reached if rewinds else None,
            load_s=round(load_s, 3),
            cause=interruption.cause,
            not_bit_exact_because=why_not_exact(found.manifest, self._circumstances(engine), self._config),
        )


def probe_of(engine: Engine) -> Callable[[], dict[str, torch.Tensor]]:
    """A function that computes a checkpoint's probe: a fixed input and the engine's logits for it, in training precision."""

    def probe() -> dict[str, torch.Tensor]:
        vocab_size = engine.model.config.vocab_size
        input_ids_BT = (torch.arange(2 * PROBE_TOKENS, dtype=torch.int64) * 7919 % vocab_size).view(2, PROBE_TOKENS)
        token_type_ids_BT = (torch.arange(PROBE_TOKENS) >= PROBE_TOKENS // 2).long().expand(2, -1).contiguous()
        attention_mask_BT = torch.ones_like(input_ids_BT)
        attention_mask_BT[1, -3:] = 0  # so that a network that ignores the mask fails the comparison
        inputs = {"input_ids": input_ids_BT, "token_type_ids": token_type_ids_BT, "attention_mask": attention_mask_BT}
        return inputs | engine.logits(input_ids_BT, token_type_ids_BT, attention_mask_BT)

    return probe
