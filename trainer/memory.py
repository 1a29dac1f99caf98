"""What a rank holds at each ZeRO stage, and at most at any time of a step (pure).

What DeepSpeed keeps, and what it copies when, is read from its optimizers: `FP16_UnfusedOptimizer` (stage 0 in 16 bits), `BF16_Optimizer` (stage 1
in bf16), `stage_1_and_2.py` and `stage3.py`, with the settings of `trainer.deepspeed_config`. P parameters over W ranks; AdamW and LAMB keep two
moments, and the optimizer's weights are fp32.
"""

from dataclasses import asdict, dataclass
from typing import Any

from trainer import activations
from trainer.activations import Kernels, Pass
from trainer.dimensions import Dimensions
from trainer.tensors import NOTHING, Tensors, peak_bytes

STAGES = (0, 1, 2, 3)
_FP32 = 4
_MATRICES = 6
"""Of a layer, about: their sizes matter to the heap of a CPU only."""


@dataclass(frozen=True)
class Job:
    """How a network is trained, as far as memory goes."""

    network: Dimensions
    batch: Pass
    kernels: Kernels
    precision: str
    world_size: int
    num_passes: int
    """Forward and backward passes of a rank in a step."""
    bucket_elements: int
    """`reduce_bucket_size` of DeepSpeed."""


@dataclass(frozen=True)
class RankMemory:
    """A rank at one ZeRO stage. Gradients and activations are not whole at the same time, so the peak is less than the sum."""

    stage: int
    weights_bytes: int
    gradients_bytes: int
    """When the last backward pass is over; in fp32."""
    optimizer_bytes: int
    """fp32 weights and both moments."""
    activations_bytes: int
    """What the passes keep and work with, the logits included."""
    buffers_bytes: int
    """Of the peak: DeepSpeed's buckets and copies, parameters that stage 3 gathers; on a CPU also the holes in the C library's heap."""
    peak_bytes: int
    peak_at: str
    """`backward`, `reduce` (gradients over the ranks), or `step` (the update)."""

    def to_json(self) -> dict[str, Any]:
        """JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class _State:
    """Elements are counted in tensors as DeepSpeed lays them out."""

    weights: Tensors
    optimizer: Tensors
    gradients: Tensors
    """That are there from one step to the next."""
    buffers: Tensors
    """That are."""
    carried: Tensors
    """Gradients that are there from one pass to the next."""
    bucket: Tensors
    """Reserved from the first gradient of a pass on."""
    grown_bytes: int
    """By which gradients grow for each parameter in a pass."""
    reducing: Tensors
    """Gradients and their copies while they are summed over the ranks, the passes being over."""
    stepping: Tensors
    """Gradients and their copies in the update."""


@dataclass(frozen=True)
class _Moment:
    """What there is at one time of a step beside what is always there."""

    name: str
    gradients: Tensors
    activations: Tensors = NOTHING

    @property
    def tensors(self) -> Tensors:
        return self.gradients + self.activations


def rank_memory(job: Job, stage: int) -> RankMemory:
    """What a rank takes at `stage`: of a GPU what is allocated, of a CPU the resident set above that of the imported libraries."""
    state = _state(job, stage)
    kept = state.weights + state.optimizer + state.gradients + state.buffers
    moments = [*_backward(job, state), _Moment("reduce", state.reducing), _Moment("step", state.stepping)]
    most = max(moments, key=lambda moment: moment.tensors.num_bytes)
    taken = peak_bytes([kept + moment.tensors for moment in moments], on_gpu=job.kernels.on_gpu)
    gradients = (_each(job, _FP32) if stage < 2 else _part(job, _FP32)).num_bytes
    held = (state.gradients + state.carried).num_bytes if most.name == "backward" else gradients
    return RankMemory(
        stage=stage,
        weights_bytes=state.weights.num_bytes,
        gradients_bytes=gradients,
        optimizer_bytes=state.optimizer.num_bytes,
        activations_bytes=max(moment.activations.num_bytes for moment in moments),
        buffers_bytes=taken - state.weights.num_bytes - state.optimizer.num_bytes - most.activations.num_bytes - held,
        peak_bytes=taken,
        peak_at=most.name,
    )


def snapshot_bytes(network: Dimensions, precision: str, stage: int, world_size: int) -> int:
    """A rank's files of a checkpoint, which lie in host memory while they are written; the largest, which is that of rank 0.

    fp32 weights and moments, of which each rank has its part from stage 1 on; beside them the weights of the network, which rank 0 has whole at
    stages 0 to 2. In fp32 at stage 0 those are the optimizer's.
    """
    parameters, element = network.parameters, _element_bytes(precision)
    if stage == 0 and precision == "fp32":
        return 3 * _FP32 * parameters
    share = parameters if stage == 0 else parameters / world_size
    return round(3 * _FP32 * share + element * (parameters / world_size if stage == 3 else parameters))


def checkpoint_bytes(network: Dimensions, precision: str, stage: int) -> int:
    """All ranks' files of a checkpoint together: as those of one rank that is alone."""
    return snapshot_bytes(network, precision, stage, world_size=1)


def _state(job: Job, stage: int) -> _State:
    stages = (_stage_0, _stage_1_bf16 if job.precision == "bf16" else _stage_1, _stage_2, _stage_3)
    return stages[stage](job)


def _stage_0(job: Job) -> _State:
    own, fp32 = _each(job, job.kernels.element_bytes), _each(job, _FP32)
    masters = 2 if job.precision == "fp32" else 3
    flattened = _flat(job, _FP32)
    return _State(
        weights=own,
        optimizer=fp32 * masters,
        gradients=NOTHING,
        buffers=NOTHING,
        carried=fp32 if job.num_passes > 1 else NOTHING,
        bucket=NOTHING,
        grown_bytes=0 if job.num_passes > 1 else _FP32,
        reducing=fp32 + flattened,
        stepping=fp32,
    )


def _stage_1(job: Job) -> _State:
    """In fp32 and fp16. A bucket takes a gradient's place when it is copied into it; what lies in this rank's part is copied once more."""
    part, gradients = _part(job, _FP32), _each(job, _FP32)
    bucket = _bucket(job, _FP32)
    sent = _sent(job, _FP32) if job.world_size > 1 else NOTHING
    copies = max((sent, part), key=lambda each: each.num_bytes)
    return _State(
        weights=_flat(job, job.kernels.element_bytes),
        optimizer=part * 3,
        gradients=NOTHING,
        buffers=NOTHING,
        carried=gradients if job.num_passes > 1 else NOTHING,
        bucket=bucket if job.kernels.on_gpu else NOTHING,
        grown_bytes=0 if job.num_passes > 1 else _FP32,
        reducing=gradients + copies + (bucket if job.kernels.on_gpu else NOTHING),
        stepping=part * (2 if job.precision == "fp32" else 1),
    )


def _stage_1_bf16(job: Job) -> _State:
    """DeepSpeed's BF16_Optimizer keeps all gradients in fp32 on every rank, and copies them to sum them."""
    part, fp32 = _part(job, _FP32), _flat(job, _FP32)
    return _State(
        weights=_flat(job, job.kernels.element_bytes),
        optimizer=part * 3,
        gradients=fp32,
        buffers=NOTHING,
        carried=NOTHING,
        bucket=NOTHING,
        grown_bytes=job.kernels.element_bytes,
        reducing=fp32,
        stepping=NOTHING,
    )


def _stage_2(job: Job) -> _State:
    """Every pass reduces, from a bucket into this rank's part; in fp32 that of the pass is added to that of the passes before."""
    element, part = job.kernels.element_bytes, _part(job, _FP32)
    bucket, plain = _bucket(job, element), job.precision == "fp32"
    sent = _sent(job, _FP32) if job.world_size > 1 else NOTHING
    casts = NOTHING if plain else _sent(job, element) + _sent(job, _FP32)
    carried = part if job.num_passes > 1 else NOTHING
    return _State(
        weights=_flat(job, element),
        optimizer=part * 3,
        gradients=NOTHING,
        buffers=NOTHING,
        carried=carried,
        bucket=bucket if job.kernels.on_gpu else NOTHING,
        grown_bytes=element,
        reducing=bucket + part + (sent if plain else casts) + (carried if plain else NOTHING),
        stepping=part * (2 if plain else 1),
    )


def _stage_3(job: Job) -> _State:
    """Weights are gathered for a pass, and stay while they are fewer than `stage3_max_live_parameters`; one rank has them all along.

    On a CPU gloo reduces a copy of what it is given, and the parameters, cut up one by one, leave holes in which no activation fits.
    """
    element, part, on_gpu = job.kernels.element_bytes, _part(job, _FP32), job.kernels.on_gpu
    gathered = _each(job, element) if job.world_size > 1 else NOTHING
    holes = NOTHING if on_gpu else _each(job, _FP32).in_heap
    return _State(
        weights=_part(job, element),
        optimizer=part * 3,
        gradients=part,
        buffers=_bucket(job, _FP32) + gathered + holes,
        carried=NOTHING,
        bucket=NOTHING,
        grown_bytes=0,
        reducing=_sent(job, _FP32) * (1 if on_gpu else 2),
        stepping=part,
    )


def _backward(job: Job, state: _State) -> list[_Moment]:
    """Moments of a backward pass: the gradient of the logits, that of the decoder, the first and the last layer, the embeddings."""
    network, batch, kernels = job.network, job.batch, job.kernels
    table = Tensors.of(network.embedding * kernels.element_bytes)  # the gradient of the decoder, which waits for that of the embeddings
    kept = activations.kept(network, batch, kernels) + activations.kept_by_head(network, batch, kernels)
    outside, stored = activations.kept_outside(network, batch, kernels), activations.stored_layer(network, batch, kernels)
    work = activations.work_of_layer(network, batch, kernels)
    if kernels.checkpointing:
        work += activations.kept_layer(network, batch, kernels)
    grown = Tensors.of((network.parameters - network.embedding) / network.num_layers / _MATRICES * state.grown_bytes, _MATRICES)
    there = state.carried + state.bucket
    last = network.num_layers - 1
    return [
        _Moment("backward", there, kept + activations.logits(network, batch) * 2),
        _Moment("backward", there + table, kept),
        _Moment("backward", there + table, outside + stored * last + work),
        _Moment("backward", there + table + grown * last, outside + work),
        _Moment("backward", there + table * 2 + grown * network.num_layers),
    ]


def _each(job: Job, element_bytes: int) -> Tensors:
    """The parameters one by one: the table of tokens, and matrices of a layer."""
    network = job.network
    matrices = _MATRICES * network.num_layers
    rest = (network.parameters - network.embedding) * element_bytes
    return Tensors.of(network.embedding * element_bytes) + Tensors.of(rest / matrices, matrices)


def _flat(job: Job, element_bytes: int) -> Tensors:
    """All parameters in one vector."""
    return Tensors.of(job.network.parameters * element_bytes)


def _part(job: Job, element_bytes: int) -> Tensors:
    """This rank's part of them."""
    return Tensors.of(job.network.parameters * element_bytes / job.world_size)


def _bucket(job: Job, element_bytes: int) -> Tensors:
    """A bucket for gradients: on a GPU all of it, on a CPU the pages that are used."""
    used = job.bucket_elements if job.kernels.on_gpu else min(job.bucket_elements, job.network.parameters)
    return Tensors.of(used * element_bytes)


def _sent(job: Job, element_bytes: int) -> Tensors:
    """A copy of what a full bucket holds."""
    return Tensors.of(min(job.bucket_elements, job.network.parameters) * element_bytes)


def _element_bytes(precision: str) -> int:
    return _FP32 if precision == "fp32" else 2
