"""A checkpoint's weights and optimizer state by parameter, whatever ZeRO stage and however many ranks wrote them (reads files).

Above stage 0 every rank saves flat vectors: its part of the fp32 weights and of the optimizer's two moments, element for element alike. Here they
become pieces of parameters. Of a thousand ranks' files only those are opened that hold what is asked for, and they are mapped, not read.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import DataCorruptError
from trainer.zero_files import PARAM_NAMES, read_file, refusal

MASTER, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")


Vectors = list[dict[str, Tensor]]
"""What a rank saved: the flat vectors of each group of parameters by kind, MASTER or one of MOMENTS; none of the latter before the first update."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flattened parameter, and where they are: from `at` on in a flat vector of a rank."""

    start: int
    stop: int
    rank: int
    vector: int
    at: int


@dataclass(frozen=True)
class SavedState:
    """What was saved of each parameter. Of tied ones, under one of their names."""

    shapes: dict[str, torch.Size]
    pieces: dict[str, list[Piece]]
    """In order; together they cover the parameter."""
    vectors: Callable[[int], Vectors]
    """Of a rank; its file is opened when this is first asked for."""
    step: float
    """Updates that the optimizer has counted; 0 where it has no moments yet."""
    aliases: dict[str, str]
    """From the other names of tied parameters to the one in `shapes`."""
    buffers: dict[str, Tensor]

    def read(self, name: str, kind: str = MASTER, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a flattened parameter. Touches no others.

        Raises:
            DataCorruptError: a file is unreadable, or holds anything but tensors and plain values.
        """
        end = self.shapes[name].numel() if stop is None else stop
        overlapping = [piece for piece in self.pieces[name] if piece.start < end and piece.stop > start]
        return torch.cat([self._part(piece, kind, max(start, piece.start), min(end, piece.stop)) for piece in overlapping])

    def _part(self, piece: Piece, kind: str, start: int, stop: int) -> Tensor:
        return self.vectors(piece.rank)[piece.vector][kind].narrow(0, piece.at + start - piece.start, stop - start)

    def weight(self, name: str) -> Tensor:
        """The fp32 weight of a parameter, in its shape."""
        return self.read(name).view(self.shapes[name])


def open_state(folder: Path) -> SavedState:
    """Open a committed checkpoint's ZeRO folder.

    Raises:
        DataCorruptError: a file is missing, unreadable, or holds anything but tensors and plain values.
    """
    files = _by_rank(folder, "*_optim_states.pt")
    saved = read_file(_by_rank(folder, "*_model_states.pt")[0], mmap=True)
    try:
        return _partitioned(files, saved) if files else _replicated(saved)
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


def _require_rounding_to(module: dict[str, Tensor], weights: dict[str, Tensor], folder: Path) -> None:
    """Below stage 3 the files also hold the weights that the network computed with: every one must be its master, rounded."""
    for name, master in weights.items():
        used = module[name]  # at stage 3 an empty placeholder
        if used.shape == master.shape and not torch.equal(used, master.to(used.dtype)):
            raise DataCorruptError(
                f"{folder}: the fp32 weights of {name} are not those that were trained", "Export another checkpoint, and report it."
            )


def _partitioned(files: list[Path], saved: dict[str, Any]) -> SavedState:
    """Above stage 0. Vectors of all ranks are as long as the first's, so its file says where everything is."""

    @cache
    def partition(rank: int) -> dict[str, Any]:
        return read_file(files[rank], mmap=True)["optimizer_state_dict"]

    @cache
    def vectors(rank: int) -> Vectors:
        found = _vectors(partition(rank))
        if rank + 1 < len(files) and [len(each[MASTER]) for each in found] != lengths:  # the last saves no padding
            raise DataCorruptError(f"{files[rank]} has vectors of other lengths than {files[0].name}", "Resume from another checkpoint.")
        return found

    first = partition(0)
    _require_all_ranks(first, files)
    lengths = [len(each[MASTER]) for each in _vectors(first)]
    groups: list[dict[str, torch.Size]] = saved["param_shapes"]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for rank in range(len(files)):
        places = _equal_parts(shapes, lengths, rank, len(files)) if _is_stage_3(first) else _fragments(first, groups, lengths, rank)
        for name, start, vector, at, length in places:
            pieces[name].append(Piece(start, start + length, rank, vector, at))
    buffers = {name: saved["module"][name] for name in saved["buffer_names"]}
    return SavedState(shapes, pieces, vectors, _step(_states(first)), dict(saved["shared_params"]), buffers)


def _require_all_ranks(partition: dict[str, Any], files: list[Path]) -> None:
    counts = partition["partition_count"]  # one number, or one for each group of parameters
    expected = max(counts) if isinstance(counts, list) else counts
    if expected != len(files):
        raise DataCorruptError(
            f"{files[0].parent} has the optimizer's files of {len(files)} ranks instead of {expected}", "Restore the missing ones."
        )


def _is_stage_3(partition: dict[str, Any]) -> bool:
    return "fp32_flat_groups" in partition


def _states(partition: dict[str, Any]) -> dict[int, dict[str, Tensor]]:
    """The optimizer's state of each of a rank's vectors; empty before its first update."""
    return partition["optimizer_state_dict" if _is_stage_3(partition) else "base_optimizer_state"]["state"]


def _step(states: dict[int, dict[str, Tensor]]) -> float:
    return float(states[0]["step"]) if states else 0.0


def _vectors(partition: dict[str, Any]) -> Vectors:
    masters: list[Tensor] = partition["fp32_flat_groups" if _is_stage_3(partition) else "single_partition_of_fp32_groups"]
    return _by_kind(masters, _states(partition))


def _by_kind(masters: list[Tensor], states: dict[int, dict[str, Tensor]]) -> Vectors:
    together = [{MASTER: master, **{kind: states[number][kind] for kind in MOMENTS if states}} for number, master in enumerate(masters)]
    return [{kind: values.detach().reshape(-1) for kind, values in each.items()} for each in together]


Place = tuple[str, int, int, int, int]
"""(parameter, start within it, flat vector, start within that, elements)."""


def _fragments(partition: dict[str, Any], groups: list[dict[str, torch.Size]], lengths: list[int], rank: int) -> list[Place]:
    """Stages 1 and 2: a rank owns a stretch of each group's flat vector, in which parameters follow one another in the order of `groups`.

    The addresses that DeepSpeed saves with it are wrong under `round_robin_gradients`, and its own `zero_to_fp32` cannot read what its bf16
    optimizer with fp32 gradients writes at stage 1.
    """
    all_padding: list[list[int]] = partition.get("param_alignment_paddings") or [[0] * len(group) for group in groups]
    return [
        (name, first, number, at, elements)
        for number, (group, padding, length) in enumerate(zip(groups, all_padding, lengths, strict=True))
        for name, first, at, elements in stretches(
            {name: shape.numel() for name, shape in group.items()}, padding, rank * length, (rank + 1) * length
        )
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


def _equal_parts(shapes: dict[str, torch.Size], lengths: list[int], rank: int, num_ranks: int) -> list[Place]:
    """Stage 3: a rank owns an equal, padded part of every parameter; its parts follow one another in the order of `shapes`, over all vectors."""
    ends = list(accumulate(lengths))
    places: list[Place] = []
    vector, offset = 0, 0
    for name, shape in shapes.items():
        part = -(-shape.numel() // num_ranks)
        while offset >= ends[vector]:
            vector += 1
        length = min(part, shape.numel() - rank * part)
        if length > 0:  # the last ranks may own nothing but padding
            places.append((name, rank * part, vector, offset - (ends[vector] - lengths[vector]), length))
        offset += part
    return places


def _replicated(saved: dict[str, Any]) -> SavedState:
    """Stage 0: the module's own tensors, or the optimizer's fp32 copies where it keeps any, in the order of the names that we save."""
    module: dict[str, Tensor] = saved["module"]
    optimizer: dict[str, Any] = saved["optimizer"]
    names = [name for group in saved[PARAM_NAMES] for name in group]
    masters: list[Tensor] = [tensor for group in optimizer.get("fp32_groups", []) for tensor in group] or [module[name] for name in names]
    states: dict[int, dict[str, Tensor]] = optimizer.get("optimizer_state_dict", optimizer)["state"]
    vectors = _by_kind(masters, states)
    pieces = {name: [Piece(0, module[name].numel(), 0, number, 0)] for number, name in enumerate(names)}
    by_storage = {module[name].data_ptr(): name for name in names}
    others = {name: value for name, value in module.items() if name not in pieces}
    aliases = {name: by_storage[value.data_ptr()] for name, value in others.items() if value.data_ptr() in by_storage}
    buffers = {name: value for name, value in others.items() if name not in aliases}
    shapes = {name: module[name].shape for name in names}
    return SavedState(shapes, pieces, lambda _rank: vectors, _step(states), aliases, buffers)
