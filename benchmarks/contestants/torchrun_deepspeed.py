"""Plain DeepSpeed under torchrun, as its documentation has it: a small BERT, one optimizer step. Every rank is a process of this module."""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.contestants.ray_deepspeed import deepspeed_config, random_batch


def main(settings: dict[str, Any]) -> None:
    """Initialise and take a step; rank 0 leaves in the file `answer` when that was done."""
    import torch
    from transformers import BertConfig, BertForPreTraining

    deepspeed: Any = importlib.import_module("deepspeed")
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(**settings["network"]))
    config = deepspeed_config(settings, world_size)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for micro_step in range(config["gradient_accumulation_steps"]):
        engine.backward(engine(**random_batch(torch, settings, seed=rank * world_size + micro_step)).loss)
        engine.step()
    if rank == 0:
        Path(settings["answer"]).write_text(f"{time.time()}\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
