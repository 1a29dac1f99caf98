"""Child's side of the training benchmarks: a rank of our trainer that takes optimizer steps on batches that are there already."""

import os
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.children import Measurement, timed_rate
from benchmarks.contestants.training_batches import micro_batches
from benchmarks.training import Network, Shape

LR = 1e-4


class OurTraining:
    """The part of `trainer.pretrain.train` between reading and recording a step, on the rank's device."""

    def __init__(self, config: Any, engine: Any, empty: Any, world_size: int) -> None:
        self._config = config
        self._empty = empty
        self._world_size = world_size
        self._next: Any = None
        self.engine = engine

    @classmethod
    def build(
        cls, network: Network, shape: Shape, *, precision: str, dropout: float, world_size: int = 1, stage: int = 1, **others: Any
    ) -> "OurTraining":
        """The trainer's network and engine; torch.distributed is initialised. `others` as `run_config` has them."""
        from tests.support.batches import EMPTY
        from trainer.attention import fastest_kernels
        from trainer.compiling import compile_layers
        from trainer.engine import Engine

        config = run_config(network, shape, precision=precision, dropout=dropout, stage=stage, **others)
        engine = Engine.build(network_of(config, network), config)
        if config.model.attention == "auto":
            engine.model.kernels = fastest_kernels(config, engine.model.config, engine.model.candidate_kernels(), engine.device)
        if config.model.compile:
            compile_layers(engine.model, config, engine.device)
        return cls(config, engine, EMPTY, world_size)

    def step(self, batches: Sequence[Any], following: Sequence[Any] | None = None) -> float:
        """An optimizer step over this rank's micro-batches; returns the loss of the global batch. The next one's, if known, are made ready while a
        GPU computes this."""
        from trainer.passes import forward_backward
        from trainer.totals import StepLosses

        work = self._next or self._work(batches)
        counts = work.counts.total(self.engine.device)
        sums = forward_backward(self.engine, work, counts, self._world_size)
        self._next = self._work(following) if following is not None and self.engine.computes_behind else None
        losses = StepLosses.total(sums, counts, self.engine.device)
        self.engine.step(LR)
        return losses.loss

    def _work(self, batches: Sequence[Any]) -> Any:
        from trainer.passes import StepWork
        from trainer.reading import StepPart

        part = StepPart(list(batches), 0, len(batches), len(batches) * self._world_size, 0.0)
        return StepWork.of(part, self._empty, self._config, self.engine.device)


def run_config(network: Network, shape: Shape, *, precision: str, dropout: float, stage: int = 1, optimizer: str = "adamw", **model: Any) -> Any:
    """The run.yaml of a benchmark: everything else at its default but for what `model` sets of the network."""
    from trainer.config import RunConfig

    return RunConfig.model_validate(
        {
            "name": "bench",
            "precision": precision,
            "zero": {"stage": stage},
            "optimizer": {"kind": optimizer},
            "objective": network.objective,
            "model": {**network.section(shape.length, dropout), **model},
            "batch": {"global_batch_size": shape.samples, "micro_batch_size": shape.samples, "sequence_length": shape.length},
        }
    )


def network_of(config: Any, network: Network) -> Any:
    """What the trainer builds for a run on this device, over a made-up vocabulary of the network's size."""
    from tests.support.batches import write_tokenizer
    from trainer.engine import training_device
    from trainer.model import build_model

    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        write_tokenizer(folder, network.vocab_size)
        length = max(config.batch.sequence_lengths)
        again = config.zero.stage == 3
        built = build_model(config.model, folder, seed=0, sequence_length=length, device=training_device(), reentrant_checkpointing=again)
    if config.model.attention != "auto":
        built.kernels = {str(length): config.model.attention}
    return built


@contextmanager
def process_group(folder: str | None = None, rank: int = 0, world_size: int = 1, within_s: float = 600.0) -> Generator[None]:
    """torch.distributed with one thread a rank: gloo on a CPU, NCCL on a GPU. No rank waits for another longer than `within_s`."""
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as own:
        store = f"file://{Path(folder or own) / 'store'}"
        backend, limit = "nccl" if torch.cuda.is_available() else "gloo", timedelta(seconds=within_s)
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=world_size, timeout=limit)
        try:
            yield
        finally:
            dist.destroy_process_group()


def ours(network: dict[str, Any], shape: dict[str, Any], precision: str, seconds: float, accumulation: int = 1, dropout: float = 0.1) -> Measurement:
    """Tokens a second of steps of `accumulation` micro-batches, after one that sets things up."""
    with process_group():
        dimensions, batches = Network(**network), Shape(**shape)
        training = OurTraining.build(dimensions, batches, precision=precision, dropout=dropout)
        return {"precision": precision, **timed_rate(our_steps(training, micro_batches(batches, dimensions), accumulation), seconds)}


def our_steps(training: OurTraining, batches: Sequence[Any], accumulation: int) -> Iterator[dict[str, int]]:
    """Steps for ever, the batches taking turns."""
    turns = cycle(batches)
    while True:
        chosen = list(islice(turns, accumulation))
        training.step(chosen)
        yield counts_of(chosen)


def counts_of(batches: Sequence[Any]) -> dict[str, int]:
    """What a step over these counts for: real tokens, places with padding, steps."""
    return {"tokens": sum(batch.num_tokens for batch in batches), "places": sum(batch.layout.num_places for batch in batches), "steps": 1}
