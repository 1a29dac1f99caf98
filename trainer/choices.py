"""Choices made by measurement: rank 0 makes them before step 1, the run folder keeps them, and every later attempt reuses them."""

import time
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from data_pipeline.errors import NotFoundError
from trainer.attention import Table, fastest_kernels, table_in_words, usual_kernel
from trainer.checkpoint import list_checkpoints
from trainer.config import RunConfig
from trainer.manifest import Circumstances
from trainer.networks import PretrainingNetwork
from trainer.runlog import RunFolder
from trainer.totals import on_rank_zero

T = TypeVar("T")

Precision = Literal["bf16", "fp32"]

_FASTER = 1.5
"""What bf16 must gain in a matrix product before it is chosen: the rest of a step gains nothing."""
_SLOWER = 2.0
"""From what loss on a person who asks for bf16 is told."""
_SIDE = 256
_TIMINGS = 3


def settled(config: RunConfig, run: RunFolder, device: torch.device, attempt: int) -> RunConfig:
    """`config` with `precision: auto` made bf16 or fp32, whichever this run was begun in or, in a new run, rank 0's device is faster in; fp32 there
    where a rank's device has to emulate bf16.

    A precision that a person has chosen stays, with an event if the processor is far slower in it than in fp32. Collective.
    """
    everywhere = config.precision == "auto" and all(_of_every_rank(computes_bf16(device)))
    precision = on_rank_zero("choose a precision", lambda: _precision(config, run, device, attempt, everywhere=everywhere))
    return config.model_copy(update={"precision": precision})


def looked_up(config: RunConfig, run: RunFolder, device: torch.device) -> RunConfig:
    """`config` as `settled` gives it, for who only looks: what the run has not chosen yet is chosen for this once. Collective."""
    everywhere = config.precision == "auto" and all(_of_every_rank(computes_bf16(device)))

    def precision() -> str:
        return config.precision if config.precision != "auto" else _known(run) or fastest_precision(device, everywhere=everywhere)

    return config.model_copy(update={"precision": on_rank_zero("look up the precision", precision)})


def settled_kernels(config: RunConfig, run: RunFolder, network: PretrainingNetwork, device: torch.device, attempt: int) -> Table:
    """The attention kernels of the run: a person's choice, or those that the run was begun with; in a new run, of those that every rank's device has,
    the ones that rank 0's is fastest with. `config.precision` is settled. Collective.

    Raises:
        ConfigError: the architecture has no such kernel.
    """
    candidates = _common_candidates(network, config)

    def choose() -> Table:
        known = _known_kernels(config, run, candidates, device)
        if known is not None:
            return known
        kernels = fastest_kernels(config, network.config, candidates, device)
        run.choices.write_json({"device": device.type, **_read(run), "attention": kernels})
        if len(candidates) > 1:
            run.append_event("attention_chosen", attempt=attempt, kernels=table_in_words(kernels), device=device.type)
        return kernels

    return on_rank_zero("choose attention kernels", choose)


def looked_up_kernels(config: RunConfig, run: RunFolder, network: PretrainingNetwork, device: torch.device) -> Table:
    """The same as `settled_kernels`, for who only looks. Collective."""
    candidates = _common_candidates(network, config)

    def look_up() -> Table:
        known = _known_kernels(config, run, candidates, device)
        return fastest_kernels(config, network.config, candidates, device) if known is None else known

    return on_rank_zero("look up attention kernels", look_up)


def _common_candidates(network: PretrainingNetwork, config: RunConfig) -> list[str]:
    """The kernels that every rank's device has, of which each has the one that a person has chosen. Collective.

    Raises:
        ConfigError: the architecture has no such kernel.
    """
    network.require_kernel(config.model.attention)
    found = _of_every_rank(network.candidate_kernels())
    return [name for name in found[0] if all(name in each for each in found)]


def _of_every_rank(own: T) -> list[T]:
    """What each rank has found. Collective."""
    found: list[T] = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def _known_kernels(config: RunConfig, run: RunFolder, candidates: Sequence[str], device: torch.device) -> Table | None:
    """None where nobody has chosen yet."""
    lengths = [str(length) for length in config.batch.sequence_lengths]
    if config.model.attention != "auto":
        return dict.fromkeys(lengths, config.model.attention)
    usual = usual_kernel(device, candidates)
    if chosen := _read(run).get("attention"):
        return possible_kernels(chosen, candidates, usual)
    trained = _newest_circumstances(run)  # which began before there was a choice, has lost it, or left it to a person
    return None if trained is None else possible_kernels(trained.attention or dict.fromkeys(lengths, usual), candidates, usual)


def possible_kernels(kernels: Table, candidates: Sequence[str], usual: str) -> Table:
    """The kernels of a run; on a device that lacks one the usual one in its place, which a resume tells as a difference."""
    return {length: kernel if kernel in candidates else usual for length, kernel in kernels.items()}


def _precision(config: RunConfig, run: RunFolder, device: torch.device, attempt: int, *, everywhere: bool) -> str:
    if config.precision != "auto":
        if config.precision == "bf16" and device.type == "cpu" and attempt == 1 and (slower := 1 / bf16_gain()) > _SLOWER:
            run.append_event("slow_precision", attempt=attempt, precision="bf16", faster="fp32", factor=round(slower, 1))
        return config.precision
    known = _known(run)
    if known is not None:
        return known
    precision = fastest_precision(device, everywhere=everywhere)
    run.choices.write_json({**_read(run), "precision": precision, "device": device.type})
    run.append_event("precision_chosen", attempt=attempt, precision=precision, device=device.type)
    return precision


def _known(run: RunFolder) -> str | None:
    """What the run was begun in; None of a new one."""
    return _read(run).get("precision") or _trained_in(run)


def _read(run: RunFolder) -> dict[str, Any]:
    try:
        return run.choices.read_json()
    except NotFoundError:
        return {}


def _trained_in(run: RunFolder) -> str | None:
    """What the newest checkpoint was computed in: of a run that began before it made choices, or that has lost them."""
    trained = _newest_circumstances(run)
    return None if trained is None else trained.precision


def _newest_circumstances(run: RunFolder) -> Circumstances | None:
    checkpoints = list_checkpoints(run)
    return checkpoints[-1].manifest.circumstances if checkpoints else None


def fastest_precision(device: torch.device, *, everywhere: bool = True) -> Precision:
    """bf16 where the hardware multiplies it faster: a GPU says so, a CPU is timed for a few milliseconds. `everywhere`: whether all ranks' devices
    compute it."""
    is_faster = everywhere and (computes_bf16(device) if device.type == "cuda" else bf16_gain() > _FASTER)
    return "bf16" if is_faster else "fp32"


def computes_bf16(device: torch.device) -> bool:
    """Whether it has instructions for bf16: a GPU says so, a CPU without them is timed to be far slower than in fp32."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else bf16_gain() > 1 / _SLOWER


def bf16_gain() -> float:
    """How many times faster this CPU multiplies in bf16 than in fp32: 2 to 7 with instructions for it, a fiftieth without AVX-512."""
    return _matmul_s(torch.float32) / _matmul_s(torch.bfloat16)


def _matmul_s(dtype: torch.dtype) -> float:
    """Seconds of the fastest of a few products of two square matrices; the first, which may set things up, does not count."""
    matrix, best_s = torch.ones(_SIDE, _SIDE, dtype=dtype), float("inf")
    torch.mm(matrix, matrix)
    for _ in range(_TIMINGS):
        started_at = time.perf_counter()
        torch.mm(matrix, matrix)
        best_s = min(best_s, time.perf_counter() - started_at)
    return best_s
