"""Plain Ray Train + DeepSpeed as their documentation has it: a small BERT under ZeRO-1, checkpoints through `ray.train.report`.

`python -m benchmarks.contestants.ray_deepspeed JSON`: a driver of its own process, as a user's script is. Every rank appends a line for each
step to `<folder>/rank-R.jsonl` (time, step, process), from which the benchmark sees when training goes on.
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
    """Train to the last step on the cluster at `address`, with Ray's restarts switched on."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(address=settings["address"], log_to_driver=False)
    workers = settings["num_workers"]
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=tuple(workers) if isinstance(workers, list) else workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="peer", storage_path=f"{settings['folder']}/ray", failure_config=FailureConfig(max_failures=3)),
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
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(**settings["model"]))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=deepspeed_config(context.get_world_size()))
    first_step = 0
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            engine.load_checkpoint(folder)
        first_step = engine.global_steps
    log = Path(settings["folder"]) / f"rank-{context.get_world_rank()}.jsonl"
    for step in range(first_step, settings["steps"]):
        batch = random_batch(torch, settings, step, context.get_world_rank())
        engine.backward(engine(**batch).loss)
        engine.step()
        with log.open("a") as file:
            file.write(json.dumps({"time": time.time(), "step": step, "pid": os.getpid(), "world_size": context.get_world_size()}) + "\n")
        if (step + 1) % settings["every_steps"] == 0:
            with tempfile.TemporaryDirectory() as folder:
                engine.save_checkpoint(folder)
                train.report({"step": step}, checkpoint=train.Checkpoint.from_directory(folder))


def deepspeed_config(world_size: int) -> dict[str, Any]:
    """ZeRO-1 in bf16, a global batch of 32 samples."""
    return {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 32 // world_size,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }


def random_batch(torch: Any, settings: dict[str, Any], step: int, rank: int) -> dict[str, Any]:
    """Tokens of one step and rank."""
    generator = torch.Generator().manual_seed(step * 1000 + rank)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ids = torch.randint(5, settings["model"]["vocab_size"], (32 // world_size, 64), generator=generator)
    return {"input_ids": ids, "labels": ids, "next_sentence_label": ids[:, 0] % 2}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
