"""DeepSpeed's checkpoint files: taken into memory, read without running code (R9).

The second seam to DeepSpeed beside `trainer.engine`, which saves and loads through `snapshot_engine` and `load_engine`. What the files mean, by
parameter, is `trainer.zero_state`'s business.
"""

import io
import os
import pickle
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch.utils.serialization import config as serialization_config

from data_pipeline.errors import DataCorruptError
from trainer.snapshot import ZERO_FOLDER, Snapshot

MODEL_CONFIG = "config.json"
PARAM_NAMES = "maskwright_param_names"
_ALLOWED: list[Any] = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class SafeFiles(TorchCheckpointEngine):
    """Puts DeepSpeed's files into a snapshot in memory, and reads them from a folder.

    DeepSpeed holds collectives while it saves: nothing here touches a disk, so no rank is kept from them by a slow or a full one.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.snapshot = Snapshot()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders come with the files, later."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Put one file into the snapshot: what `torch.save` writes, shared storage once, GPU memory through pinned host memory."""
        with _fast_saving():
            torch.save(_plain(state_dict), self.snapshot.file(f"{ZERO_FOLDER}/{Path(path).name}"))  # pyright: ignore[reportArgumentType]

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file without running code from it."""
        return read_file(Path(path), map_location)


def _plain(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Without what stage 3 hangs on its vectors (`ds_id`): it counts what the process has built so far, so that equal state had unequal files."""
    optimizer: dict[str, Any] = state_dict.get("optimizer_state_dict") or {}
    if "fp32_flat_groups" not in optimizer:
        return state_dict
    return {**state_dict, "optimizer_state_dict": {**optimizer, "fp32_flat_groups": [flat.detach() for flat in optimizer["fp32_flat_groups"]]}}


def use_safe_files(engine: DeepSpeedEngine) -> None:
    """Make an initialised engine save and read its checkpoints through `SafeFiles`, and put no scripts into them."""
    engine.checkpoint_engine = SafeFiles()
    engine._copy_recovery_script = _no_script  # pyright: ignore[reportPrivateUsage]


def snapshot_engine(engine: DeepSpeedEngine, snapshot: Snapshot) -> None:
    """Add this rank's files to `snapshot`; every rank calls it. The engine has had `use_safe_files`."""
    files = engine.checkpoint_engine
    assert isinstance(files, SafeFiles)
    files.snapshot = snapshot
    engine.save_checkpoint("snapshot", tag=ZERO_FOLDER, client_state={PARAM_NAMES: _param_names(engine)}, save_latest=False)
    if engine.global_rank == 0:
        # So that weights can be exported without asking a hub again for the dimensions of `init_from`.
        model_config: Any = getattr(engine.module, "config", None)
        snapshot.add_json(f"{ZERO_FOLDER}/{MODEL_CONFIG}", model_config.to_dict() if model_config is not None else {})


def load_engine(engine: DeepSpeedEngine, folder: Path) -> None:
    """Load weights, optimizer and scheduler from `folder`; every rank calls it. The engine has had `use_safe_files`.

    Raises:
        DataCorruptError: a file is unreadable, or holds anything but tensors and plain values.
    """
    assert isinstance(engine.checkpoint_engine, SafeFiles)
    with _weights_only(), redirect_stdout(io.StringIO()):  # its stage 1 in bf16 prints which of its functions it is in
        loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise DataCorruptError(f"DeepSpeed found nothing to load in {folder}", "Resume from another checkpoint.")


def read_file(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """Load one of DeepSpeed's files: tensors, plain values and the few DeepSpeed types on the allow-list.

    Raises:
        DataCorruptError: it is unreadable or holds anything else; nothing of it has run.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise refusal(path, error) from error


def _param_names(engine: DeepSpeedEngine) -> list[list[str]]:
    """Names of the parameters in each of the optimizer's groups; stage 0 saves their state without them."""
    module: torch.nn.Module = engine.module  # pyright: ignore[reportAssignmentType]  # DeepSpeed declares no types
    by_id = {id(parameter): name for name, parameter in module.named_parameters()}
    optimizer: Any = engine.optimizer
    groups: list[list[torch.Tensor]] = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
    return [[by_id[id(parameter)] for parameter in group if id(parameter) in by_id] for group in groups]


def refusal(path: Path, error: Exception) -> DataCorruptError:
    """What a file, or a folder of them, is refused with that does not hold what it should."""
    return DataCorruptError(f"{path} is not a plain checkpoint file: {str(error).splitlines()[0]}", "Do not use it; restore it from a trusted copy.")


def _no_script(save_path: str) -> None:
    """In place of DeepSpeed's copy of two Python scripts: a checkpoint holds no code, and a full disk must not raise there."""


def _fast_saving() -> AbstractContextManager[None]:
    """Without CRCs, of which nothing but unzip makes use: the manifest has a sha256 of each file, taken off the training thread."""
    return serialization_config.patch(  # pyright: ignore[reportAttributeAccessIssue]  # installed when the module is imported
        {"save.compute_crc32": False, "save.use_pinned_memory_for_d2h": True}
    )


@contextmanager
def _weights_only() -> Generator[None]:
    """Let no torch.load in DeepSpeed unpickle code, whatever it asks for (it asks for `weights_only=False`)."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
