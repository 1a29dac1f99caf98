"""300 steps of the trainer give the losses of a plain torch + transformers loop on the same batches, and those of a committed curve.

The golden curve is the plain loop's, not the trainer's: `python -m tests.distributed.test_golden_curve` writes it again, which is right when
the batches are meant to have changed (`digest`), and otherwise never.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForPreTraining

from data_pipeline.mixture import Mixture
from data_pipeline.storage import Location
from data_pipeline.stream import MicroBatch, MicroBatchStream, step_digest
from tests.support.batches import small_config
from tests.support.corpus import small_corpus
from tests.support.distributed import run_distributed
from trainer.config import RunConfig
from trainer.context import LocalContext
from trainer.model import build_model
from trainer.pretrain import pretrain
from trainer.runlog import RunFolder

pytestmark = pytest.mark.full

GOLDEN = Path(__file__).parent.parent / "golden" / "loss-curve.json"
STEPS, WARMUP_STEPS, LR, WEIGHT_DECAY, CLIP_NORM = 300, 30, 2e-3, 0.1, 1.0
RANKS, MICRO_BATCHES, SAMPLES, LENGTH = 2, 4, 4, 64
TOLERANCE = 1e-5
"""Relative error of every loss. Another order of fp32 sums gives 3e-7 here, and training does not magnify it; a learning rate that is wrong by a
thousandth gives 9e-5, weight decay by a tenth 7e-5, clipping by a thousandth 2e-5."""

Curve = dict[str, Any]


def run_config() -> RunConfig:
    return small_config(
        model={"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": LENGTH, "dropout": 0.0},
        batch={"global_batch_size": MICRO_BATCHES * SAMPLES, "micro_batch_size": SAMPLES, "sequence_length": LENGTH},
        optimizer={"lr": LR, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM},
        schedule={"steps": STEPS, "warmup_steps": WARMUP_STEPS},
        checkpoint={"every_steps": STEPS},
        validation={"every_steps": STEPS, "micro_batches": 1},
        zero={"stage": 1},
    )


def train(rank: int, world_size: int, corpus: str, run: str) -> None:
    """The trainer: two micro-steps of two ranks under ZeRO-1."""
    pretrain(run_config(), corpus, run, LocalContext(rank, world_size), 1)


def plain_curve(corpus: str) -> Curve:
    """The same in one process: stock forward pass and loss over the whole global batch, torch's AdamW, clipping and schedule written out."""
    torch.set_num_threads(1)
    config, corpora = run_config(), Mixture.open(Location.at(corpus))
    stream = MicroBatchStream(corpora, config.objective, config.phases, config.seed)
    model = stock_model(config, corpora)
    no_decay = [parameter for name, parameter in model.named_parameters() if name.endswith("bias") or "LayerNorm" in name]
    decay = [parameter for name, parameter in model.named_parameters() if not name.endswith("bias") and "LayerNorm" not in name]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=config.optimizer.betas, eps=config.optimizer.eps)
    losses: list[float] = []
    digests: list[int] = []
    for step in range(STEPS):
        batches = [stream[number] for number in range(step * MICRO_BATCHES, (step + 1) * MICRO_BATCHES)]
        loss = model(**stock_inputs(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / WARMUP_STEPS, (STEPS - step) / (STEPS - WARMUP_STEPS))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        digests.append(step_digest(enumerate(batch.digest for batch in batches)))
    return {"digest": curve_digest(digests), "loss": losses}


def stock_model(config: RunConfig, corpora: Mixture) -> BertForPreTraining:
    """transformers' own network in its default configuration, with the weights that the trainer starts from."""
    ours = build_model(config.model, corpora.tokenizer_folder, seed=config.seed, sequence_length=LENGTH, device=torch.device("cpu"))
    model = BertForPreTraining(
        BertConfig(
            vocab_size=corpora.vocabulary.size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    model.load_state_dict(ours.state_dict())
    return model.train()


def stock_inputs(batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
    """A global batch as stock transformers takes it, a row a sample."""
    width = max(batch.layout.width for batch in batches)

    def rows(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([padded(getattr(batch, name), width, 0) for batch in batches]))

    return {
        "input_ids": rows("input_ids"),
        "token_type_ids": rows("token_type_ids"),
        "attention_mask": rows("sample_ids").sign(),
        "labels": torch.from_numpy(np.concatenate([padded(mlm_labels(batch), width, -100) for batch in batches])),
        "next_sentence_label": torch.from_numpy(np.concatenate([batch.nsp_labels for batch in batches])),
    }


def mlm_labels(batch: MicroBatch) -> Any:
    labels = np.full(batch.layout.num_places, -100)
    labels[batch.mlm_positions] = batch.mlm_labels
    return labels.reshape(batch.layout.num_rows, batch.layout.width)


def padded(table: Any, width: int, value: int) -> Any:
    return np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=value)


def curve_digest(digests: Sequence[int]) -> str:
    """Of all batches, in order."""
    return hashlib.sha256(b"".join(digest.to_bytes(8, "little") for digest in digests)).hexdigest()[:16]


def require_equal(found: Curve, expected: Curve, whose: str) -> None:
    """Refuse losses beyond the tolerance, and name the first step that has one."""
    assert found["digest"] == expected["digest"], f"these are not the batches of {whose}: compare no losses"
    assert len(found["loss"]) == len(expected["loss"]) == STEPS
    for step, (loss, other) in enumerate(zip(found["loss"], expected["loss"], strict=True)):
        assert math.isclose(loss, other, rel_tol=TOLERANCE), f"step {step}: loss {loss}, of {whose} {other}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("corpus"), sequence_lengths=(LENGTH,))


@pytest.fixture(scope="module")
def trained(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """The trainer's curve, from the records of its run."""
    run = RunFolder(Location.at(tmp_path_factory.mktemp("run")))
    run_distributed(train, RANKS, (corpus, str(run.root)), timeout_s=100)
    records = run.read_metrics()
    return {"digest": curve_digest([int(record["batch_digest"], 16) for record in records]), "loss": [record["loss"] for record in records]}


def test_the_trainer_gives_the_losses_of_a_plain_loop(corpus: str, trained: Curve) -> None:
    plain = plain_curve(corpus)
    require_equal(trained, plain, "the plain loop")
    assert trained["loss"][-1] < 0.95 * trained["loss"][0], "nothing is learned: the curve says nothing"


def test_the_trainer_gives_the_golden_curve(trained: Curve) -> None:
    require_equal(trained, json.loads(GOLDEN.read_text()), str(GOLDEN.name))


@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_another_curve_is_told_apart(step: int) -> None:
    golden = json.loads(GOLDEN.read_text())
    losses = list(golden["loss"])
    losses[step] *= 1 + 2 * TOLERANCE
    with pytest.raises(AssertionError, match=f"step {step}: "):
        require_equal({**golden, "loss": losses}, golden, "the golden curve")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        curve = plain_curve(small_corpus(Path(folder), sequence_lengths=(LENGTH,)))
    GOLDEN.write_text(json.dumps({**curve, "loss": [float(f"{loss:.7g}") for loss in curve["loss"]]}, indent=1) + "\n")
