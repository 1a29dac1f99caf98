"""Profiles some steps of a run as it is configured: all ranks take them, rank 0 tells trace, largest costs, phases. The run stays as it is."""

import gzip
import os
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function, schedule

from data_pipeline.errors import InterruptedRunError
from data_pipeline.mixture import Mixture
from data_pipeline.storage import Location
from data_pipeline.stream import MicroBatchStream, empty_micro_batch
from trainer.agreement import Ranks, agreement_group
from trainer.attention import table_in_words
from trainer.checkpoint import has_same_layout, newest_intact
from trainer.choices import looked_up, looked_up_kernels
from trainer.compiling import compile_layers
from trainer.config import RunConfig
from trainer.context import ForwardingContext, RunContext
from trainer.costs import LABEL, costs_of
from trainer.engine import Engine, training_device
from trainer.passes import StepWork, forward_backward
from trainer.peaks import device_name
from trainer.pretrain import build_engine
from trainer.reading import Ahead, read_steps
from trainer.refusals import require_same_data
from trainer.runlog import RunFolder
from trainer.schedule import learning_rate
from trainer.state import TrainState
from trainer.timeline import Timeline
from trainer.totals import StepLosses, on_rank_zero, raise_together

WARM_UP_STEPS = 1
"""Steps that are taken before those that are profiled: memory is found, kernels are chosen."""
RESULT, TRACE, ZIPPED_TRACE = "profile.json", "trace.json", "trace.json.gz"
_LARGE_BYTES = 16 << 20
_COPY_BYTES = 1 << 20
_LOAD_TIMEOUT_S = 600.0


class Labels(ForwardingContext):
    """A `RunContext` that passes everything on, and labels the phases in a trace."""

    def __init__(self, context: RunContext) -> None:
        super().__init__(context)
        self._open: list[tuple[str, record_function]] = []

    def heartbeat(self, step: int, phase: str) -> None:
        """See `RunContext.heartbeat`. `reduce` lies within the backward pass, in whose midst it may begin and end; other phases follow each other."""
        super().heartbeat(step, phase)
        within = [name for name, _ in self._open]
        if phase == "backward" and within == ["backward", "reduce"]:
            self._close(1)
            return
        if phase != "reduce":
            self._close(len(self._open))
        label = record_function(f"{LABEL}{phase}")
        label.__enter__()
        self._open.append((phase, label))

    def _close(self, number: int) -> None:
        for _ in range(number):
            self._open.pop()[1].__exit__(None, None, None)

    def close(self) -> None:
        """End the last phase."""
        self._close(len(self._open))


def profile_steps(config: RunConfig, corpus: str, run: str, output: str, steps: int, context: RunContext, attempt: int) -> None:
    """Take one step to warm up and `steps` more, with the weights of the newest checkpoint or fresh ones; rank 0 profiles them.

    Runs on every rank, with torch.distributed initialised. The steps are those that come next, of a run that has not so many left its last ones.
    What is learned is forgotten. Rank 0 leaves `profile.json` and the trace in the folder `output`, and the run folder as it is.

    Raises:
        InterruptedRunError: a stop was requested.
        MaskwrightError: a rank could not read its data or the checkpoint; the same error on every rank.
    """
    del attempt
    timeline = Timeline.of(context, training_device())
    timeline.heartbeat(0, "set-up")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    folder = RunFolder(Location.at(run))
    config = looked_up(config, folder, training_device())
    corpora = Mixture.open(Location.at(corpus), config.data)
    engine = build_engine(config, corpora)
    engine.model.kernels = looked_up_kernels(config, folder, engine.model, engine.device)
    if config.model.compile:
        compile_layers(engine.model, config, engine.device)
    fresh = TrainState(corpus_fingerprint=corpora.fingerprint, tokenizer_digest=corpora.tokenizer_digest)
    state = _load(engine, folder, config, fresh, timeline)
    first_step = min(state.step, config.schedule.steps - steps - WARM_UP_STEPS)
    profiler = _profiler(engine.device, steps) if context.rank == 0 else None
    seconds = _take_steps(config, corpora, engine, timeline, profiler, range(first_step, first_step + WARM_UP_STEPS + steps))
    about = {
        "run": folder.root.name,
        "checkpoint_step": state.step or None,
        "first_step": first_step + WARM_UP_STEPS,
        "num_steps": steps,
        "world_size": context.world_size,
        "zero_stage": config.zero.stage,
        "precision": config.precision,
        "attention": table_in_words(engine.model.kernels),
        "compiled": config.model.compile,
        "device": device_name(engine.device),
        "step_s": sum(seconds.values()) / steps,
        "phases": _phases(seconds, steps, reduces_apart=engine.reduces_apart) if seconds else [],
    }
    on_rank_zero("write the profile", lambda: _write(profiler, Location.at(output), about, on_gpu=engine.device.type == "cuda"))


def _load(engine: Engine, run: RunFolder, config: RunConfig, fresh: TrainState, context: RunContext) -> TrainState:
    """Give the engine the newest checkpoint, if there is one; returns its state, or `fresh`."""
    ranks = Ranks(context.rank, context.world_size, agreement_group(context.world_size), _LOAD_TIMEOUT_S)
    found = newest_intact(run, ranks, config, partial(context.heartbeat, 0, "set-up"))
    if found is None:
        return fresh
    try:
        require_same_data(found.state, fresh)
        load = engine.load if has_same_layout(found.manifest, config, context.world_size) else engine.load_from_other_layout
        load(found.zero_folder)
    finally:
        found.discard_copy()
    return found.state


def _take_steps(config: RunConfig, corpora: Mixture, engine: Engine, timeline: Timeline, profiler: Any, steps: range) -> dict[str, float]:
    """Take the steps; returns rank 0's seconds by phase in those after the warm-up."""
    stream = MicroBatchStream(corpora, config.objective, config.phases, config.seed, packing=config.batch.row_packing)
    rank, world_size, workers = timeline.rank, timeline.world_size, config.batch.loader_workers
    parts = read_steps(stream, config.phases, first_step=steps.start, rank=rank, world_size=world_size, workers=workers)
    empty, labels = empty_micro_batch(corpora.vocabulary), Labels(timeline)
    works = Ahead(StepWork.of(part, empty, config, engine.device) for part in parts)
    with profiler or nullcontext():
        for step in steps:
            if step == steps.start + WARM_UP_STEPS:
                timeline.take()
            _take_step(config, engine, labels, works, step)
            labels.close()
            timeline.heartbeat(step, "trace")  # the profiler's own time, the longest after the last step, is none of a phase
            if profiler is not None:
                profiler.step()
    return {phase: spent for phase, spent in timeline.take().items() if phase not in {"", "trace"}}


def _take_step(config: RunConfig, engine: Engine, context: RunContext, works: Ahead[StepWork], step: int) -> None:
    """A step as `trainer.pretrain.train` takes it, without what records and saves. Collective."""
    context.heartbeat(step, "data")
    work = works.take()
    own = replace(work.counts, stops=int(context.stop_requested()), failures=int(work.part.error is not None))
    context.heartbeat(step, "agree")
    counts = own.total(engine.device)
    if counts.failures:
        raise_together(work.part.error, f"read the data of step {step}")
    if counts.stops:
        raise InterruptedRunError("profiling was stopped", "Run it again.")
    sums = forward_backward(engine, work, counts, context.world_size, enter=partial(context.heartbeat, step))
    if engine.computes_behind:
        context.heartbeat(step, "data")
        works.make()
    context.heartbeat(step, "agree")
    StepLosses.total(sums, counts, engine.device)
    context.heartbeat(step, "optimizer")
    engine.step(learning_rate(config.optimizer.lr, config.schedule, step))


def _profiler(device: torch.device, steps: int) -> Any:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    return torch.profiler.profile(activities=activities, schedule=schedule(wait=0, warmup=WARM_UP_STEPS, active=steps, repeat=1))


def _phases(seconds: dict[str, float], steps: int, *, reduces_apart: bool) -> list[dict[str, Any]]:
    """Seconds of a step and share by phase, in the order of a step; null of reducing where it is part of the backward pass."""
    whole_s = sum(seconds.values())
    found: list[dict[str, Any]] = [{"phase": phase, "seconds": spent / steps, "share": spent / whole_s} for phase, spent in seconds.items()]
    return found if reduces_apart else [*found, {"phase": "reduce", "seconds": None, "share": None}]


def _write(profiler: Any, output: Location, about: dict[str, Any], *, on_gpu: bool) -> None:
    trace = _write_trace(profiler, output)
    costs = [asdict(cost) for cost in costs_of(profiler.key_averages(), on_gpu=on_gpu)]
    (output / RESULT).write_json({**about, "costs_of": "gpu" if on_gpu else "cpu", "costs": costs, "trace": trace.url})


def _write_trace(profiler: Any, output: Location) -> Location:
    """The Chrome trace, compressed where it is large; that of an earlier profile goes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / TRACE
        profiler.export_chrome_trace(str(path))
        for name in (TRACE, ZIPPED_TRACE):
            (output / name).remove()
        if path.stat().st_size <= _LARGE_BYTES:
            (output / TRACE).write_bytes(path.read_bytes())
            return output / TRACE
        zipped = Path(scratch) / ZIPPED_TRACE
        with path.open("rb") as plain, gzip.open(zipped, "wb", compresslevel=5) as target:
            shutil.copyfileobj(plain, target, _COPY_BYTES)
        (output / ZIPPED_TRACE).write_bytes(zipped.read_bytes())
        return output / ZIPPED_TRACE
