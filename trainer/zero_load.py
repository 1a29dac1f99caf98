"""Gives an engine the weights and optimizer state of a checkpoint that other ranks or another ZeRO stage wrote (R4), and LAMB its partitions.

Knows where DeepSpeed keeps each rank's part, and imports nothing of it. The state is taken parameter by parameter, so a rank reads what it
will own and no more. Every function is called by all ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from trainer.lamb import Partition
from trainer.zero_state import MASTER, MOMENTS, SavedState, stretches


@dataclass(frozen=True)
class Owned:
    """Elements [start, stop) of a parameter, which this rank updates as `flat[at:]`, a tensor of its optimizer."""

    name: str
    start: int
    stop: int
    flat: Tensor
    at: int


def give_state(engine: Any, stage: int, state: SavedState) -> None:
    """Overwrite the weights and the optimizer's state of a freshly built DeepSpeed engine.

    Raises:
        ConfigError: the network has other parameters than the checkpoint.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    _require_same_parameters(engine.module, stage, state)
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # partitions what is gathered
    owned = list(_OWNED[stage](engine.optimizer, names))
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for flat in {id(each.flat): each.flat for each in owned}.values():
        if state.step:
            step = torch.tensor(state.step, dtype=torch.float32, device=flat.device)
            optimizer.state[flat] = {"step": step, **{kind: torch.zeros_like(flat) for kind in MOMENTS}}
    for each in owned:
        part = slice(each.at, each.at + each.stop - each.start)
        targets = {MASTER: each.flat.data, **{kind: optimizer.state[each.flat][kind] for kind in MOMENTS if state.step}}
        for kind, target in targets.items():
            target.view(-1)[part].copy_(state.read(each.name, kind, each.start, each.stop))
    if stage == 3:
        _round_partitions(engine.optimizer)
        engine.optimizer.checkpoint_event_epilogue()  # gathers what stays gathered
    elif stage > 0:
        engine.optimizer.update_lp_params()  # each rank rounds its part and hears the others': nobody reads all weights
    else:
        _round_parameters(engine.module, state)


def partitions(engine: Any, stage: int) -> dict[Tensor, Partition]:
    """Whose elements lie in each of this rank's flat vectors, of a freshly built DeepSpeed engine; empty at stage 0, where none are."""
    if stage == 0:
        return {}
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    numbers = {name: number for number, name in enumerate(names.values())}
    flats = engine.optimizer.fp32_partitioned_groups_flat if stage == 3 else [group["params"][0] for group in engine.optimizer.param_groups]
    owned: dict[Tensor, list[Owned]] = {flat: [] for flat in flats}
    for each in _OWNED[stage](engine.optimizer, names):
        owned[each.flat].append(each)
    return {
        flat: Partition(
            places=[(each.at, each.stop - each.start) for each in parts],
            parameters=torch.tensor([numbers[each.name] for each in parts], dtype=torch.int64, device=flat.device),
            num_parameters=len(numbers),
            ranks=engine.optimizer.dp_process_group,
        )
        for flat, parts in owned.items()
    }


def _require_same_parameters(module: nn.Module, stage: int, state: SavedState) -> None:
    shapes = {name: torch.Size(parameter.ds_shape if stage == 3 else parameter.shape) for name, parameter in _parameters(module)}
    different = sorted(name for name in shapes.keys() | state.shapes.keys() if shapes.get(name) != state.shapes.get(name))
    if different:
        raise ConfigError(f"the checkpoint is of another network: {different[0]} and {len(different) - 1} more differ", "Restore `model`.")


def _parameters(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters()


def _owned_replicated(optimizer: Any, names: dict[int, str]) -> Iterator[Owned]:
    """Stage 0: everything, in fp32 copies or, where the network is fp32, in the parameters themselves."""
    copies: list[list[Tensor]] = getattr(optimizer, "fp32_groups", None) or [group["params"] for group in optimizer.param_groups]
    originals: list[list[Tensor]] = getattr(optimizer, "fp16_groups", None) or copies
    for copied, group in zip(copies, originals, strict=True):
        for copy, parameter in zip(copied, group, strict=True):
            yield Owned(names[id(parameter)], 0, parameter.numel(), copy, 0)


def _owned_fragments(optimizer: Any, names: dict[int, str]) -> Iterator[Owned]:
    """Stages 1 and 2: a stretch of the flat vector of each group, see `zero_state`."""
    flats: list[Tensor] = [group["params"][0] for group in optimizer.optimizer.param_groups]
    groups: list[list[Any]] = getattr(optimizer, "round_robin_bit16_groups", None) or optimizer.bf16_groups
    all_padding: list[list[int]] = getattr(optimizer, "round_robin_bit16_padding", None) or [[0] * len(group) for group in groups]
    rank = torch.distributed.get_rank()
    for flat, group, padding in zip(flats, groups, all_padding, strict=True):
        sizes = {names[id(parameter)]: parameter.numel() for parameter in group}
        for name, start, at, length in stretches(sizes, padding, rank * flat.numel(), (rank + 1) * flat.numel()):
            yield Owned(name, start, start + length, flat, at)


def _owned_equal_parts(optimizer: Any, names: dict[int, str]) -> Iterator[Owned]:
    """Stage 3: an equal part of every parameter, one after the other in the vector of each sub-group; the last may be padding."""
    rank = torch.distributed.get_rank()
    for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        at = 0
        for parameter in group:
            part = parameter.ds_tensor.ds_numel
            start, stop = rank * part, min((rank + 1) * part, parameter.ds_numel)
            if start < stop:
                yield Owned(names[id(parameter)], start, stop, flat, at)
            at += part


_OWNED = {0: _owned_replicated, 1: _owned_fragments, 2: _owned_fragments, 3: _owned_equal_parts}


def _round_parameters(module: nn.Module, state: SavedState) -> None:
    for name, parameter in _parameters(module):
        parameter.data.copy_(state.weight(name))


def _round_partitions(optimizer: Any) -> None:
    """Stage 3: the network computes with partitions of its own, rounded from the fp32 ones."""
    for master, flat, partitions in zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, optimizer.fp16_partitioned_groups, strict=True
    ):
        flat.data.copy_(master.data)
        for partition, rounded in zip(partitions, optimizer.unflatten(flat, partitions), strict=True):
            partition.data = rounded.data
