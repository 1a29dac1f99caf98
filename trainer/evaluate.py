"""Scores of classifiers under accelerate, on any number of ranks; what a masked-LM model fills in (reads models and tasks, writes nothing)."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data_pipeline.errors import ConfigError
from data_pipeline.storage import Location
from data_pipeline.tokenizer import load_tokenizer
from trainer.agreement import Ranks, agreement_group
from trainer.architectures import longest_row
from trainer.choices import Precision, computes_bf16, fastest_precision
from trainer.classifier import load_classifier, load_weights, trained_max_length
from trainer.context import RunContext
from trainer.finetune_config import TaskConfig
from trainer.finetune_results import Scores
from trainer.model_folder import local_folder
from trainer.task_batches import EncodedRows, collate, encode_rows, padded_length
from trainer.tasks import Task, load_task

ROWS_PER_BATCH = 32
RANK_ZERO_TIMEOUT_S = 1800.0
"""How long the other ranks wait while rank 0 reads a task or fits the baseline."""


def open_accelerator() -> Accelerator:
    """The accelerator of this process group (or single process), on its device. Mixed precision is not its business, see `forward`."""
    if dist.is_initialized():  # accelerate looks at the environment only
        size = dist.get_world_size()
        for name, value in {"RANK": dist.get_rank(), "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": size}.items():
            os.environ.setdefault(name, str(value))
    on_cpu = not torch.cuda.is_available() or (dist.is_initialized() and dist.get_backend() == "gloo")
    num_threads = torch.get_num_threads()
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=handlers)
    torch.set_num_threads(num_threads)  # accelerate sets it where OMP_NUM_THREADS is absent
    return accelerator


def open_ranks(context: RunContext) -> Ranks:
    """How the ranks of this stage agree; a collective call."""
    return Ranks(context.rank, context.world_size, agreement_group(context.world_size), RANK_ZERO_TIMEOUT_S)


def forward(model: nn.Module, inputs: dict[str, Tensor], precision: Precision) -> Tensor:
    """Logits in fp32; under bf16 the matrix products run in bf16 and the weights stay fp32."""
    device = inputs["input_ids"].device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(**inputs).logits.float()


def predict(accelerator: Accelerator, model: nn.Module, encoded: EncodedRows, precision: Precision) -> tuple[int, ...]:
    """The label number of each row, on every rank: ranks share the batches and gather what they found."""
    order = sorted(range(len(encoded)), key=lambda row: len(encoded.input_ids[row]))  # equal lengths together: little padding
    loader = DataLoader(order, batch_size=ROWS_PER_BATCH, collate_fn=lambda rows: _with_rows(encoded, rows))  # pyright: ignore[reportArgumentType]
    predictions = torch.zeros(len(encoded), dtype=torch.int64)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in accelerator.prepare_data_loader(loader):
            rows = batch.pop("rows")
            labels = forward(model, batch, precision).argmax(dim=-1)
            all_rows, all_labels = accelerator.gather_for_metrics((rows, labels))
            predictions[all_rows.cpu()] = all_labels.cpu()
    model.train(was_training)
    return tuple(predictions.tolist())


def score(labels: Sequence[int], predictions: Sequence[int], num_labels: int) -> Scores:
    """Accuracy, and F1 averaged over all labels with equal weight (0 for a label that is neither there nor predicted)."""
    from sklearn.metrics import accuracy_score, f1_score

    macro_f1 = f1_score(labels, predictions, labels=range(num_labels), average="macro", zero_division=0)  # pyright: ignore[reportArgumentType]
    return Scores(float(accuracy_score(labels, predictions)), float(macro_f1))


def evaluate_model(model: str, task: TaskConfig, work_folder: str, context: RunContext, max_length: int | None = None) -> dict[str, Any]:
    """Accuracy and macro-F1 of a classifier's model folder on a task's test rows; every rank calls this and gets the result.

    `max_length` None takes the one that the classifier was trained with.

    Raises:
        NotFoundError: the model or the task is not there.
        ConfigError: the model is not a classifier, or has other labels than the task.
    """
    accelerator, ranks = open_accelerator(), open_ranks(context)
    context.heartbeat(0, "set-up")
    loaded: Task = ranks.rank_zero_does("read the task", lambda: load_task(task, work_folder))
    everywhere = all(ranks.all_do("time its device", lambda: computes_bf16(accelerator.device)))
    precision: Precision = ranks.rank_zero_does("choose a precision", lambda: fastest_precision(accelerator.device, everywhere=everywhere))
    with local_folder(Location.at(model)) as folder:
        classifier = load_classifier(folder, loaded.label_names, loaded.name)
        encoded = encode_rows(load_tokenizer(folder), loaded.test, max_length or trained_max_length(folder))
    predictions = predict(accelerator, accelerator.prepare_model(classifier, evaluation_mode=True), encoded, precision)
    accelerator.free_memory()
    scores = score(loaded.test.labels, predictions, loaded.num_labels)
    return {"task": task.name, "num_rows": len(loaded.test), "accuracy": scores.accuracy, "macro_f1": scores.macro_f1}


def fill_mask(model: str, text: str, top_k: int = 5) -> list[list[tuple[str, float]]]:
    """The `top_k` likeliest tokens and their probabilities for each mask token of `text`, in order; one process.

    Raises:
        NotFoundError: there is no such model.
        ConfigError: the text has no mask token, or the model no model.safetensors, or it is no masked language model.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM

    with local_folder(Location.at(model)) as folder:
        tokenizer: Any = load_tokenizer(folder)
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if type(config) not in AutoModelForMaskedLM._model_mapping:  # pyright: ignore[reportPrivateUsage]  # else a ValueError with a page of names
            raise ConfigError(f"{model} is a {config.model_type} model, which fills in no masks", "Name a masked language model.")
        inputs = tokenizer(text, truncation=True, max_length=longest_row(config), return_tensors="pt")
        places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten()
        if not len(places):
            raise ConfigError(
                f"the text has no {tokenizer.mask_token}: {text[:60]!r}", f"Write {tokenizer.mask_token} where the model should fill in."
            )
        network: Any = load_weights(AutoModelForMaskedLM, folder).eval()
    with torch.inference_mode():
        probabilities = network(**inputs).logits[0, places].float().softmax(dim=-1)
    found = probabilities.topk(top_k, dim=-1)
    words = [tokenizer.convert_ids_to_tokens(row) for row in found.indices.tolist()]
    return [list(zip(word, row, strict=True)) for word, row in zip(words, found.values.tolist(), strict=True)]


def _with_rows(encoded: EncodedRows, rows: Sequence[int]) -> dict[str, Tensor]:
    inputs = collate(encoded, rows, padded_length(encoded.lengths_of(rows), encoded.max_length))
    return {**inputs, "rows": torch.tensor(rows)}
