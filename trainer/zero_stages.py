"""What DeepSpeed keeps of a network at each ZeRO stage, and what it copies when (pure).

Read from its optimizers: `FP16_UnfusedOptimizer` (stage 0 in 16 bits), `BF16_Optimizer` (stage 1 in bf16), `stage_1_and_2.py` and `stage3.py`, with
the settings of `trainer.deepspeed_config` and the vectors of `trainer.zero_buckets` (stage 1 in fp32). P parameters over W ranks; AdamW and LAMB
keep two moments, and the optimizer's weights are fp32.
"""

from dataclasses import dataclass

from trainer.activations import Kernels, Pass
from trainer.dimensions import Dimensions
from trainer.tensors import NOTHING, Tensors

STAGES = (0, 1, 2, 3)
FP32_BYTES, FP64_BYTES = 4, 8
MATRICES = 6
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
    overlaps: bool
    """Whether a bucket fills while another one is reduced (`overlap_comm`)."""
    has_flat_gradients: bool
    """Whether stage 1 in fp32 reduces from vectors that stay (`contiguous_gradients` off, see `zero_buckets`)."""
    has_updates: bool = False
    """Whether the optimizer computes all updates before it makes one, as LAMB does; AdamW makes each at once."""


@dataclass(frozen=True)
class State:
    """A rank at one stage, in tensors as DeepSpeed lays them out."""

    weights: Tensors
    optimizer: Tensors
    gradients: Tensors
    """Memory for gradients that is there all along."""
    buffers: Tensors
    """Other memory that is."""
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
    norming: Tensors = NOTHING
    """Gradients and their copies while their norm is computed, before the update."""
    gathering: Tensors = NOTHING
    """Into what the new weights of all ranks are copied after it."""


def state_of(job: Job, stage: int) -> State:
    """What a rank keeps at a stage."""
    return (_stage_0, _stage_1, _stage_2, _stage_3)[stage](job)


def _stage_0(job: Job) -> State:
    own, fp32 = each_parameter(job, job.kernels.element_bytes), each_parameter(job, FP32_BYTES)
    masters = 2 if job.precision == "fp32" else 3
    flattened = _flat(job, FP32_BYTES)
    return State(
        weights=own,
        optimizer=fp32 * masters,
        gradients=NOTHING,
        buffers=NOTHING,
        carried=fp32 if job.num_passes > 1 else NOTHING,
        bucket=NOTHING,
        grown_bytes=0 if job.num_passes > 1 else FP32_BYTES,
        reducing=fp32 + flattened,
        stepping=fp32,
    )


def _stage_1(job: Job) -> State:
    if job.precision == "bf16":
        return _stage_1_bf16(job)
    return _stage_1_flat(job) if job.precision == "fp32" and job.has_flat_gradients else _stage_1_buckets(job)


def _stage_1_flat(job: Job) -> State:
    """`zero_buckets.FlatGradients`: each gradient is copied once, into a vector that stays, and freed."""
    gradients = each_parameter(job, FP32_BYTES)
    return State(
        weights=_flat(job, FP32_BYTES),
        optimizer=own_part(job, FP32_BYTES) * 3,
        gradients=_flat(job, FP32_BYTES),
        buffers=NOTHING,
        carried=gradients if job.num_passes > 1 else NOTHING,
        bucket=NOTHING,
        grown_bytes=0 if job.num_passes > 1 else FP32_BYTES,
        reducing=gradients,
        stepping=NOTHING,
        norming=_normed(job),
        gathering=_gathered(job),
    )


def _stage_1_buckets(job: Job) -> State:
    """In fp32 and fp16. A bucket takes a gradient's place when it is copied into it; what lies in this rank's part is copied once more."""
    part, gradients = own_part(job, FP32_BYTES), each_parameter(job, FP32_BYTES)
    bucket = _buckets(job, FP32_BYTES)
    sent = _sent(job, FP32_BYTES) if job.world_size > 1 else NOTHING
    copies = max((sent, part), key=lambda each: each.num_bytes)
    return State(
        weights=_flat(job, job.kernels.element_bytes),
        optimizer=part * 3,
        gradients=NOTHING,
        buffers=NOTHING,
        carried=gradients if job.num_passes > 1 else NOTHING,
        bucket=bucket if job.kernels.on_gpu else NOTHING,
        grown_bytes=0 if job.num_passes > 1 else FP32_BYTES,
        reducing=copies + (gradients + bucket if job.kernels.on_gpu or not _fits_bucket(job) else bucket),
        stepping=part * (2 if job.precision == "fp32" else 1),
        norming=part + _normed(job),
        gathering=_gathered(job),
    )


def _stage_1_bf16(job: Job) -> State:
    """DeepSpeed's BF16_Optimizer keeps all gradients in fp32 on every rank, to which those of a pass are added as they come; they are reduced, and
    weights gathered, in place (`zero_buckets.reduce_to_parts`)."""
    part, fp32 = own_part(job, FP32_BYTES), _flat(job, FP32_BYTES)
    return State(
        weights=_flat(job, job.kernels.element_bytes),
        optimizer=part * 3,
        gradients=fp32,
        buffers=NOTHING,
        carried=NOTHING,
        bucket=NOTHING,
        grown_bytes=0,
        reducing=NOTHING,
        stepping=NOTHING,
    )


def _stage_2(job: Job) -> State:
    """Every pass reduces, from a bucket into this rank's part; in fp32 that of the pass is added to that of the passes before."""
    element, part = job.kernels.element_bytes, own_part(job, FP32_BYTES)
    bucket, plain = _buckets(job, element), job.precision == "fp32"
    sent = _sent(job, FP32_BYTES) if job.world_size > 1 else NOTHING
    casts = NOTHING if plain else _sent(job, element) + _sent(job, FP32_BYTES)
    carried = part if job.num_passes > 1 else NOTHING
    return State(
        weights=_flat(job, element),
        optimizer=part * 3,
        gradients=NOTHING,
        buffers=NOTHING,
        carried=carried,
        bucket=bucket if job.kernels.on_gpu else NOTHING,
        grown_bytes=element,
        reducing=bucket + part + (sent if plain else casts) + (carried if plain else NOTHING),
        stepping=part * (2 if plain else 1),
        norming=part + _normed(job),
        gathering=_gathered(job),
    )


def _stage_3(job: Job) -> State:
    """Weights are gathered for a pass, and stay while they are fewer than `stage3_max_live_parameters`; one rank has them all along.

    On a CPU gloo reduces a copy of what it is given, and the parameters, cut up one by one, leave holes in which no activation fits.
    """
    element, part, on_gpu = job.kernels.element_bytes, own_part(job, FP32_BYTES), job.kernels.on_gpu
    gathered = each_parameter(job, element) if job.world_size > 1 else NOTHING
    holes = NOTHING if on_gpu else each_parameter(job, FP32_BYTES)
    return State(
        weights=own_part(job, element),
        optimizer=part * 3,
        gradients=part,
        buffers=_bucket(job, FP32_BYTES) + gathered + holes,
        carried=NOTHING,
        bucket=NOTHING,
        grown_bytes=0,
        reducing=_sent(job, FP32_BYTES) * (1 if on_gpu else 2),
        stepping=part,
        norming=Tensors.of(job.network.embedding * FP64_BYTES / job.world_size),
    )


def each_parameter(job: Job, element_bytes: int) -> Tensors:
    """The parameters one by one: the table of tokens, and matrices of a layer."""
    network = job.network
    matrices = MATRICES * network.num_layers
    rest = (network.parameters - network.embedding) * element_bytes
    return Tensors.of(network.embedding * element_bytes) + Tensors.of(rest / matrices, matrices)


def _flat(job: Job, element_bytes: int) -> Tensors:
    """All parameters in one vector."""
    return Tensors.of(job.network.parameters * element_bytes)


def own_part(job: Job, element_bytes: int) -> Tensors:
    """This rank's part of them."""
    return Tensors.of(job.network.parameters * element_bytes / job.world_size)


def updates(job: Job, stage: int) -> Tensors:
    """What LAMB moves its weights by: of all of them before it moves one."""
    if not job.has_updates:
        return NOTHING
    return own_part(job, FP32_BYTES) if stage else each_parameter(job, FP32_BYTES)


def _normed(job: Job) -> Tensors:
    """The largest gradient of this rank's part, that of the table of tokens, in fp64: DeepSpeed copies one after the other for its norm."""
    return Tensors.of(min(job.network.embedding, job.network.parameters / job.world_size) * FP64_BYTES)


def _gathered(job: Job) -> Tensors:
    """Gloo gathers weights into a copy of all of them, NCCL into their place."""
    return NOTHING if job.kernels.on_gpu or job.world_size == 1 else _flat(job, job.kernels.element_bytes)


def _buckets(job: Job, element_bytes: int) -> Tensors:
    """Those of stages 1 and 2, of which there are two where one fills while the other is reduced."""
    is_one = not job.overlaps or (not job.kernels.on_gpu and _fits_bucket(job))
    return _bucket(job, element_bytes) * (1 if is_one else 2)


def _bucket(job: Job, element_bytes: int) -> Tensors:
    """A bucket for gradients: on a GPU all of it, on a CPU the pages that are used."""
    used = job.bucket_elements if job.kernels.on_gpu else min(job.bucket_elements, job.network.parameters)
    return Tensors.of(used * element_bytes)


def _fits_bucket(job: Job) -> bool:
    """Whether one bucket takes the gradients of all parameters."""
    return job.network.parameters <= job.bucket_elements


def _sent(job: Job, element_bytes: int) -> Tensors:
    """A copy of what a full bucket holds."""
    return Tensors.of(min(job.bucket_elements, job.network.parameters) * element_bytes)
