"""Which kernel computes attention: a table by row length, measured on this device before step 1, and masks in the form that each kernel takes.

Shape suffixes: R rows, H heads, T places of a row, W width of a head, S samples and stretches of padding, and one.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainer.batch import bounds_of
from trainer.config import RunConfig
from trainer.layers import drop

Table = Mapping[str, str]
"""By the longest row that it is for, in tokens, the name of a kernel; as JSON has it."""

_FASTER = 1.1
"""What a kernel must gain on the usual one to be chosen."""
_TIMINGS = 5
_MOST_SCORES = 1 << 20
"""Scores (R x H x T x T) of a measurement, unless one row has more: some milliseconds of a core, some megabytes."""
_MOST_SCORES_GPU = 1 << 28
"""The same of a GPU, which less would not fill."""


@dataclass(frozen=True)
class Kernel:
    """A way to compute attention, under the name that transformers gives it."""

    forward: Callable[..., tuple[Tensor, Any]]
    """As transformers calls it; stands in for an architecture's own function of the name, see `registered`."""
    mask: Callable[[Tensor, torch.dtype], Tensor] | None
    """From "attends to" (R, 1, 1 or T, T) and the dtype of the scores to the mask that it takes; None of a kernel that takes `bounds_of` samples,
    as (1, 1, 1, S)."""


def _added(attend: Tensor, dtype: torch.dtype) -> Tensor:
    """What plain attention adds to the scores."""
    return torch.zeros_like(attend, dtype=dtype).masked_fill(~attend, torch.finfo(dtype).min)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention by plain matrix products, as transformers calls a kernel: as BERT's own, but for how dropout is drawn. The weights are of the type of
    the scores, where ModernBERT's own are in fp32 for a moment.

    `query`, `key` and `value` (R, H, T, W); `mask` is added to the scores. Returns (R, T, H, W).
    """
    del module, others
    scores_RHTT = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights_RHTT = drop(nn.functional.softmax(scores_RHTT + mask, dim=-1), dropout)
    return torch.matmul(weights_RHTT, value).transpose(1, 2).contiguous(), None


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """FlashAttention-2 (Dao 2023) over all samples of a micro-batch, one after the other, as transformers calls a kernel: nothing is computed between
    samples, or between a sample and padding.

    `query`, `key` and `value` (R, H, T, W) on a GPU in 16 bits; `bounds` (1, 1, 1, S) as of `bounds_of`; `sliding_window` as ModernBERT gives it, one
    more than the places on either side. Returns (R, T, H, W).

    torch's public `varlen_attn` is the same without dropout.
    """
    del others
    rows, _, length, _ = query.shape
    places = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    bounds_S, reach = bounds.flatten(), None if sliding_window is None else sliding_window - 1
    is_causal = bool(getattr(module, "is_causal", False))
    attended, *_ = torch.ops.aten._flash_attention_forward(
        *places, bounds_S, bounds_S, length, length, dropout, is_causal, False, scale=scaling, window_size_left=reach, window_size_right=reach
    )
    return attended.unflatten(0, (rows, length)), None


KERNELS: dict[str, Kernel] = {
    "eager": Kernel(eager_attention_forward, _added),
    "sdpa": Kernel(sdpa_attention_forward, lambda attend, dtype: attend),
    "varlen": Kernel(varlen_attention_forward, None),
}
"""By the name that a run.yaml gives it."""
_PREFIX = "maskwright_"
for _name, _kernel in KERNELS.items():
    AttentionInterface.register(_PREFIX + _name, _kernel.forward)


def registered(kernel: str) -> str:
    """The name under which transformers finds a kernel of `KERNELS`; by its own name it would find the architecture's."""
    return _PREFIX + kernel


def mask_of(implementation: str) -> Callable[[Tensor, torch.dtype], Tensor] | None:
    """`Kernel.mask`, by the name that a network's config has: a registered one, or that of the architecture's own kernel."""
    return KERNELS[implementation.removeprefix(_PREFIX)].mask


def varlen_runs(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel of that name runs there: on GPUs since Ampere, in 16 bits."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return width % 8 == 0 and width <= 256


@dataclass(frozen=True)
class Shape:
    """Attention of one layer over a micro-batch, as it is measured."""

    rows: int
    heads: int
    length: int
    head_width: int
    packed: bool
    """Whether rows hold several samples, so that each place has a mask of its own."""
    is_causal: bool
    """Whether places attend to what comes before them only; each then has a mask of its own, too."""
    dtype: torch.dtype
    dropout: float


def usual_kernel(device: torch.device, candidates: Sequence[str] = ("eager", "sdpa")) -> str:
    """What is taken unless another one is found to be faster: on a CPU, SDPA's bf16 kernel takes twice the time of plain matrix products."""
    return "sdpa" if device.type == "cuda" and "sdpa" in candidates else "eager"


def kernel_for(table: Table, length: int) -> str:
    """The kernel of the shortest rows in `table` that are as long as `length`, or of its longest: rows are padded to their longest sample only."""
    known = sorted(map(int, table))
    return table[str(next((longest for longest in known if longest >= length), known[-1]))]


def table_in_words(table: Table) -> str:
    """For people: one name, or which at which length."""
    kernels = set(table.values())
    return kernels.pop() if len(kernels) == 1 else ", ".join(f"{table[length]} up to {length} tokens" for length in sorted(table, key=int))


def fastest_kernels(config: RunConfig, network_config: Any, candidates: Sequence[str], device: torch.device) -> dict[str, str]:
    """For each sequence length of the run, which of `candidates` is fastest forward and backward on `device`, which is measured."""
    if len(candidates) == 1:
        return {str(length): candidates[0] for length in config.batch.sequence_lengths}
    shapes = {str(length): shape_of(config, network_config, length, device) for length in config.batch.sequence_lengths}
    found = {length: faster(measured(candidates, shape, device), usual_kernel(device, candidates)) for length, shape in shapes.items()}
    if device.type == "cuda":  # what was measured is no part of the run's peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return found


def faster(seconds: Mapping[str, float], usual: str) -> str:
    """The kernel with the least seconds, if it gains a tenth over the usual one: less is noise."""
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[usual] > _FASTER * seconds[best] else usual


def head_width(network_config: Any) -> int:
    """Of a network of transformers."""
    return int(getattr(network_config, "head_dim", None) or network_config.hidden_size // network_config.num_attention_heads)


def shape_of(config: RunConfig, network_config: Any, length: int, device: torch.device) -> Shape:
    """The run's micro-batches at `length`, with fewer rows where they would take long to measure."""
    heads = int(network_config.num_attention_heads)
    most_rows = (_MOST_SCORES_GPU if device.type == "cuda" else _MOST_SCORES) // (heads * length * length)
    return Shape(
        rows=max(1, min(config.batch.micro_batch_size // config.batch.split, most_rows)),
        heads=heads,
        length=length,
        head_width=head_width(network_config),
        packed=config.batch.row_packing == "rows",
        is_causal=config.objective.kind == "clm",
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision],
        dropout=config.model.dropout,
    )


def measured(candidates: Sequence[str], shape: Shape, device: torch.device) -> dict[str, float]:
    """Seconds of each kernel, forward and backward: the least of a few times, in which they take turns. Leaves torch's random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        passes = {name: _pass_of(KERNELS[name], shape, device) for name in candidates}
        for once in passes.values():  # which may set things up
            _seconds(once, device)
        best = dict.fromkeys(passes, math.inf)
        for _ in range(_TIMINGS):
            for name, once in passes.items():
                best[name] = min(best[name], _seconds(once, device))
    return best


def _pass_of(kernel: Kernel, shape: Shape, device: torch.device) -> Callable[[], Any]:
    """A forward and backward pass over made-up rows: two samples a row, or one and a place of padding."""
    size = (shape.rows, shape.length, shape.heads, shape.head_width)
    query_RHTW, key_RHTW, value_RHTW = (torch.randn(size, dtype=shape.dtype, device=device, requires_grad=True).transpose(1, 2) for _ in range(3))
    ids_T = 1 + np.arange(shape.length) * 2 // shape.length if shape.packed else np.append(np.ones(shape.length - 1), 0)
    samples_T = torch.from_numpy(ids_T).to(device)
    attend_TT = samples_T[:, None] == samples_T if shape.packed else samples_T.bool()[None]  # all places alike
    if shape.is_causal:
        attend_TT = attend_TT.expand(shape.length, -1).tril()
    attend, layer = attend_TT.expand(shape.rows, 1, -1, -1), cast(Any, nn.Identity())
    layer.is_causal = shape.is_causal
    bounds = torch.from_numpy(bounds_of(np.tile(ids_T, (shape.rows, 1)))).to(device)[None, None, None]
    mask = bounds if kernel.mask is None else kernel.mask(attend, shape.dtype)

    def once() -> Any:
        attended_RTHW, _ = kernel.forward(layer, query_RHTW, key_RHTW, value_RHTW, mask, dropout=shape.dropout, scaling=shape.head_width**-0.5)
        return torch.autograd.grad(attended_RTHW, (query_RHTW, key_RHTW, value_RHTW), cast(Any, torch.ones_like(attended_RTHW)))

    return once


def _seconds(once: Callable[[], Any], device: torch.device) -> float:
    """Of one pass; infinitely many of one that does not fit into the device's memory, or that this build of torch lacks."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    started_at = time.perf_counter()
    try:
        once()
    except RuntimeError:
        return math.inf
    wait()
    return time.perf_counter() - started_at
