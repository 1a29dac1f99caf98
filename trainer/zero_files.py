"""DeepSpeed's checkpoint files: written without stranding other ranks, read without running code (R9).

The second seam to DeepSpeed beside `trainer.engine`, which saves and loads through `save_engine` and `load_engine`. What the files mean, by
parameter, is `trainer.zero_state`'s business.
"""

import os
import pickle
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from data_pipeline.errors import DataCorruptError
from data_pipeline.storage import Location

MODEL_CONFIG = "config.json"
PARAM_NAMES = "maskwright_param_names"
_ALLOWED: list[Any] = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class SafeFiles(TorchCheckpointEngine):
    """Writes and reads DeepSpeed's files. A failed write is kept for later instead of raised.

    DeepSpeed holds a barrier after its writes: a rank that raised before it would leave the others waiting for the whole time-out of
    the process group. So every rank passes the barrier, and `save_engine` raises afterwards.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.failure: Exception | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write one file; `failure` keeps the first error."""
        try:
            # Given a path, torch reports a full disk as "unexpected pos"; given a file, the OSError is in the error's history.
            with open(path, "wb") as file:
                torch.save(state_dict, file)
        except (OSError, RuntimeError) as error:
            self.failure = self.failure or _root_cause(error)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file without running code from it."""
        return read_file(Path(path), map_location)


def use_safe_files(engine: DeepSpeedEngine) -> None:
    """Make an initialised engine write and read its checkpoints through `SafeFiles`, and put no scripts into them."""
    engine.checkpoint_engine = SafeFiles()
    engine._copy_recovery_script = _no_script  # pyright: ignore[reportPrivateUsage]


def save_engine(engine: DeepSpeedEngine, folder: Path) -> None:
    """Write this rank's files into `folder`, which exists; every rank calls it. The engine has had `use_safe_files`.

    Raises:
        OSError: this rank could not write; all ranks have left DeepSpeed's collectives by then.
        StorageError: the same, of the model's config.
    """
    files = engine.checkpoint_engine
    assert isinstance(files, SafeFiles)
    files.failure = None
    names = {PARAM_NAMES: _param_names(engine)}
    engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state=names, save_latest=False)
    if engine.global_rank == 0 and files.failure is None:
        # So that weights can be exported without asking a hub again for the dimensions of `init_from`.
        model_config: Any = getattr(engine.module, "config", None)
        Location.at(folder / MODEL_CONFIG).write_json(model_config.to_dict() if model_config is not None else {})
    if files.failure is not None:
        raise files.failure


def load_engine(engine: DeepSpeedEngine, folder: Path) -> None:
    """Load weights, optimizer and scheduler from `folder`; every rank calls it. The engine has had `use_safe_files`.

    Raises:
        DataCorruptError: a file is unreadable, or holds anything but tensors and plain values.
    """
    assert isinstance(engine.checkpoint_engine, SafeFiles)
    with _weights_only():
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


def _root_cause(error: Exception) -> Exception:
    """The OSError behind torch's error, if there is one: it says what is wrong with the disk."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def refusal(path: Path, error: Exception) -> DataCorruptError:
    """What a file, or a folder of them, is refused with that does not hold what it should."""
    return DataCorruptError(f"{path} is not a plain checkpoint file: {str(error).splitlines()[0]}", "Do not use it; restore it from a trusted copy.")


def _no_script(save_path: str) -> None:
    """In place of DeepSpeed's copy of two Python scripts: a checkpoint holds no code, and a full disk must not raise there."""


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
