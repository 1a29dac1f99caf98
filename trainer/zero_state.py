"""A checkpoint's weights and optimizer state by parameter, whatever ZeRO stage and however many ranks wrote them (reads files).

Above stage 0 every rank saves flat vectors: its part of the fp32 weights and of AdamW's two moments, element for element alike. Here they
become pieces of parameters. The files are mapped, not read: only what is asked for is.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import DataCorruptError
from trainer.zero_files import PARAM_NAMES, read_file, refusal

MASTER, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A stretch of a flattened parameter."""

    start: int
    values: Mapping[str, Tensor]
    """By kind, MASTER or one of MOMENTS: 1-D and of one length; without moments before AdamW's first update."""

    @property
    def stop(self) -> int:
        """First element after it."""
        return self.start + len(self.values[MASTER])


@dataclass(frozen=True)
class SavedState:
    """What was saved of each parameter. Of tied ones, under one of their names."""

    shapes: dict[str, torch.Size]
    pieces: dict[str, list[Piece]]
    """In order; together they cover the parameter."""
    step: float
    """Updates that AdamW has counted; 0 where it has no moments yet."""
    aliases: dict[str, str]
    """From the other names of tied parameters to the one in `shapes`."""
    buffers: dict[str, Tensor]

    def read(self, name: str, kind: str = MASTER, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a flattened parameter. Touches no others."""
        end = self.shapes[name].numel() if stop is None else stop
        overlapping = [piece for piece in self.pieces[name] if piece.start < end and piece.stop > start]
        return torch.cat([piece.values[kind][max(start - piece.start, 0) : end - piece.start] for piece in overlapping])

    def weight(self, name: str) -> Tensor:
        """The fp32 weight of a parameter, in its shape."""
        return self.read(name).view(self.shapes[name])


def open_state(folder: Path) -> SavedState:
    """Open a committed checkpoint's ZeRO folder.

    Raises:
        DataCorruptError: a file is missing, unreadable, or holds anything but tensors and plain values.
    """
    partitions = [read_file(path, mmap=True)["optimizer_state_dict"] for path in _by_rank(folder, "*_optim_states.pt")]
    saved = read_file(_by_rank(folder, "*_model_states.pt")[0], mmap=True)
    try:
        if not partitions:
            return _replicated(saved)
        _require_all_ranks(partitions, folder)
        return _partitioned(partitions, saved)
    except (KeyError, IndexError, RuntimeError, TypeError) as error:
        raise refusal(folder, error) from error


def consolidate(folder: Path) -> dict[str, Tensor]:
    """The fp32 master weights (and buffers) of a committed checkpoint's ZeRO folder, by parameter name; one process, any stage.

    Tied parameters appear under all their names.

    Raises:
        DataCorruptError: see `open_state`; or the weights are not those that the network computed with.
    """
    state = open_state(folder)
    try:
        weights = {name: state.weight(name) for name in state.shapes}
        _require_rounding_to(read_file(_by_rank(folder, "*_model_states.pt")[0])["module"], weights, folder)
    except (KeyError, RuntimeError, TypeError) as error:
        raise refusal(folder, error) from error
    weights |= state.buffers | {name: weights[source] for name, source in state.aliases.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """DeepSpeed's files of one kind, in rank order; a single file without a rank is in its place."""
    return sorted(folder.glob(pattern), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _require_all_ranks(partitions: list[dict[str, Any]], folder: Path) -> None:
    counts = partitions[0]["partition_count"]  # one number, or one for each group of parameters
    expected = max(counts) if isinstance(counts, list) else counts
    if expected != len(partitions):
        raise DataCorruptError(f"{folder} has the optimizer's files of {len(partitions)} ranks instead of {expected}", "Restore the missing ones.")


def _require_rounding_to(module: dict[str, Tensor], weights: dict[str, Tensor], folder: Path) -> None:
    """Below stage 3 the files also hold the weights that the network computed with: every one must be its master, rounded."""
    for name, master in weights.items():
        used = module[name]  # at stage 3 an empty placeholder
        if used.shape == master.shape and not torch.equal(used, master.to(used.dtype)):
            raise DataCorruptError(
                f"{folder}: the fp32 weights of {name} are not those that were trained", "Export another checkpoint, and report it."
            )


def _partitioned(partitions: list[dict[str, Any]], saved: dict[str, Any]) -> SavedState:
    groups: list[dict[str, torch.Size]] = saved["param_shapes"]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    is_stage_3 = "fp32_flat_groups" in partitions[0]
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    before = [0] * len(groups)  # elements of each group's flat vector that lower ranks have
    for rank, partition in enumerate(partitions):
        flats, states = _flats(partition, is_stage_3)
        places = _equal_parts(shapes, flats, rank, len(partitions)) if is_stage_3 else _fragments(partition, groups, flats, before)
        before = [start + len(flat) for start, flat in zip(before, flats, strict=False)]
        for name, start, flat, at, length in places:
            kinds = {MASTER: flats[flat], **{kind: states[flat][kind] for kind in MOMENTS if states}}
            pieces[name].append(Piece(start, {kind: values.detach().narrow(0, at, length) for kind, values in kinds.items()}))
    first = _flats(partitions[0], is_stage_3)[1]
    step = float(first[0]["step"]) if first else 0.0
    buffers = {name: saved["module"][name] for name in saved["buffer_names"]}
    return SavedState(shapes, pieces, step, dict(saved["shared_params"]), buffers)


def _flats(partition: dict[str, Any], is_stage_3: bool) -> tuple[list[Tensor], dict[int, dict[str, Tensor]]]:
    """A rank's flat vectors of fp32 weights, and AdamW's state of each."""
    if is_stage_3:
        return partition["fp32_flat_groups"], partition["optimizer_state_dict"]["state"]
    return partition["single_partition_of_fp32_groups"], partition["base_optimizer_state"]["state"]


Place = tuple[str, int, int, int, int]
"""(parameter, start within it, flat vector, start within that, elements)."""


def _fragments(partition: dict[str, Any], groups: list[dict[str, torch.Size]], flats: list[Tensor], before: list[int]) -> list[Place]:
    """Stages 1 and 2: a rank owns a stretch of each group's flat vector, in which parameters follow one another in the order of `groups`.

    The addresses that DeepSpeed saves with it are wrong under `round_robin_gradients`, and its own `zero_to_fp32` cannot read what its bf16
    optimizer with fp32 gradients writes at stage 1.
    """
    all_padding: list[list[int]] = partition.get("param_alignment_paddings") or [[0] * len(group) for group in groups]
    return [
        (name, first, number, at, length)
        for number, (group, padding, flat, start) in enumerate(zip(groups, all_padding, flats, before, strict=True))
        for name, first, at, length in stretches({name: shape.numel() for name, shape in group.items()}, padding, start, start + len(flat))
    ]


def stretches(sizes: Mapping[str, int], padding: Sequence[int], start: int, stop: int) -> Iterator[tuple[str, int, int, int]]:
    """What lies in [start, stop) of parameters that follow one another, each with padding after it: (parameter, its first element there, place
    after `start`, elements)."""
    at = 0
    for (name, size), pad in zip(sizes.items(), padding, strict=True):
        first, last = max(at, start), min(at + size, stop)
        if first < last:
            yield name, first - at, first - start, last - first
        at += size + pad


def _equal_parts(shapes: dict[str, torch.Size], flats: list[Tensor], rank: int, num_ranks: int) -> list[Place]:
    """Stage 3: a rank owns an equal, padded part of every parameter; its parts follow one another in the order of `shapes`, over all vectors."""
    ends = list(accumulate(len(flat) for flat in flats))
    places: list[Place] = []
    flat, offset = 0, 0
    for name, shape in shapes.items():
        part = -(-shape.numel() // num_ranks)
        while offset >= ends[flat]:
            flat += 1
        length = min(part, shape.numel() - rank * part)
        if length > 0:  # the last ranks may own nothing but padding
            places.append((name, rank * part, flat, offset - (ends[flat] - len(flats[flat])), length))
        offset += part
    return places


def _replicated(saved: dict[str, Any]) -> SavedState:
    """Stage 0: the module's own tensors, or the optimizer's fp32 copies where it keeps any, in the order of the names that we save."""
    module: dict[str, Tensor] = saved["module"]
    optimizer: dict[str, Any] = saved["optimizer"]
    names = [name for group in saved[PARAM_NAMES] for name in group]
    masters: list[Tensor] = [tensor for group in optimizer.get("fp32_groups", []) for tensor in group] or [module[name] for name in names]
    states: dict[int, dict[str, Tensor]] = optimizer.get("optimizer_state_dict", optimizer)["state"]
    pieces: dict[str, list[Piece]] = {}
    for number, (name, master) in enumerate(zip(names, masters, strict=True)):
        kinds = {MASTER: master, **{kind: states[number][kind] for kind in MOMENTS if states}}
        pieces[name] = [Piece(0, {kind: values.detach().reshape(-1) for kind, values in kinds.items()})]
    by_storage = {module[name].data_ptr(): name for name in names}
    others = {name: value for name, value in module.items() if name not in pieces}
    aliases = {name: by_storage[value.data_ptr()] for name, value in others.items() if value.data_ptr() in by_storage}
    buffers = {name: value for name, value in others.items() if name not in aliases}
    return SavedState({name: module[name].shape for name in names}, pieces, float(states[0]["step"]) if states else 0.0, aliases, buffers)
