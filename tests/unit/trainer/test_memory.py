"""What a rank holds at each ZeRO stage."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.activations import Kernels, Pass
from trainer.dimensions import Dimensions
from trainer.memory import checkpoint_bytes, rank_memory, snapshot_bytes
from trainer.tensors import HEAP_GROWTH, LARGE_BYTES, NOTHING, Tensors, peak_bytes
from trainer.zero_stages import STAGES, Job

BASE = Dimensions("bert", 30522, 12, 768, 12, 3072, 512, 0.1, {})


def job(**changes: object) -> Job:
    """BERT-base in bf16 on eight GPUs."""
    usual = Job(
        BASE, Pass(32, 128, 600, packed=False), Kernels(2, on_gpu=True, checkpointing=False, attention="sdpa"), "bf16", 8, 2, 50_000_000, False, False
    )
    return replace(usual, **changes)  # pyright: ignore[reportArgumentType]


jobs = st.builds(
    job,
    batch=st.builds(Pass, st.integers(1, 64), st.sampled_from([64, 128, 512]), st.integers(1, 2000), st.booleans()),
    world_size=st.integers(1, 64),
    num_passes=st.integers(1, 4),
    kernels=st.builds(Kernels, st.just(2), st.booleans(), st.booleans(), st.sampled_from(["eager", "sdpa"])),
    overlaps=st.booleans(),
    has_updates=st.booleans(),
)


@given(jobs)
def test_a_higher_stage_holds_less_state(found: Job) -> None:
    state = [rank_memory(found, stage) for stage in STAGES]
    totals = [memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes for memory in state]
    assert totals == sorted(totals, reverse=True)
    assert all(memory.peak_bytes >= memory.weights_bytes + memory.optimizer_bytes for memory in state)


@given(jobs, st.sampled_from(STAGES))
def test_more_samples_never_take_less(found: Job, stage: int) -> None:
    """Of a GPU. On a CPU larger tensors may take less: from 32 MB on they do not lie where smaller ones did."""
    found = replace(found, kernels=replace(found.kernels, on_gpu=True))
    more = replace(found.batch, num_rows=found.batch.num_rows + 1, num_predicted=found.batch.num_predicted + 5)
    assert rank_memory(replace(found, batch=more), stage).peak_bytes >= rank_memory(found, stage).peak_bytes


@given(jobs, st.sampled_from(STAGES[1:]))
def test_more_ranks_hold_less_each(found: Job, stage: int) -> None:
    few, many = (rank_memory(replace(found, world_size=size), stage) for size in (2, 16))
    assert many.optimizer_bytes < few.optimizer_bytes
    assert many.peak_bytes <= few.peak_bytes


@given(jobs, st.sampled_from(STAGES))
def test_checkpointing_takes_fewer_activations(found: Job, stage: int) -> None:
    kept, again = (rank_memory(replace(found, kernels=replace(found.kernels, checkpointing=each)), stage) for each in (False, True))
    assert again.activations_bytes <= kept.activations_bytes


def test_published_sums() -> None:
    """Rajbhandari et al. 2020, section 3.1: weights 2, optimizer 12 bytes a parameter in 16 bits; here gradients are summed in fp32."""
    memory = {stage: rank_memory(job(), stage) for stage in STAGES}
    parameters = BASE.parameters
    assert memory[0].weights_bytes == pytest.approx(2 * parameters)
    assert memory[0].optimizer_bytes == pytest.approx(12 * parameters)
    assert memory[1].optimizer_bytes == pytest.approx(12 * parameters / 8)
    assert memory[2].gradients_bytes == pytest.approx(4 * parameters / 8)
    assert memory[3].weights_bytes == pytest.approx(2 * parameters / 8)


def test_overlapping_takes_another_bucket() -> None:
    """DeepSpeed fills one while the other is reduced. Our flat gradients have none, but stay whole."""
    fp32 = job(kernels=Kernels(4, on_gpu=True, checkpointing=False, attention="sdpa"), precision="fp32", batch=Pass(1, 64, 10, packed=False))
    alone, overlapping = (rank_memory(replace(fp32, overlaps=each), stage=1) for each in (False, True))
    assert overlapping.peak_bytes - alone.peak_bytes == 4 * 50_000_000
    flat = rank_memory(replace(fp32, has_flat_gradients=True), stage=1)
    assert flat.peak_bytes - alone.peak_bytes == 4 * (BASE.parameters - 50_000_000)


@pytest.mark.parametrize("stage", [2, 3])
def test_lamb_computes_all_updates_before_it_makes_one(stage: int) -> None:
    """Where the update is what takes most: of one rank, with few activations and a small bucket."""
    small = job(batch=Pass(1, 8, 1, packed=False), bucket_elements=1000, world_size=1)
    adam, lamb = (rank_memory(replace(small, has_updates=each), stage) for each in (False, True))
    assert lamb.peak_at == "step"
    assert adam.peak_bytes < lamb.peak_bytes <= adam.peak_bytes + 4 * BASE.parameters


def test_gloo_gathers_weights_into_a_copy() -> None:
    """On a CPU of two ranks; a rank that is alone gathers nothing."""
    cpu = job(kernels=Kernels(4, on_gpu=False, checkpointing=False, attention="eager"), batch=Pass(1, 8, 1, packed=False), precision="fp32")
    peaks = [rank_memory(replace(cpu, world_size=size, has_flat_gradients=True), stage=1).peak_bytes for size in (1, 2)]
    state = [4 * BASE.parameters * (2 + 3 / size) for size in (1, 2)]
    assert peaks[1] - state[1] >= 4 * BASE.parameters


def test_a_snapshot_has_the_size_of_a_checkpoint_s_files() -> None:
    """The files of a checkpoint of the demo, on two ranks at stage 2 in fp32: weights, and each rank's part of the optimizer."""
    weights, parts = 7_136_421, (10_689_293, 10_688_845)
    demo = Dimensions("bert", 4096, 2, 192, 3, 768, 128, 0.0, {})
    assert snapshot_bytes(demo, "fp32", 2, 2) == pytest.approx(weights + parts[0], rel=0.01)
    assert checkpoint_bytes(demo, "fp32", 2) == pytest.approx(weights + sum(parts), rel=0.01)


@pytest.mark.parametrize("stage", STAGES)
def test_the_largest_snapshot_is_at_most_the_checkpoint(stage: int) -> None:
    assert snapshot_bytes(BASE, "bf16", stage, 8) <= checkpoint_bytes(BASE, "bf16", stage) == pytest.approx(14 * BASE.parameters)
    assert checkpoint_bytes(BASE, "fp32", stage) == pytest.approx((12 if stage == 0 else 16) * BASE.parameters)


def test_a_heap_is_not_given_back() -> None:
    """What is kept all along leaves no holes in it."""
    small, large = Tensors.of(1000, 50), Tensors.of(LARGE_BYTES)
    assert peak_bytes(NOTHING, [small, large], on_gpu=True) == LARGE_BYTES
    assert peak_bytes(NOTHING, [small, large], on_gpu=False) == pytest.approx(HEAP_GROWTH * (LARGE_BYTES + 50_000))
    assert peak_bytes(small, [large], on_gpu=False) == pytest.approx(HEAP_GROWTH * LARGE_BYTES + 50_000)
    assert (small + large * 2).num_bytes == 50_000 + 2 * LARGE_BYTES
