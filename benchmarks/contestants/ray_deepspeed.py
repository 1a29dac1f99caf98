"""Plain Ray Train + DeepSpeed as their documentation has it: a small BERT, checkpoints through `ray.train.report`, restarts switched on.

`python -m benchmarks.contestants.ray_deepspeed JSON`: a driver of its own process, as a user's script is. Every rank appends a line for each
step to `<folder>/rank-R.jsonl` (step, process), from which the benchmark sees when training goes on.
"""

import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main(settings: dict[str, Any]) -> None:
    """Train to the last step on the cluster at `address`. Started again under the same name, it goes on: Ray Train's documented way."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address=settings["address"])
    workers = settings["num_workers"]
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=tuple(workers) if isinstance(workers, list) else workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name=settings["name"], storage_path=f"{settings['folder']}/ray", failure_config=FailureConfig(max_failures=3)),
    )
    (Path(settings["folder"]) / "fit-started").write_text(str(time.time()))
    trainer.fit()


def train_on_worker(settings: dict[str, Any]) -> None:
    """The loop of Ray's DeepSpeed guide: initialise, load the reported checkpoint if there is one, step, save, report."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    from ray import train
    from transformers import BertConfig, BertForPreTraining

    deepspeed: Any = importlib.import_module("deepspeed")
    context = train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(**settings["network"]))
    config = deepspeed_config(settings, world_size)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    first_step = 0
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            engine.load_checkpoint(folder)
        first_step = engine.global_steps
    log = Path(settings["folder"]) / f"rank-{rank}.jsonl"
    for step in range(first_step, settings["steps"]):
        for micro_step in range(config["gradient_accumulation_steps"]):
            batch = random_batch(torch, settings, seed=(step * world_size + rank) * world_size + micro_step)
            engine.backward(engine(**batch).loss)
            engine.step()
        with log.open("a") as file:
            file.write(json.dumps({"step": step, "pid": os.getpid()}) + "\n")
        if (step + 1) % settings["checkpoint_every_steps"] == 0:
            with tempfile.TemporaryDirectory() as folder:
                engine.save_checkpoint(folder)
                train.report({"step": step}, checkpoint=train.Checkpoint.from_directory(folder))


def deepspeed_config(settings: dict[str, Any], world_size: int) -> dict[str, Any]:
    """DeepSpeed's defaults for the work that `settings` name; the same global batch on any number of ranks. Pure."""
    return {
        "train_batch_size": settings["global_batch_size"],
        "train_micro_batch_size_per_gpu": settings["micro_batch_size"],
        "gradient_accumulation_steps": settings["global_batch_size"] // (settings["micro_batch_size"] * world_size),
        "bf16": {"enabled": settings["precision"] == "bf16"},
        "zero_optimization": {"stage": settings["zero_stage"]},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }


def random_batch(torch: Any, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Tokens of a micro-batch."""
    shape = settings["micro_batch_size"], settings["sequence_length"]
    ids = torch.randint(5, settings["network"]["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids, "next_sentence_label": ids[:, 0] % 2}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
