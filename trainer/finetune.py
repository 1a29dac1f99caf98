"""The fine-tune stage: one task, pretrained and from scratch, every seed, under accelerate on every rank of a worker group.

A step is one global batch of `batch_size` rows, cut into micro-batches of a fixed number of rows whatever the number of ranks. Dropout
is keyed by (seed, step, micro-batch), so the number of ranks changes the order of a sum and nothing else.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig

from data_pipeline.errors import InterruptedRunError
from data_pipeline.hashing import mix64
from data_pipeline.order import micro_steps, rank_micro_batches
from data_pipeline.storage import Location
from data_pipeline.tokenizer import load_tokenizer
from trainer.agreement import Ranks
from trainer.architectures import longest_row
from trainer.baseline import tfidf_baseline
from trainer.choices import Precision, computes_bf16, fastest_precision
from trainer.classifier import build_classifier, save_classifier
from trainer.config import ScheduleConfig
from trainer.context import RunContext
from trainer.evaluate import forward, open_accelerator, open_ranks, predict, score
from trainer.finetune_config import FinetuneConfig, TaskConfig
from trainer.finetune_progress import Progress, ProgressFolder, StateDamagedError
from trainer.finetune_results import (
    INITS,
    RESULTS_VERSION,
    Init,
    Scores,
    TaskOutput,
    TrialResult,
    best_trial,
    network_results,
    prediction_lines,
    system_summary,
)
from trainer.model_folder import local_folder, model_digest
from trainer.schedule import learning_rate
from trainer.task_batches import EncodedRows, collate, encode_rows, epoch_batches, padded_length
from trainer.tasks import Task, load_task

MICRO_BATCH_ROWS = 8
"""As fast on a core as 32. More ranks than micro-batches in a step stand idle."""
WARMUP_SHARE = 0.1
CLIP_NORM = 1.0
SAVE_EVERY_S = 60.0
"""A killed trial repeats at most about this much work."""


def finetune_task(config: FinetuneConfig, task: TaskConfig, model: str, output: str, context: RunContext, save_every_s: float = SAVE_EVERY_S) -> None:
    """Fine-tune `model` (a folder that transformers loads) on one task and write the folder `output`, normally `<run>/finetune/<task>`.

    Every rank calls this, with torch.distributed initialised when there is more than one. results.json is written last. What an
    earlier, killed or stopped call with the same model, task and settings has finished is not repeated.

    Raises:
        NotFoundError, ConfigError, DataCorruptError: the model or the task cannot be used (`load_task` says how).
        InterruptedRunError: the context asked to stop; the state is saved.
    """
    accelerator, ranks = open_accelerator(), open_ranks(context)
    context.heartbeat(0, "set-up")
    with local_folder(Location.at(model)) as folder:
        stage = _open_stage(config, task, folder, TaskOutput(Location.at(output), ""), accelerator, ranks, context, save_every_s)
        if ranks.rank_zero_does("look for results", lambda: stage.output.is_finished(config.num_seeds)):
            return
        trials = [_finished_or_run(stage, init, seed) for init in INITS for seed in range(config.num_seeds)]
        ranks.rank_zero_does(f"write the results of task {task.name}", lambda: _write_results(stage, trials))


@dataclass(frozen=True)
class _Stage:
    """Everything that the trials of a task share."""

    config: FinetuneConfig
    task: Task
    model_folder: str
    model_digest: str
    output: TaskOutput
    precision: Precision
    train: EncodedRows
    dev: EncodedRows
    test: EncodedRows
    accelerator: Accelerator
    ranks: Ranks
    context: RunContext
    save_every_s: float

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.config.batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of one trial."""
        return self.steps_per_epoch * self.config.epochs


def _open_stage(
    config: FinetuneConfig,
    task: TaskConfig,
    folder: str,
    output: TaskOutput,
    accelerator: Accelerator,
    ranks: Ranks,
    context: RunContext,
    save_every_s: float,
) -> _Stage:
    # Rank 0 reads the task for all: installed packages, and so `python-docs`, may differ between nodes.
    work_folder = output.folder.path / "task" if output.folder.is_local else Path(folder) / "task"
    loaded = ranks.rank_zero_does("read the task", lambda: load_task(task, work_folder))
    digest = ranks.rank_zero_does("read the model", lambda: model_digest(folder))
    settings = config.model_dump(mode="json", exclude={"tasks", "num_seeds"})
    key = hashlib.sha256(json.dumps([settings, loaded.digest, digest], sort_keys=True).encode()).hexdigest()
    output = TaskOutput(output.folder, key)
    tokenizer = load_tokenizer(folder)
    max_length = min(config.max_length, longest_row(AutoConfig.from_pretrained(folder, trust_remote_code=False)))
    train, dev, test = (encode_rows(tokenizer, rows, max_length) for rows in (loaded.train, loaded.dev, loaded.test))
    everywhere = all(ranks.all_do("time its device", lambda: computes_bf16(accelerator.device)))
    precision: Precision = ranks.rank_zero_does("choose a precision", lambda: _frozen_precision(output, accelerator.device, everywhere=everywhere))
    return _Stage(config, loaded, folder, digest, output, precision, train, dev, test, accelerator, ranks, context, save_every_s)


def _frozen_precision(output: TaskOutput, device: torch.device, *, everywhere: bool) -> Precision:
    choice = output.read_choice()
    if choice.get("device") == device.type:
        return choice["precision"]
    precision = fastest_precision(device, everywhere=everywhere)
    output.write_choice({"device": device.type, "precision": precision})
    return precision


def _finished_or_run(stage: _Stage, init: Init, seed: int) -> TrialResult:
    found = stage.ranks.rank_zero_does("look for finished trials", lambda: stage.output.read_trial(init, seed))
    if found is not None:
        return found
    trial, progress = _resumed_trial(stage, init, seed)
    try:
        progress = _train(trial, progress)
        result = _test(trial, progress)
        stage.ranks.rank_zero_does("record a trial", lambda: _record(trial, result))
    finally:
        stage.accelerator.free_memory()
    return result


@dataclass(frozen=True)
class _Trial:
    """One network and one seed."""

    stage: _Stage
    init: Init
    seed: int
    model: nn.Module
    optimizer: Any
    peak_lr: float
    progress_folder: ProgressFolder


def _open_trial(stage: _Stage, init: Init, seed: int) -> _Trial:
    config = stage.config
    network = build_classifier(stage.model_folder, stage.task.label_names, init, seed)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]  # biases and layer norms
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    model, optimizer = stage.accelerator.prepare(network.to(stage.accelerator.device), torch.optim.AdamW(groups, lr=config.lr, fused=True))
    peak_lr = config.scratch_lr or config.lr if init == "scratch" else config.lr
    folder = ProgressFolder(stage.output.folder, f"{stage.output.key[:12]}-{init}-{seed}", stage.accelerator, stage.ranks)
    return _Trial(stage, init, seed, model, optimizer, peak_lr, folder)


def _resumed_trial(stage: _Stage, init: Init, seed: int) -> tuple[_Trial, Progress]:
    """The trial, and where an earlier attempt of it was; from the start when what that saved is damaged."""
    while True:  # each time round there is one saved state less
        trial = _open_trial(stage, init, seed)
        try:
            return trial, trial.progress_folder.load() or Progress(0, (), 0.0)
        except StateDamagedError:
            stage.accelerator.free_memory()


def _train(trial: _Trial, progress: Progress) -> Progress:
    """Train to the end from `progress`."""
    stage, context = trial.stage, trial.stage.context
    resumed, started_at = progress, time.monotonic()
    saved_at = started_at
    for step, batch in _steps(trial, progress.step):
        context.heartbeat(step, "forward")
        _take_step(trial, step, batch)
        dev_accuracy = progress.dev_accuracy
        if (step + 1) % stage.steps_per_epoch == 0:
            context.heartbeat(step, "validation")
            dev_accuracy = (*dev_accuracy, _score(trial, stage.dev).accuracy)
        progress = Progress(step + 1, dev_accuracy, resumed.elapsed_s + time.monotonic() - started_at)
        stop, save = _agreed(stage, context.stop_requested(), time.monotonic() - saved_at > stage.save_every_s)
        if stop or (save and progress.step < stage.num_steps):
            context.heartbeat(step, "checkpoint")
            trial.progress_folder.save(progress)
            saved_at = time.monotonic()
        if stop:
            raise InterruptedRunError(
                f"fine-tuning {stage.task.name} was asked to stop at step {progress.step} of {trial.init} seed {trial.seed}",
                "`maskwright resume` continues it there.",
            )
    return progress


def _steps(trial: _Trial, first_step: int) -> Iterator[tuple[int, list[int]]]:
    """(step, row numbers of its global batch) from `first_step` to the end of the trial."""
    stage = trial.stage
    lengths = stage.train.lengths_of(range(len(stage.train)))
    for epoch in range(first_step // stage.steps_per_epoch, stage.config.epochs):
        batches = epoch_batches(lengths, stage.config.batch_size, trial.seed, epoch)
        for step, batch in enumerate(batches, epoch * stage.steps_per_epoch):
            if step >= first_step:
                yield step, batch


def _take_step(trial: _Trial, step: int, batch: list[int]) -> None:
    """One optimizer step over a global batch, of which this rank computes a contiguous share of the micro-batches."""
    stage, accelerator = trial.stage, trial.stage.accelerator
    micro_batches = [batch[first : first + MICRO_BATCH_ROWS] for first in range(0, len(batch), MICRO_BATCH_ROWS)]
    share = rank_micro_batches(len(micro_batches), stage.ranks.rank, stage.ranks.world_size)
    num_passes = micro_steps(len(micro_batches), stage.ranks.world_size)
    for nth in range(num_passes):
        # A surplus pass runs along, so that collectives match, and counts nothing.
        number, weight = (share[nth], 1.0 / len(batch)) if nth < len(share) else (0, 0.0)
        with nullcontext() if nth == num_passes - 1 else accelerator.no_sync(trial.model):
            accelerator.backward(_summed_loss(trial, micro_batches[number], key=(trial.seed, step, number)) * weight)
    for parameter in trial.model.parameters():
        if parameter.grad is not None:  # ranks were averaged; undone here, because doing it in the loss would change how bf16 rounds
            parameter.grad.mul_(stage.ranks.world_size)
    accelerator.clip_grad_norm_(trial.model.parameters(), CLIP_NORM)
    schedule = ScheduleConfig(steps=stage.num_steps, warmup_steps=round(WARMUP_SHARE * stage.num_steps))
    for group in trial.optimizer.param_groups:
        group["lr"] = learning_rate(trial.peak_lr, schedule, step)
    trial.optimizer.step()
    trial.optimizer.zero_grad()


def _summed_loss(trial: _Trial, rows: list[int], key: tuple[int, int, int]) -> Tensor:
    """Cross-entropy summed over `rows`, with dropout drawn from `key`."""
    stage, device = trial.stage, trial.stage.accelerator.device
    num_tokens = padded_length(stage.train.lengths_of(rows), stage.train.max_length)
    inputs = {name: tensor.to(device) for name, tensor in collate(stage.train, rows, num_tokens).items()}
    labels = torch.tensor([stage.train.labels[row] for row in rows], device=device)
    torch.manual_seed(int(mix64(*key) >> np.uint64(1)))
    return functional.cross_entropy(forward(trial.model, inputs, stage.precision), labels, reduction="sum")


def _agreed(stage: _Stage, *flags: bool) -> list[bool]:
    """Whether any rank raised each flag; the same on every rank."""
    if stage.ranks.world_size == 1:
        return list(flags)
    raised = torch.tensor([int(flag) for flag in flags])
    dist.all_reduce(raised, dist.ReduceOp.MAX, group=stage.ranks.group)
    return [bool(flag) for flag in raised.tolist()]


def _predictions(trial: _Trial, encoded: EncodedRows) -> tuple[int, ...]:
    stage = trial.stage
    network: Any = stage.accelerator.unwrap_model(trial.model)
    return predict(stage.accelerator, network, encoded, stage.precision)


def _score(trial: _Trial, encoded: EncodedRows) -> Scores:
    return score(encoded.labels, _predictions(trial, encoded), trial.stage.task.num_labels)


def _test(trial: _Trial, progress: Progress) -> TrialResult:
    stage = trial.stage
    started_at = time.monotonic()
    predictions = _predictions(trial, stage.test)
    scores = score(stage.test.labels, predictions, stage.task.num_labels)
    return TrialResult(trial.init, trial.seed, scores, progress.dev_accuracy, predictions, progress.elapsed_s + time.monotonic() - started_at)


def _record(trial: _Trial, result: TrialResult) -> None:
    """Rank 0: keep the classifier if it is the best so far, then the result, then forget the progress."""
    stage = trial.stage
    if trial.init == "pretrained":
        finished = [found for seed in range(stage.config.num_seeds) if (found := stage.output.read_trial("pretrained", seed))]
        if best_trial([*finished, result]) == result:
            network = stage.accelerator.unwrap_model(trial.model)
            save_classifier(network, stage.model_folder, _lineage(trial, result), stage.output.classifier)
    stage.output.write_trial(result)
    trial.progress_folder.clear()


def _lineage(trial: _Trial, result: TrialResult) -> dict[str, Any]:
    stage = trial.stage
    return {
        "format_version": RESULTS_VERSION,
        "task": stage.task.name,
        "task_digest": stage.task.digest,
        "model_digest": stage.model_digest,
        "seed": trial.seed,
        "dev_accuracy": result.dev_accuracy[-1],
        "max_length": stage.test.max_length,
        "precision": stage.precision,
    }


def _write_results(stage: _Stage, trials: list[TrialResult]) -> None:
    """Rank 0: the baseline, predictions.jsonl, and results.json last."""
    task, labels = stage.task, stage.task.test.labels
    baseline = tfidf_baseline(task)
    said = {trial.init: trial.predictions for trial in trials if trial.seed == 0}
    stage.output.predictions.write_bytes(prediction_lines(labels, task.label_names, {**said, "tfidf": baseline.predictions}))
    tfidf = system_summary([score(labels, baseline.predictions, task.num_labels)])
    stage.output.results.write_json(
        {
            "format_version": RESULTS_VERSION,
            "key": stage.output.key,
            "task": task.name,
            "task_digest": task.digest,
            "labels": list(task.label_names),
            "num_rows": {"train": len(task.train), "dev": len(task.dev), "test": len(task.test)},
            "most_common_label": max(labels.count(label) for label in labels) / len(labels),
            **network_results(trials),
            "tfidf": {**tfidf, "c": baseline.c, "dev_accuracy": baseline.dev_accuracy},
            "model": {"digest": stage.model_digest},
            "precision": stage.precision,
            "config": stage.config.model_dump(mode="json", exclude={"tasks"}),
        }
    )
