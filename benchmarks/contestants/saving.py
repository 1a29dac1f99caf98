"""Child's side of `checkpoint_stall`: one rank with a BERT-base, its saves beside training, our synchronous commit, DeepSpeed's own save."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.children import Measurement

_WARM_UP_STEPS = 2
_STEPS_ALONE = 4
_SAMPLES, _TOKENS = 2, 16
"""Of a step: few, so that a round is short. What is saved does not depend on them."""


def stalls(repeats: int, layers: int, width: int) -> Measurement:
    """Medians of `repeats` rounds: seconds that training stands still for a save, seconds of the two synchronous ones, seconds of a step.

    The process may use every core: the writer takes what training leaves. The first of each kind is not counted: ours allocates its memory,
    and a disk may take its first gigabyte several times as slowly as the next.
    """
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        bench = _Bench(Path(folder), layers, width)
        for _ in range(_WARM_UP_STEPS):
            bench.step()
        first_stall_s, _ = bench.save()
        bench.commit_synchronously()
        bench.save_with_deepspeed()
        stall, write, beside, alone, ours, deepspeed = [], [], [], [], [], []
        for _ in range(repeats):
            alone += [bench.step() for _ in range(_STEPS_ALONE)]
            ours.append(bench.commit_synchronously())
            deepspeed.append(bench.save_with_deepspeed())
            seconds, steps = bench.save()
            stall.append(seconds)
            beside += steps
            write.append(sum(steps))
        return {
            "stall_s": median(stall),
            "first_stall_s": first_stall_s,
            "synchronous_s": median(ours),
            "deepspeed_s": median(deepspeed),
            "step_alone_s": median(alone),
            "step_beside_s": median(beside or alone),
            "written_in_s": median(write),
            "num_parameters": bench.num_parameters,
            "num_bytes": bench.num_bytes,
            "precision": bench.precision,
            "counts": {"saves": repeats, "steps_beside": len(beside)},
        }


class _Bench:
    """A trained engine and its saver."""

    def __init__(self, folder: Path, layers: int, width: int) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import torch
        import torch.distributed as dist
        from transformers import BertConfig

        from data_pipeline.storage import Location
        from tests.support.batches import random_micro_batch
        from trainer.batch import tensor_batches
        from trainer.config import RunConfig
        from trainer.context import LocalContext
        from trainer.engine import Engine
        from trainer.networks import PretrainingBert
        from trainer.runlog import RunFolder
        from trainer.saving import Saver

        torch.set_num_threads(1)
        # A CPU without instructions for it computes bf16 some fifty times slower than fp32, and a save computes a forward pass, its probe.
        self.precision = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        dimensions = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
        model = PretrainingBert(BertConfig(**dimensions, attn_implementation="eager"))
        config = RunConfig.model_validate({"name": "bench", "precision": self.precision})
        self._engine = Engine.build(model, config)
        self._run = RunFolder(Location.at(folder / "run"))
        self._saver = Saver.open(self._run, config, LocalContext(), 1)
        self._batch = tensor_batches(random_micro_batch(1, num_samples=_SAMPLES, num_tokens=_TOKENS))[0]
        self._folder, self._step = folder, 0
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.num_bytes = 0

    def step(self) -> float:
        """Seconds of one optimizer step."""
        from trainer.objectives import IGNORED, LossWeights

        started_at = time.perf_counter()
        weights = LossWeights.for_step(num_masked=int((self._batch.mlm_labels_N != IGNORED).sum()), num_pairs=_SAMPLES, world_size=1)
        self._engine.accumulate(self._batch, weights, last=True)
        self._engine.step(1e-4)
        self._step += 1
        return time.perf_counter() - started_at

    def save(self) -> tuple[float, list[float]]:
        """Seconds that training stood still, and of each step taken until the save was committed."""
        from trainer.state import TrainState

        started_at, steps = time.perf_counter(), []
        self._saver.save(self._engine, TrainState(step=self._step))
        stall_s = time.perf_counter() - started_at
        while self._saver.is_saving():
            steps.append(self.step())
        self._saver.finish()
        self.num_bytes = self._run.read_events()[-1]["bytes"]
        return stall_s, steps

    def commit_synchronously(self) -> float:
        """Seconds to write the same files straight from the live tensors, each byte hashed as it is written, and to make them durable."""
        target = self._fresh("synchronous")
        return self._timed(lambda: self._engine.snapshot(_Files(target)))  # pyright: ignore[reportArgumentType]

    def save_with_deepspeed(self) -> float:
        """Seconds of DeepSpeed's `save_checkpoint` with its default writer, which neither hashes nor syncs."""
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        engine, target = self._engine._deepspeed, self._fresh("deepspeed")
        ours, engine.checkpoint_engine = engine.checkpoint_engine, TorchCheckpointEngine()
        engine.checkpoint_engine.zipfile_serialization = True
        try:
            return self._timed(lambda: engine.save_checkpoint(str(target), tag="step"))
        finally:
            engine.checkpoint_engine = ours

    def _timed(self, save: Callable[[], Any]) -> float:
        started_at = time.perf_counter()
        save()
        elapsed_s = time.perf_counter() - started_at
        os.sync()  # what is still in memory must not slow the next contestant
        return elapsed_s

    def _fresh(self, name: str) -> Path:
        target = self._folder / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        os.sync()
        return target


class _Files:
    """In a snapshot's place: files on disk, hashed and synced."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def file(self, name: str) -> "_HashedFile":
        return _HashedFile(self._folder / Path(name).name)

    def add_json(self, name: str, value: Any) -> None:
        file = self.file(name)
        file.write(json.dumps(value).encode())
        file.flush()


class _HashedFile:
    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Called at the end of the file."""
        self._digest.hexdigest()
        os.fsync(self._file.fileno())
        self._file.close()
