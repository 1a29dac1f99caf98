"""Micro-batches of random tokens, for tests of the trainer that need no corpus."""

from typing import Any

import numpy as np

from data_pipeline.masking import Vocabulary
from data_pipeline.packing import LAYOUTS, Packing
from data_pipeline.stream import MicroBatch, empty_micro_batch
from data_pipeline.window import Finished
from trainer.config import RunConfig

VOCAB_SIZE = 97
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
EMPTY = empty_micro_batch(Vocabulary(VOCAB_SIZE, **SPECIAL, ordinary_ranges=((5, VOCAB_SIZE),)))


def random_micro_batch(
    number: int, *, num_samples: int = 4, num_tokens: int = 24, pairs: bool = True, masks: bool = True, packing: Packing = "none"
) -> MicroBatch:
    """A micro-batch that depends on `number` only: samples of different lengths, 15 % masked, some pairs unlabelled."""
    random = np.random.default_rng(number)
    lengths = random.integers(num_tokens // 2, num_tokens + 1, num_samples)
    ends = np.cumsum(lengths)
    ids = random.integers(5, VOCAB_SIZE, ends[-1])
    ids[ends - lengths] = SPECIAL["cls"]
    ids[ends - 1] = SPECIAL["sep"]
    positions = np.flatnonzero((random.random(len(ids)) < 0.15) & (ids >= 5)) if masks else np.zeros(0, np.int64)
    labels = ids[positions]
    ids[positions] = SPECIAL["mask"]
    nsp = random.integers(0, 2, num_samples) if pairs else np.full(num_samples, -100)
    nsp[0] = -100
    samples = Finished(ids, lengths, lengths // 2, positions, labels, nsp)
    return MicroBatch(number, samples, LAYOUTS[packing](lengths, num_tokens), SPECIAL["pad"])


def small_config(**sections: Any) -> RunConfig:
    """A run of a two-layer network on the tokenizer of `write_tokenizer`; keyword arguments replace whole sections. Two of them compute alike."""
    values: dict[str, Any] = {
        "name": "test",
        "seed": 3,
        "precision": "fp32",
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 64, "dropout": 0.0},
        "batch": {"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 24},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
        "schedule": {"steps": 20, "warmup_steps": 4},
    }
    values |= sections
    values["model"] = {"attention": "eager"} | values["model"]
    return RunConfig.model_validate(values)


def write_tokenizer(folder: str, vocab_size: int = VOCAB_SIZE) -> None:
    """A tokenizer of made-up words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"[{name.upper()}]": number for name, number in SPECIAL.items()}
    vocabulary |= {f"w{number}": number for number in range(len(SPECIAL), vocab_size)}
    tokens = {f"{name}_token": f"[{name.upper()}]" for name in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")), **tokens).save_pretrained(folder)
