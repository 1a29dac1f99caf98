"""Runs of a tiny network on random tokens, with real DeepSpeed engines: commits and resumes for tests, and the golden checkpoint.

`python -m tests.support.checkpoints FOLDER TOKENIZER` writes the golden folder anew (only when `format_version` grows: old ones stay).
"""

import shutil
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.storage import Location
from tests.support.batches import random_micro_batch, small_config
from tests.support.distributed import run_distributed
from trainer.background_save import SaveRequest
from trainer.config import RunConfig
from trainer.manifest import Circumstances, Manifest, read_manifest, write_manifest
from trainer.runlog import RunFolder
from trainer.snapshot import Snapshot
from trainer.state import TrainState

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint-format-1"
GOLDEN_MODEL = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 16, "max_positions": 64, "dropout": 0.0}


def run_config(stage: int, precision: str = "bf16", **sections: Any) -> RunConfig:
    """The run of these tests at one ZeRO stage. Every parameter of stage 3 is partitioned, however small."""
    deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    return small_config(**({"precision": precision, "zero": {"stage": stage, "deepspeed": deepspeed}} | sections))


def run_folder(root: Path | str) -> RunFolder:
    """The run folder at a path."""
    return RunFolder(Location.at(root))


def build_engine(config: RunConfig, tokenizer: str) -> Any:
    """A real engine on this rank."""
    import torch

    from trainer.engine import Engine
    from trainer.model import build_model

    model = build_model(config.model, tokenizer, seed=config.seed, sequence_length=24, device=torch.device("cpu"))
    return Engine.build(model, config)


def train_step(engine: Any, rank: int, world_size: int, step: int) -> tuple[float, float]:
    """One optimizer step; the data depends on step and rank only. Returns this rank's loss and the global gradient norm."""
    from trainer.batch import tensor_batches
    from trainer.objectives import LossWeights

    batch = random_micro_batch(step * world_size + rank)
    weights = LossWeights.for_step(num_masked=world_size * batch.num_masked, num_pairs=world_size * batch.num_pairs, world_size=world_size)
    sums = engine.accumulate(tensor_batches(batch)[0], weights, last=True)
    return float(weights.loss(sums).detach()), engine.step(lr=1e-3).grad_norm


def save_checkpoint(root: str, engine: Any, config: RunConfig, rank: int, world_size: int, step: int, group: Any, attempt: int = 1) -> float:
    """Commit `engine` as the checkpoint of `step`; returns the seconds for which training would have stood still."""
    from trainer.context import LocalContext
    from trainer.saving import Saver

    saver = Saver(run_folder(root), config, LocalContext(rank, world_size), attempt, group, timeout_s=10.0)
    state = TrainState(step=step, micro_batches_consumed=step * world_size, corpus_fingerprint="c" * 64, tokenizer_digest="t" * 64)
    with closing(saver):
        saver.save(engine, state)
        stall_s = saver.take_stall_s()
        saver.finish()
    return stall_s


def write_engine(engine: Any, folder: Path) -> None:
    """Write an engine's files into `folder`, as a checkpoint's ZeRO folder. Collective."""
    snapshot = Snapshot()
    engine.snapshot(snapshot)
    folder.mkdir(parents=True, exist_ok=True)
    for name in snapshot.sizes:
        (folder / Path(name).name).write_bytes(b"".join(snapshot.pieces(name)))


def save_request(run: RunFolder, step: int, rank: int = 0, world_size: int = 1, attempt: int = 1, **changes: Any) -> SaveRequest:
    """A save of `step`, as a rank's background gets it."""
    circumstances = Circumstances(world_size, 1, "bf16", 1, "cpu", {})
    config = run_config(1, checkpoint=changes.pop("checkpoint", {}))
    arguments: dict[str, Any] = {"attempt": attempt, "rank": rank, "require_current": lambda: None, "timeout_s": 10.0}
    return SaveRequest(run, config, TrainState(step=step), circumstances, **(arguments | changes))


def snapshot_of(files: dict[str, bytes]) -> Snapshot:
    """A snapshot of given files."""
    snapshot = Snapshot()
    for name, data in files.items():
        snapshot.add(name, data)
    return snapshot


def resign(folder: Path, **changes: Any) -> Manifest:
    """Give a checkpoint folder a manifest with another state or configuration, valid as if it had been committed so."""
    manifest = read_manifest(folder)
    assert isinstance(manifest, Manifest)
    changed = replace(manifest, **changes)
    write_manifest(folder, changed)
    return changed


def golden_run(root: Path, *steps: int) -> RunFolder:
    """A run folder whose checkpoints of `steps` are copies of the golden one."""
    run = run_folder(root)
    for step in steps:
        folder = run.checkpoints.path / f"step-{step:08d}"
        shutil.copytree(GOLDEN, folder)
        manifest = read_manifest(folder)
        assert isinstance(manifest, Manifest)
        resign(folder, train_state=replace(manifest.train_state, step=step))
    return run


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.witness,))


def plant_payload(file: Path, witness: Path) -> None:
    """Add a payload to one of DeepSpeed's files, which otherwise keeps its contents."""
    import torch

    contents = torch.load(file, weights_only=False)
    torch.save({"payload": Payload(witness), **contents}, file)


def write_golden(rank: int, world_size: int, root: str, tokenizer: str) -> None:
    """Two bf16 steps at ZeRO 1, committed."""
    from trainer.agreement import agreement_group

    config = run_config(1, model=GOLDEN_MODEL)
    engine, group = build_engine(config, tokenizer), agreement_group(world_size)
    for step in range(2):
        train_step(engine, rank, world_size, step)
    save_checkpoint(root, engine, config, rank, world_size, 2, group)


if __name__ == "__main__":
    from tests.support import checkpoints

    run_distributed(checkpoints.write_golden, args=(sys.argv[1], sys.argv[2]), timeout_s=120)
