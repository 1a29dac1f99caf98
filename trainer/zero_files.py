"""DeepSpeed's checkpoint files: written without stranding other ranks, read without running code (R9), consolidated to fp32 weights.

The second seam to DeepSpeed beside `trainer.engine`, which saves and loads through `save_engine` and `load_engine`.
"""

import os
import pickle
import re
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
        raise _refusal(path, error) from error


def consolidate(folder: Path) -> dict[str, torch.Tensor]:
    """The fp32 master weights (and buffers) of a committed checkpoint's ZeRO folder, by parameter name; one process, any stage.

    Tied parameters appear under all their names.

    Raises:
        DataCorruptError: a file is unreadable, or holds anything but tensors and plain values.
    """
    # Mapped, not read: of the optimizer's state only the weights, a third, are wanted.
    partitions = [read_file(path, mmap=True)["optimizer_state_dict"] for path in _by_rank(folder, "*_optim_states.pt")]
    saved = read_file(_by_rank(folder, "*_model_states.pt")[0])
    if not partitions:
        return _consolidate_replicated(saved)
    try:
        _require_all_ranks(partitions, folder)
        shapes: dict[str, torch.Size] = {name: shape for group in saved["param_shapes"] for name, shape in group.items()}
        weights = _join_stage_3(partitions, shapes) if "fp32_flat_groups" in partitions[0] else _join_fragments(partitions, shapes)
        _require_rounding_to(saved["module"], weights, folder)
        weights |= {name: saved["module"][name] for name in saved["buffer_names"]}
        weights |= {name: weights[source] for name, source in saved["shared_params"].items()}
    except (KeyError, IndexError, RuntimeError, TypeError) as error:
        raise _refusal(folder, error) from error
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """DeepSpeed's files of one kind, in rank order; a single file without a rank is in its place."""
    return sorted(folder.glob(pattern), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _require_all_ranks(partitions: list[dict[str, Any]], folder: Path) -> None:
    counts = partitions[0]["partition_count"]  # one number, or one for each group of parameters
    expected = max(counts) if isinstance(counts, list) else counts
    if expected != len(partitions):
        raise DataCorruptError(f"{folder} has the optimizer's files of {len(partitions)} ranks instead of {expected}", "Restore the missing ones.")


def _require_rounding_to(module: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Below stage 3 the files also hold the weights that the network computed with: every one must be its master, rounded."""
    for name, master in weights.items():
        used = module[name]  # at stage 3 an empty placeholder
        if used.shape == master.shape and not torch.equal(used, master.to(used.dtype)):
            raise DataCorruptError(
                f"{folder}: the fp32 weights of {name} are not those that were trained", "Export another checkpoint, and report it."
            )


def _join_fragments(partitions: list[dict[str, Any]], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Stages 1 and 2: each rank owns a stretch of each group's flat vector, and says which parts of it belong to which parameter.

    DeepSpeed's own `zero_to_fp32` cannot read what its bf16 optimizer with fp32 gradients writes at stage 1; both write these addresses.
    """
    pieces: dict[str, list[torch.Tensor]] = {name: [] for name in shapes}
    for partition in partitions:
        for flat, addresses in zip(partition["single_partition_of_fp32_groups"], partition["param_slice_mappings"], strict=True):
            for name, address in addresses.items():
                pieces[name].append(flat.detach().narrow(0, address.start, address.numel))
    return {name: torch.cat(parts).view(shapes[name]) for name, parts in pieces.items()}


def _join_stage_3(partitions: list[dict[str, Any]], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Stage 3: each rank owns an equal, padded part of every parameter; its parts follow one another in the order of `shapes`."""
    flats = [torch.cat([group.detach() for group in partition["fp32_flat_groups"]]) for partition in partitions]
    weights: dict[str, torch.Tensor] = {}
    offset = 0
    for name, shape in shapes.items():
        part = -(-shape.numel() // len(flats))
        weights[name] = torch.cat([flat.narrow(0, offset, part) for flat in flats])[: shape.numel()].view(shape)
        offset += part
    return weights


def _consolidate_replicated(saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Stage 0: the module's own tensors, replaced by the optimizer's fp32 copies where it keeps any."""
    weights: dict[str, torch.Tensor] = dict(saved["module"])
    masters: list[list[torch.Tensor]] = saved["optimizer"].get("fp32_groups", [])
    for names, tensors in zip(saved[PARAM_NAMES], masters, strict=False):
        by_storage = {weights[name].data_ptr(): tensor for name, tensor in zip(names, tensors, strict=True)}
        weights |= {name: by_storage[value.data_ptr()].detach() for name, value in weights.items() if value.data_ptr() in by_storage}
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def _param_names(engine: DeepSpeedEngine) -> list[list[str]]:
    """Names of the parameters in each of the optimizer's groups; stage 0 saves its masters without them."""
    module: torch.nn.Module = engine.module  # pyright: ignore[reportAssignmentType]  # DeepSpeed declares no types
    by_id = {id(parameter): name for name, parameter in module.named_parameters()}
    groups: list[list[torch.Tensor]] = getattr(engine.optimizer, "fp16_groups", [])
    return [[by_id[id(parameter)] for parameter in group if id(parameter) in by_id] for group in groups]


def _root_cause(error: Exception) -> Exception:
    """The OSError behind torch's error, if there is one: it says what is wrong with the disk."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def _refusal(path: Path, error: Exception) -> DataCorruptError:
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
