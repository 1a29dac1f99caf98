"""Where gradients lie when DeepSpeed reduces them, and that each rank gets its own part alone (`trainer.zero_parts` says how).

At stage 1 each rank updates its own part of the weights, and needs the sums of that part alone: half of what the all-reduce of DeepSpeed sends, and
without its copies. Stages 2 and 3 are left alone, and so is stage 1 in fp16, offloaded, overlapped, or (in fp32) under a raw block of
`zero_optimization`; in bf16 `allgather_bucket_size` of such a block has no effect.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.zero_parts import Parts, norm_of_parts, parts_of


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
    ranks = optimizer.dp_process_group
    parts = parts_of([*optimizer.fp32_groups_gradients_flat, *optimizer.bf16_groups_flat], ranks, elements)
    gradients, weights = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    own = optimizer.fp32_groups_gradient_flat_partition

    def reduce(pipeline_parallel: bool = False) -> None:
        del pipeline_parallel
        for group in gradients:
            group.average_own()

    def round_and_gather() -> None:
        for group, masters in zip(weights, optimizer.fp32_groups_flat_partition, strict=True):
            group.own.copy_(masters.detach())
            group.gather()

    optimizer.reduce_gradients = reduce
    optimizer.get_grads_for_norm = lambda for_clipping=False: own if for_clipping else ([norm_of_parts(own, ranks)], {})
    optimizer.update_lp_params = torch.no_grad()(round_and_gather)


class FlatGradients:
    """Stage 1 in fp32: a vector of gradients for each group of parameters, laid out as their weights. Build it with `FlatGradients.of`.

    DeepSpeed copies every gradient up to four times, each time into memory that it has just been given. Here once, into memory that stays.
    """

    def __init__(self, optimizer: Any, vectors: Sequence[Parts], places: Sequence[Sequence[Tensor]]) -> None:
        self._optimizer = optimizer
        self._vectors = vectors
        self._places = places
        self._averaged = [self._part(number, vector.own) for number, vector in enumerate(vectors)]

    @classmethod
    def of(cls, optimizer: Any, elements: int) -> "FlatGradients":
        """The vectors of a DeepSpeed optimizer, reduced `elements` at once."""
        flats = [torch.zeros_like(weights) for weights in optimizer.bit16_groups_flat]  # what pads them stays 0
        vectors = parts_of(flats, optimizer.dp_process_group, elements)
        places = [
            [flat[_offset(each, weights) :][: each.numel()].view(each.shape) for each in group]
            for flat, weights, group in zip(flats, optimizer.bit16_groups_flat, optimizer.bit16_groups, strict=True)
        ]
        return cls(optimizer, vectors, places)

    def reduce(self, pipeline_parallel: bool = False) -> None:
        """Give the optimizer its part of the parameters' gradients, averaged over the ranks."""
        del pipeline_parallel
        for number, (group, vector, places) in enumerate(zip(self._optimizer.bit16_groups, self._vectors, self._places, strict=True)):
            for each, place in zip(group, places, strict=True):
                place.copy_(each.grad) if each.grad is not None else place.zero_()
                each.grad = None
            vector.average_own()
            self._optimizer.averaged_gradients[number] = self._averaged[number]

    def _part(self, number: int, own: Tensor) -> Any:
        """This rank's part of a group's vector, as DeepSpeed keeps that of stage 2: by parameter for the norm, whole for the update."""
        part = self._optimizer._build_compact_grad_partition_buffer(number)
        part.flat_partition.data = own
        part.move_flat_partition(own.device)  # makes its views anew
        return part


def _copies_at_the_end(optimizer: Any) -> bool:
    """Whether a stage 1 optimizer does nothing with gradients of fp32 before the last backward pass is over."""
    return optimizer.dtype == torch.float32 and not (optimizer.contiguous_gradients or optimizer.overlap_comm)


def _offset(parameter: Tensor, flat: Tensor) -> int:
    return int(parameter.data.storage_offset() - flat.storage_offset())
