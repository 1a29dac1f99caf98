"""A run so small that a cluster starts, trains and exports in seconds: generated text, two layers, thirty steps."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

STEPS = 30
WORDS = [first + second for first in ("ka", "lo", "mi", "ne", "pu", "ra", "so", "ti", "vu") for second in ("ren", "tik", "mal", "sun", "dor", "vex")]
CLUSTER = {"kind": "local", "num_workers": 2, "threads_per_worker": 1, "use_gpu": False}


def write_text(folder: Path, documents: int = 300) -> Path:
    """A jsonl file of made-up sentences, always the same."""
    generator = random.Random(0)
    lines = []
    for _ in range(documents):
        sentences = (" ".join(generator.choices(WORDS, k=generator.randint(4, 14))).capitalize() + "." for _ in range(generator.randint(3, 12)))
        lines.append(json.dumps({"text": " ".join(sentences)}))
    path = folder / "text.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_task(folder: Path) -> Path:
    """A labelled task that a network can learn: which of two words is in the sentence."""
    generator = random.Random(1)
    task = folder / "task"
    task.mkdir()
    for split, count in (("train", 64), ("dev", 16), ("test", 16)):
        labels = [number % 2 for number in range(count)]
        rows = [{"text": " ".join([*generator.choices(WORDS, k=5), ("karen", "datik")[label]]), "label": label} for label in labels]
        (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return task


def tiny_config(**sections: Any) -> dict[str, Any]:
    """The contents of a run.yaml; keyword arguments replace whole sections. Two of them compute alike: nothing is left to measurement."""
    config: dict[str, Any] = {
        "name": "tiny",
        "precision": "fp32",
        "storage": "storage",
        "corpus": {"name": "tiny", "source": "text.jsonl", "validation_fraction": 0.1},
        "tokenizer": {"vocab_size": 500},
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 64},
        "batch": {"global_batch_size": 32, "micro_batch_size": 4, "sequence_length": 64},
        "optimizer": {"lr": 1e-3},
        "schedule": {"steps": STEPS, "warmup_steps": 5},
        "checkpoint": {"every_steps": 5, "keep_last": 3},
        "validation": {"every_steps": 15, "micro_batches": 2},
        **sections,
    }
    return config | {"model": {"attention": "eager", **config["model"]}}


def write_run(folder: Path, **sections: Any) -> Path:
    """run.yaml, cluster.yaml and the text they need, in `folder`; returns run.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "text.jsonl").exists():
        write_text(folder)
    (folder / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_config(**sections)))
    return path
