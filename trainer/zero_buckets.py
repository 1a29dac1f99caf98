"""How gradients lie when DeepSpeed reduces them, and in what pieces: bucket by bucket at every stage, and without copies where it makes them.

Stages 2 and 3 are left alone, and so is stage 1 in fp16, offloaded, overlapped, or (in fp32) under a raw block of `zero_optimization`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ROW = 1 << 12
"""Elements whose squares a CPU sums to 1e-7; of 2^26 in one go it loses half a per cent."""


def cut_into_buckets(engine: Any) -> None:
    """Make a freshly built DeepSpeed engine reduce `reduce_bucket_size` elements at once also where it does not know the setting."""
    optimizer, elements = engine.optimizer, engine.zero_reduce_bucket_size()
    if hasattr(optimizer, "get_grads_for_reduction"):  # stage 1 in bf16: flat vectors, which would be joined in a copy and copied back
        if optimizer.immediate_grad_update:
            add_up_in_place(optimizer)
        parts = [part for flat in optimizer.get_grads_for_reduction()[0] for part in flat.split(elements)]
        optimizer.get_grads_for_reduction = lambda: (parts, {})
        engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=0)  # each part by itself
    elif engine.zero_optimization_stage() == 1 and _copies_at_the_end(optimizer):
        optimizer.reduce_gradients = FlatGradients.of(optimizer, elements).reduce
    else:
        engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=elements)  # stage 0; the others have it already


def add_up_in_place(optimizer: Any) -> None:
    """Stage 1 in bf16: let autograd itself add each gradient to its place in DeepSpeed's fp32 vectors, and take norms and clip by the vector.

    DeepSpeed does so parameter by parameter, in Python and with copies: of BERT-base some 800 of 2,000 kernels of a step, and a GPU waits.
    """
    for hook in optimizer._grad_acc_hooks:
        hook.remove()
    optimizer._grad_acc_hooks.clear()
    for group, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
        for parameter, gradient in zip(group, gradients, strict=True):
            parameter.grad_dtype = None  # of any type, to which 16-bit gradients are added as they come
            parameter.grad = gradient.view(parameter.shape)
    flats, own = optimizer.fp32_groups_gradients_flat, optimizer.fp32_groups_gradient_flat_partition
    optimizer.get_grads_for_norm = lambda for_clipping=False: own if for_clipping else ([_with_its_norm(flat) for flat in flats], {})
    optimizer.clear_lp_grads = lambda set_to_none=False: None  # they are those of the vectors, which are cleared


def _with_its_norm(flat: Tensor) -> Tensor:
    """A vector with the norm of `flat`: itself on a GPU, which sums in a tree; on a CPU, which adds one square to the next, the norms of its rows."""
    if flat.device.type == "cuda":
        return flat
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
        """Average the parameters' gradients over the ranks, and give the optimizer its part of them."""
        del pipeline_parallel
        ranks = self._optimizer.dp_process_group
        for number, (group, flat, places) in enumerate(zip(self._optimizer.bit16_groups, self._flats, self._places, strict=True)):
            for each, place in zip(group, places, strict=True):
                place.copy_(each.grad) if each.grad is not None else place.zero_()
                each.grad = None
            if dist.get_world_size(ranks) > 1:
                flat.div_(dist.get_world_size(ranks))
                for bucket in flat.split(self._elements):
                    dist.all_reduce(bucket, group=ranks)
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
