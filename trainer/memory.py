"""What a rank takes of memory at a ZeRO stage, at most at any time of a step, and what its checkpoints take (pure)."""

from dataclasses import asdict, dataclass
from typing import Any

from trainer import activations
from trainer.dimensions import Dimensions
from trainer.tensors import NOTHING, Tensors, peak_bytes
from trainer.zero_stages import FP32_BYTES, MATRICES, Job, State, each_parameter, own_part, state_of, updates


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
    """Of the peak: DeepSpeed's buckets and copies, parameters that stage 3 gathers; on a CPU also what the C library's heap grows by beyond them."""
    peak_bytes: int
    peak_at: str
    """`backward`, `reduce` (gradients over the ranks), or `step` (the update)."""

    def to_json(self) -> dict[str, Any]:
        """JSON object."""
        return asdict(self)


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
    """What a rank takes at `stage`: of a GPU what is allocated, of a CPU the resident set above that of the imported libraries.

    The system counts what a rank reads of others on its machine (`trainer.shared_vectors`) for both; here it is theirs.
    """
    state = state_of(job, stage)
    kept = state.weights + state.optimizer + state.gradients + state.buffers
    update = (state.norming, state.stepping + updates(job, stage), state.gathering)
    moments = [*_backward(job, state), _Moment("reduce", state.reducing), *(_Moment("step", each) for each in update)]
    most = max(moments, key=lambda moment: moment.tensors.num_bytes)
    taken = peak_bytes(kept, [moment.tensors for moment in moments], on_gpu=job.kernels.on_gpu)
    gradients = (each_parameter(job, FP32_BYTES) if stage < 2 else own_part(job, FP32_BYTES)).num_bytes
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
        return 3 * FP32_BYTES * parameters
    share = parameters if stage == 0 else parameters / world_size
    return round(3 * FP32_BYTES * share + element * (parameters / world_size if stage == 3 else parameters))


def checkpoint_bytes(network: Dimensions, precision: str, stage: int) -> int:
    """All ranks' files of a checkpoint together: as those of one rank that is alone."""
    return snapshot_bytes(network, precision, stage, world_size=1)


def _backward(job: Job, state: State) -> list[_Moment]:
    """Moments of a backward pass: the gradient of the logits, that of the decoder, the first and the last layer, the embeddings."""
    network, batch, kernels = job.network, job.batch, job.kernels
    table = Tensors.of(network.embedding * kernels.element_bytes)  # the gradient of the decoder, which waits for that of the embeddings
    kept = activations.kept(network, batch, kernels) + activations.kept_by_head(network, batch, kernels)
    outside, stored = activations.kept_outside(network, batch, kernels), activations.stored_layer(network, batch, kernels)
    work = activations.work_of_layer(network, batch, kernels)
    if kernels.checkpointing:
        work += activations.kept_layer(network, batch, kernels)
    grown = Tensors.of((network.parameters - network.embedding) / network.num_layers / MATRICES * state.grown_bytes, MATRICES)
    there = state.carried + state.bucket
    last = network.num_layers - 1
    return [
        _Moment("backward", there, kept + activations.logits(network, batch) * 2),
        _Moment("backward", there + table, kept),
        _Moment("backward", there + table, outside + stored * last + work),
        _Moment("backward", there + table + grown * last, outside + work),
        _Moment("backward", there + table * 3 + grown * network.num_layers),  # both gradients of the table of tokens, and their sum
    ]


def _element_bytes(precision: str) -> int:
    return FP32_BYTES if precision == "fp32" else 2
