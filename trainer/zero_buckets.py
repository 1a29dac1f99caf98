"""How gradients lie when DeepSpeed reduces them, in what pieces, and to whom.

At stage 1 each rank updates its own part of the weights, and needs the sums of that part alone: half of what the all-reduce of DeepSpeed sends, and
without its copies. Stages 2 and 3 are left alone, and so is stage 1 in fp16, offloaded, overlapped, or (in fp32) under a raw block of
`zero_optimization`; in bf16 `allgather_bucket_size` of such a block has no effect.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # pyright: ignore[reportDeprecated]
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # pyright: ignore[reportDeprecated]
"""As torch 2.13 calls them, and as it did before."""
_ROW = 1 << 12
"""Elements whose squares a CPU sums to 1e-7; of 2^26 in one go it loses half a per cent."""
_PIECE = 1 << 22
"""Elements that two ranks on CPUs exchange at once: larger pieces are no faster, of smaller ones each waits for the other rank to look."""


def cut_into_buckets(engine: Any) -> None:
    """Make a freshly built DeepSpeed engine reduce `reduce_bucket_size` elements at once also where it does not know the setting.

    But for NCCL at stage 1, which reduces a vector in place and needs no bucket.
    """
    optimizer, elements = engine.optimizer, engine.zero_reduce_bucket_size()
    if hasattr(optimizer, "fp32_groups_gradients_flat"):  # stage 1 in bf16
        add_up_in_place(optimizer)
        reduce_to_parts(optimizer, elements)
    elif engine.zero_optimization_stage() == 1 and _copies_at_the_end(optimizer):
        optimizer.reduce_gradients = FlatGradients.of(optimizer, elements).reduce
    else:
        engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=elements)  # stage 0; the others have it already


def add_up_in_place(optimizer: Any) -> None:
    """Stage 1 in bf16: let autograd itself add each gradient to its place in DeepSpeed's fp32 vectors.

    DeepSpeed does so parameter by parameter, in Python and with copies: of BERT-base some 800 of 2,000 kernels of a step, and a GPU waits.
    """
    for hook in optimizer._grad_acc_hooks:
        hook.remove()
    optimizer._grad_acc_hooks.clear()
    for group, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
        for parameter, gradient in zip(group, gradients, strict=True):
            parameter.grad_dtype = None  # of any type, to which 16-bit gradients are added as they come
            parameter.grad = gradient.view(parameter.shape)
    clear = optimizer.clear_hp_grads
    optimizer.zero_grad = lambda set_to_none=True: clear()
    optimizer.clear_hp_grads = lambda: None  # `zero_grad` follows whoever asks for it
    optimizer.clear_lp_grads = lambda set_to_none=False: None  # those of the network are the vectors


def reduce_to_parts(optimizer: Any, elements: int) -> None:
    """Stage 1 in bf16: give each rank the sums of its part alone, make the norm of all parts from those of each, and clip only its own.

    DeepSpeed copies every vector, reduces it whole, and copies it back.
    """
    ranks, flats, own = optimizer.dp_process_group, optimizer.fp32_groups_gradients_flat, optimizer.fp32_groups_gradient_flat_partition

    def reduce(pipeline_parallel: bool = False) -> None:
        del pipeline_parallel
        for flat in flats:
            average_own_part(flat, ranks, elements)

    def round_and_gather() -> None:
        for flat, parts, masters in zip(
            optimizer.bf16_groups_flat, optimizer.bf16_partitioned_groups, optimizer.fp32_groups_flat_partition, strict=True
        ):  # fmt: skip
            parts[dist.get_rank(ranks)].copy_(masters.detach())
            gather_parts(flat, ranks)

    optimizer.reduce_gradients = reduce
    optimizer.get_grads_for_norm = lambda for_clipping=False: own if for_clipping else ([norm_of_parts(own, ranks)], {})
    optimizer.update_lp_params = torch.no_grad()(round_and_gather)


def average_own_part(flat: Tensor, ranks: Any, elements: int) -> None:
    """Make this rank's part of `flat`, of as many as there are ranks, the mean over the ranks. What it has of the others' is then of no use.

    In place. NCCL reduces all of it at once; gloo, which would reduce a copy and to everybody, only exchanges, at most `elements` at once.
    """
    parts, own = _cut(flat, ranks)
    if len(parts) == 1:
        return
    if has_gloo(flat):
        at_once = min(elements, _PIECE, len(own))
        arrived = flat.new_empty(at_once)
        for source, target in _exchanges(ranks):
            for mine, theirs in zip(own.split(at_once), parts[target].split(at_once), strict=True):
                _exchange(theirs, target, arrived[: len(mine)], source, ranks)
                mine.add_(arrived[: len(mine)])
    else:
        _REDUCE_SCATTER(own, flat, group=ranks)
    own.div_(len(parts))


def gather_parts(flat: Tensor, ranks: Any) -> None:
    """Give each rank what the others have in their parts of `flat`. In place, where gloo would gather a copy."""
    parts, own = _cut(flat, ranks)
    if has_gloo(flat):
        for source, target in _exchanges(ranks):
            _exchange(own, target, parts[source], source, ranks)
    elif len(parts) > 1:
        _ALL_GATHER(flat, own, group=ranks)


def _cut(flat: Tensor, ranks: Any) -> tuple[Tensor, Tensor]:
    """All parts, one row a rank, and this rank's."""
    parts = flat.view(dist.get_world_size(ranks), -1)
    return parts, parts[dist.get_rank(ranks)]


def has_gloo(tensor: Tensor) -> bool:
    """Whether gloo moves it, and not NCCL."""
    return tensor.device.type == "cpu"


def _exchanges(ranks: Any) -> Iterator[tuple[int, int]]:
    """From whom a rank receives and to whom it sends, round after round until it has met all: in none do two ranks send to the same."""
    rank, size = dist.get_rank(ranks), dist.get_world_size(ranks)
    return (((rank - distance) % size, (rank + distance) % size) for distance in range(1, size))


def _exchange(sent: Tensor, target: int, received: Tensor, source: int, ranks: Any) -> None:
    transfers = [dist.isend(sent, group=ranks, group_dst=target), dist.irecv(received, group=ranks, group_src=source)]
    for transfer in transfers:
        assert transfer is not None  # nothing is sent only by who is not in the group
        transfer.wait()


def norm_of_parts(own: Sequence[Tensor], ranks: Any) -> Tensor:
    """The 2-norm of all ranks' parts together, the same on each: a scalar."""
    square = torch.linalg.vector_norm(torch.cat([_norms(part) for part in own])).square()
    dist.all_reduce(square, group=ranks)
    return square.sqrt()


def _norms(flat: Tensor) -> Tensor:
    """Norms whose norm is that of `flat`: one on a GPU, which sums in a tree; on a CPU, which adds one square to the next, those of its rows."""
    if flat.device.type == "cuda":
        return torch.linalg.vector_norm(flat)[None]
    even = flat.numel() // _ROW * _ROW
    return torch.cat([torch.linalg.vector_norm(flat[:even].view(-1, _ROW), dim=1), torch.linalg.vector_norm(flat[even:])[None]])


class FlatGradients:
    """Stage 1 in fp32: a vector of gradients for each group of parameters, laid out as their weights. Build it with `FlatGradients.of`.

    DeepSpeed copies every gradient up to four times, each time into memory that it has just been given. Here once, into memory that stays.
    """

    def __init__(self, optimizer: Any, elements: int, flats: Sequence[Tensor], places: Sequence[Sequence[Tensor]]) -> None:
        self._optimizer = optimizer
        self._elements = elements
        self._flats = flats
        self._places = places
        self._parts = [self._part(number, flat) for number, flat in enumerate(flats)]

    @classmethod
    def of(cls, optimizer: Any, elements: int) -> "FlatGradients":
        """The vectors of a DeepSpeed optimizer, reduced `elements` at once."""
        flats = [torch.zeros_like(weights) for weights in optimizer.bit16_groups_flat]  # what pads them stays 0
        places = [
            [flat[_offset(each, weights) :][: each.numel()].view(each.shape) for each in group]
            for flat, weights, group in zip(flats, optimizer.bit16_groups_flat, optimizer.bit16_groups, strict=True)
        ]
        return cls(optimizer, elements, flats, places)

    def reduce(self, pipeline_parallel: bool = False) -> None:
        """Give the optimizer its part of the parameters' gradients, averaged over the ranks."""
        del pipeline_parallel
        ranks = self._optimizer.dp_process_group
        for number, (group, flat, places) in enumerate(zip(self._optimizer.bit16_groups, self._flats, self._places, strict=True)):
            for each, place in zip(group, places, strict=True):
                place.copy_(each.grad) if each.grad is not None else place.zero_()
                each.grad = None
            average_own_part(flat, ranks, self._elements)
            self._optimizer.averaged_gradients[number] = self._parts[number]

    def _part(self, number: int, flat: Tensor) -> Any:
        """This rank's part of a group's vector, as DeepSpeed keeps that of stage 2: by parameter for the norm, whole for the update."""
        part = self._optimizer._build_compact_grad_partition_buffer(number)
        size, rank = part.flat_partition.numel(), dist.get_rank(self._optimizer.dp_process_group)
        part.flat_partition.data = flat[rank * size : (rank + 1) * size]
        part.move_flat_partition(flat.device)  # makes its views anew
        return part


def _copies_at_the_end(optimizer: Any) -> bool:
    """Whether a stage 1 optimizer does nothing with gradients of fp32 before the last backward pass is over."""
    return optimizer.dtype == torch.float32 and not (optimizer.contiguous_gradients or optimizer.overlap_comm)


def _offset(parameter: Tensor, flat: Tensor) -> int:
    return int(parameter.data.storage_offset() - flat.storage_offset())
