"""A tiny labelled task and a tiny exported model, for tests of fine-tuning: seconds on one core."""

import json
import random
from pathlib import Path

import torch

from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenizer import train_tokenizer, write_tokenizer

_TOPICS = {
    "cooking": ["boil", "fry", "salt", "pepper", "oven", "bake", "stew", "onion", "garlic", "butter"],
    "sailing": ["wind", "mast", "harbour", "anchor", "sail", "tide", "rope", "keel", "wave", "deck"],
    "gardening": ["soil", "seed", "rake", "bloom", "prune", "weed", "hedge", "lawn", "compost", "root"],
}
_FILLERS = ["the", "a", "of", "and", "to", "in", "is", "that", "it", "for", "on", "with", "as", "at", "by", "from", "this", "be", "are", "was"]


def task_rows(num_rows: int, seed: int) -> list[dict[str, str]]:
    """Rows whose label shows in some of their words; the first hint is rarely the first word."""
    generator = random.Random(seed)
    rows: list[dict[str, str]] = []
    for number in range(num_rows):
        label = sorted(_TOPICS)[number % len(_TOPICS)]
        words = [generator.choice(_TOPICS[label] if generator.random() < 0.4 else _FILLERS) for _ in range(generator.randint(5, 24))]
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_task(folder: Path, num_train: int = 105, num_test: int = 30) -> Path:
    """A task folder with train, dev and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, num_rows) in enumerate({"train": num_train, "dev": num_test, "test": num_test}.items()):
        lines = [json.dumps(row) + "\n" for row in task_rows(num_rows, seed)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def write_model(folder: Path, dropout: float = 0.1) -> Path:
    """A `BertForPreTraining` of 2 layers and 32 channels, with random weights, and its tokenizer."""
    from transformers import BertConfig, BertForPreTraining

    config = TokenizerConfig(vocab_size=256)
    write_tokenizer(train_tokenizer([row["text"] for row in task_rows(300, 7)], config), config, folder)
    with torch.random.fork_rng():
        torch.manual_seed(1234)  # not a seed of fine-tuning, which would draw the same weights from scratch
        network = BertForPreTraining(
            BertConfig(
                vocab_size=256,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
        )
    network.save_pretrained(folder)
    return folder
