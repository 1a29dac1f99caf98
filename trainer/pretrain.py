"""Pretraining: the loop, which runs on every rank and reads top to bottom."""

import os
from contextlib import closing
from dataclasses import replace
from functools import partial

import torch

from data_pipeline.config import Phase
from data_pipeline.errors import DataCorruptError, InterruptedRunError
from data_pipeline.index import MANIFEST
from data_pipeline.mixture import Mixture
from data_pipeline.storage import Location
from data_pipeline.stream import MicroBatchStream, empty_micro_batch
from data_pipeline.tokenizer import load_tokenizer, vocabulary_of
from trainer.choices import settled, settled_kernels
from trainer.compiling import compile_layers, nobody
from trainer.config import RunConfig
from trainer.context import RunContext
from trainer.engine import Engine, StepOutcome, training_device
from trainer.metrics import StepLog
from trainer.model import build_model
from trainer.numerics import with_loss
from trainer.passes import StepWork, Validation, forward_backward
from trainer.reading import Ahead, StepPart, read_steps
from trainer.runlog import RunFolder
from trainer.saving import Saver
from trainer.schedule import learning_rate
from trainer.skips import newly_skipped, with_skipped
from trainer.soundness import Soundness
from trainer.state import TrainState
from trainer.timeline import Timeline
from trainer.totals import StepCounts, StepLosses, raise_together
from trainer.trackers import Trackers

MAX_SKIPPED_STEPS = 1000
"""Newest skipped steps that a checkpoint remembers."""


def pretrain(config: RunConfig, corpus: str, run: str, context: RunContext, attempt: int) -> None:
    """Train to the last step of the schedule, resuming from the newest intact checkpoint in `run`.

    Runs on every rank, with torch.distributed initialised. Returns when the last step is committed.

    Raises:
        InterruptedRunError: a stop was requested; a checkpoint has been committed (before the first step there is nothing to commit).
        NumericTroubleError: a loss or gradients are unsound; the next attempt resumes from an earlier checkpoint.
        DivergedError: they are, and by policy or budget that ends the run.
        ConfigError: the configuration or the run folder does not fit the corpus.
        MaskwrightError: a rank could not read its data; the same error on every rank.
    """
    context = Timeline.of(context, training_device())
    context.heartbeat(0, "set-up")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    folder = RunFolder(Location.at(run))
    config = settled(config, folder, training_device(), attempt)
    saver = Saver.open(folder, config, context, attempt)  # before the corpus is missed on a host that does not see the storage: that is the cause
    corpora = Mixture.open(Location.at(corpus), config.data)
    engine = build_engine(config, corpora)
    engine.model.kernels = settled_kernels(config, folder, engine.model, engine.device, attempt)
    if config.model.compile:
        context.heartbeat(0, "set-up")
        compile_layers(engine.model, config, engine.device, partial(folder.append_event, attempt=attempt) if context.rank == 0 else nobody)
    soundness = Soundness.open(folder, config, saver, attempt)
    fresh = TrainState(corpus_fingerprint=corpora.fingerprint, tokenizer_digest=corpora.tokenizer_digest)
    state = saver.resume(engine, fresh, before_step=soundness.resume_before)
    trackers = Trackers(folder, config, attempt, state.step)
    with closing(saver), StepLog(folder, engine, context, trackers, attempt=attempt, first_step=state.step) as log:
        saver.before_commit = log.flush
        train(config, corpora, engine, saver, soundness, log, context, state)


def train(
    config: RunConfig,
    corpora: Mixture,
    engine: Engine,
    saver: Saver,
    soundness: Soundness,
    log: StepLog,
    context: Timeline,
    state: TrainState,
) -> None:
    """The loop: read, agree, forward and backward, agree, step, record, validate, save. See `pretrain`. While a GPU computes, the next is read."""
    stream = MicroBatchStream(corpora, config.objective, config.phases, config.seed, packing=config.batch.row_packing)
    validation, empty = Validation(corpora, config, context.rank, context.world_size), empty_micro_batch(corpora.vocabulary)
    rank, world_size, workers = context.rank, context.world_size, config.batch.loader_workers
    parts = read_steps(stream, config.phases, first_step=state.step, rank=rank, world_size=world_size, workers=workers)

    def work_of(part: StepPart) -> StepWork:
        log.waited(part.wait_s)
        return StepWork.of(part, empty, config, engine.device)

    works = Ahead(map(work_of, parts))
    validation_loss: float | None = None
    while state.step < config.schedule.steps:
        context.heartbeat(state.step, "data")
        log.start_step()
        work = works.take()
        part = work.part
        own = replace(work.counts, stops=int(context.stop_requested()), failures=int(part.error is not None or saver.failed()))
        context.heartbeat(state.step, "agree")
        counts = own.total(engine.device)
        if counts.failures:
            raise_together(part.error or saver.error, f"read the data of step {state.step}" if part.error else "save a checkpoint")
        if counts.stops:
            soundness.save(engine, state, validation_loss)
            saver.finish()
            log.stopped(state)
            raise stopped_at(state.step)
        if skipped := newly_skipped(part.batches, counts, state):
            log.skipped(state, skipped)
            state = with_skipped(state, skipped, config.data.skip_budget)

        sums = forward_backward(engine, work, counts, context.world_size, enter=partial(context.heartbeat, state.step))
        if engine.computes_behind:
            context.heartbeat(state.step, "data")
            works.make()
        context.heartbeat(state.step, "agree")
        losses = StepLosses.total(sums, counts, engine.device)

        context.heartbeat(state.step, "optimizer")
        lr = learning_rate(config.optimizer.lr, config.schedule, state.step)
        outcome = soundness.step(engine, lr, losses, state, part.num_micro_batches)
        log.step(state, counts, losses, outcome, lr, stall_s=saver.take_stall_s())
        state = advanced(state, outcome, counts, part.num_micro_batches, with_loss(state.recent_losses, losses.loss, config.numerics))

        validation_loss = None  # of these weights, and no others: what is kept as the best was measured
        if is_due(state.step, config.validation.every_steps, config):
            go_on = partial(context.heartbeat, state.step, "validation")
            held_out, skipped = validation.measure(engine, phase_of(config.phases, state.step - 1), state, go_on)
            log.skipped(state, skipped)
            log.validated(state, held_out, corpora.unigram_entropy)
            soundness.require_finite(held_out, state)
            state, validation_loss = with_skipped(state, skipped, config.data.skip_budget), held_out.loss
        if is_due(state.step, config.checkpoint.every_steps, config):
            soundness.save(engine, state, validation_loss)
    saver.finish()


def build_engine(config: RunConfig, corpora: Mixture) -> Engine:
    """The network of `config` over the corpus' vocabulary, in an engine on this rank's device.

    Raises:
        DataCorruptError: the corpus' tokenizer is not the one that its blocks were encoded with.
    """
    require_own_tokenizer(corpora)
    model = build_model(
        config.model,
        corpora.tokenizer_folder,
        seed=config.seed,
        sequence_length=max(config.batch.sequence_lengths),
        device=training_device(),
        reentrant_checkpointing=config.zero.stage == 3,
    )
    return Engine.build(model, config)


def require_own_tokenizer(corpora: Mixture) -> None:
    """Refuse a corpus whose tokenizer folder gives other ids than its manifest says. (Not by digest: that changes with library versions.)

    Raises:
        DataCorruptError: it does.
    """
    found = vocabulary_of(load_tokenizer(corpora.tokenizer_folder))
    if found != corpora.vocabulary:
        raise DataCorruptError(
            f"{corpora.tokenizer_folder} does not match the corpus: it has {found.size} tokens, {MANIFEST} says {corpora.vocabulary.size}"
            + (", and they differ" if found.size == corpora.vocabulary.size else ""),
            "Restore the tokenizer folder from a copy, or prepare the corpus again.",
        )


def advanced(state: TrainState, outcome: StepOutcome, counts: StepCounts, num_micro_batches: int, recent_losses: tuple[float, ...]) -> TrainState:
    """The state after a step. One without an update counts, and its data is consumed; that it was skipped is kept, its loss is not."""
    after = state.advance(micro_batches=num_micro_batches, tokens=counts.tokens)
    if outcome.applied:
        return replace(after, recent_losses=recent_losses)
    return replace(after, skipped_steps=(*state.skipped_steps, state.step)[-MAX_SKIPPED_STEPS:])


def stopped_at(step: int) -> InterruptedRunError:
    """What a requested stop ends with, after the checkpoint of `step`. Before the first step there is nothing to commit."""
    said = f"stopped at step {step} on request; it is saved" if step else "stopped on request before the first step; there was nothing to save"
    return InterruptedRunError(said, "Continue with `maskwright resume`.")


def is_due(step: int, every_steps: int, config: RunConfig) -> bool:
    """Whether something that happens every so many steps, and after the last, happens after `step` steps."""
    return step % every_steps == 0 or step == config.schedule.steps


def phase_of(phases: tuple[Phase, ...], step: int) -> Phase:
    """The phase that governs a step."""
    return next(phase for phase in reversed(phases) if phase.first_step <= step)
