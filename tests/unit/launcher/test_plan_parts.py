"""The arithmetic of a plan."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import BatchConfig, ObjectiveConfig, PhaseConfig
from data_pipeline.order import micro_steps, rank_micro_batches
from launcher.history import Attempt, History
from launcher.plan_checkpoints import checkpoint_plan, daly_interval_s, kept_steps
from launcher.plan_time import Stated, cost, duration, measured_speed
from launcher.plan_work import MeanSample, PhaseWork, total_tokens, world_size_of, world_sizes
from trainer.config import CheckpointConfig, RunConfig
from trainer.dimensions import Dimensions
from trainer.retention import superfluous

NETWORK = Dimensions("bert", 30522, 2, 64, 2, 256, 512, 0.1, {})


def run_config(steps: int = 40, **batch: object) -> RunConfig:
    usual = {"global_batch_size": 64, "micro_batch_size": 8, "sequence_length": 128, **batch}
    schedule = {"steps": steps, "warmup_steps": 0}
    return RunConfig.model_validate({"name": "a", "batch": usual, "schedule": schedule, "checkpoint": {"every_steps": 10}})


def work_of(config: RunConfig, tokens: float = 100.0, *, is_bound: bool = False) -> list[PhaseWork]:
    return [PhaseWork.of(phase, MeanSample(tokens, is_bound=is_bound), config.objective) for phase in config.phases]


batches = st.builds(
    lambda first, second: BatchConfig(
        global_batch_size=8 * first, micro_batch_size=8, sequence_length=64, phases=(PhaseConfig(from_step=3, global_batch_size=8 * second),)
    ),
    st.integers(1, 300),
    st.integers(1, 300),
)


@given(batches, st.integers(1, 40))
def test_waste_is_what_the_ranks_really_do_not_have(batch: BatchConfig, num_ranks: int) -> None:
    """By the trainer's own division of micro-batches among ranks, step by step."""
    phases = batch.phases_until(7)
    done = taken = 0
    for phase in phases:
        for _ in range(phase.num_steps):
            done += sum(len(rank_micro_batches(phase.num_micro_batches, rank, num_ranks)) for rank in range(num_ranks))
            taken += num_ranks * micro_steps(phase.num_micro_batches, num_ranks)
    found = world_size_of(num_ranks, phases)
    assert found.waste == pytest.approx(1 - done / taken)
    assert 0 <= found.waste < 1


@given(batches)
def test_sizes_are_those_that_shorten_a_step(batch: BatchConfig) -> None:
    phases = batch.phases_until(7)
    found = {size.world_size for size in world_sizes(phases, chosen=1)}
    counts = {phase.num_micro_batches for phase in phases}
    largest = max(counts)
    wanted = {size for size in range(2, largest + 1) if any(micro_steps(count, size) < micro_steps(count, size - 1) for count in counts)}
    assert found == wanted | {1}


def test_tokens_are_those_of_all_phases() -> None:
    config = run_config(steps=10, phases=[{"from_step": 4, "global_batch_size": 128}])
    assert total_tokens(work_of(config)) == 4 * 64 * 100 + 6 * 128 * 100
    causal = PhaseWork.of(config.phases[0], MeanSample(100.0, is_bound=False), ObjectiveConfig.model_validate("clm"))
    assert causal.masked == 64 * 99


@given(st.floats(0.01, 100), st.floats(3600, 1e6))
def test_the_interval_loses_less_than_others(stall_s: float, mtbf_s: float) -> None:
    """Daly's equation 20: the time that a run of solve time 1 takes with checkpoints every tau, restarts left out."""

    def wall(tau: float) -> float:
        return mtbf_s * (math.exp((tau + stall_s) / mtbf_s) - 1) / tau

    best = daly_interval_s(stall_s, mtbf_s)
    assert best == pytest.approx(math.sqrt(2 * stall_s * mtbf_s), rel=0.3)  # Young
    assert wall(best) <= min(wall(best * 0.8), wall(best * 1.25))


@given(
    st.builds(CheckpointConfig, every_steps=st.integers(1, 20), keep_last=st.integers(1, 5), keep_every=st.none() | st.integers(1, 40)),
    st.integers(1, 200),
)
def test_what_is_kept_is_what_the_trainer_keeps(config: CheckpointConfig, num_steps: int) -> None:
    committed: dict[int, float | None] = {}
    for step in [*range(config.every_steps, num_steps, config.every_steps), num_steps]:
        committed[step] = None
        for removed in superfluous(committed, step, config):
            del committed[removed]
    assert kept_steps(config, num_steps) == set(committed)


def test_a_checkpoint_plan_says_what_it_lacks() -> None:
    config = CheckpointConfig(every_steps=10)
    usual = {"stall_s": 0.5, "stall_basis": "assumed", "step_s": 0.1, "failures_per_day": 2.0}
    found = checkpoint_plan(config, 10_000, 1000, **usual)
    assert (found.number, found.kept, found.kept_bytes) == (1000, 3, 3000)
    assert found.best_every_steps == round(daly_interval_s(0.5, 43200) / 0.1)
    for missing, said in (("failures_per_day", "--failures-per-day"), ("step_s", "a step takes"), ("stall_s", "a checkpoint takes")):
        found = checkpoint_plan(config, 10_000, 1000, **{**usual, missing: None})
        assert found.best_every_steps is None
        assert said in found.best_basis
    assert "nothing would be lost" in checkpoint_plan(config, 10_000, 1000, **{**usual, "failures_per_day": 0.0}).best_basis


def records(num_steps: int, *, rank_passes_s: float, beside_s: float) -> list[dict[str, float]]:
    """Steps whose first takes ten times as long."""
    return [
        {
            "step": step,
            "attempt": 1,
            "time": 1000.0 + step,
            "step_s": (rank_passes_s + beside_s) * (10 if step == 0 else 1),
            "forward_s": rank_passes_s / 3,
            "backward_s": rank_passes_s * 2 / 3,
            "checkpoint_stall_s": 0.25 if step % 10 == 9 else 0.0,
            "validation_s": 0.0,
        }
        for step in range(num_steps)
    ]


def attempt(world_size: int, num_steps: int) -> Attempt:
    return Attempt(1, world_size, 1, "cpu", 985.0, 990.0, None, "running", "", None, 0, num_steps - 1, grew=False)


def test_hours_of_the_same_run_are_those_of_its_steps() -> None:
    config = run_config(steps=1000)
    history = History.of(records(30, rank_passes_s=0.6, beside_s=0.1), [])
    speed = measured_speed("before", history, [attempt(2, 30)], work_of(config), NETWORK)
    assert speed is not None
    found = duration(config, work_of(config), NETWORK, 2, Stated(), speed, None)
    assert found.step_s == pytest.approx(0.7)
    assert found.hours == pytest.approx((1000 * 0.7 + 100 * 0.25 + speed.start_up_s) / 3600)
    assert "measured" in found.basis


def test_passes_grow_with_the_batch_and_shrink_with_the_ranks() -> None:
    history = History.of(records(30, rank_passes_s=0.6, beside_s=0.1), [])
    speed = measured_speed("before", history, [attempt(2, 30)], work_of(run_config()), NETWORK)
    larger = run_config(global_batch_size=128)
    assert duration(larger, work_of(larger), NETWORK, 2, Stated(), speed, None).step_s == pytest.approx(1.3)
    assert duration(run_config(), work_of(run_config()), NETWORK, 4, Stated(), speed, None).step_s == pytest.approx(0.4)
    assert duration(run_config(), work_of(run_config()), NETWORK, 5, Stated(), speed, None).step_s == pytest.approx(0.4)


def test_the_ranks_it_was_measured_on_are_said() -> None:
    history, config = History.of(records(30, rank_passes_s=0.6, beside_s=0.1), []), run_config()
    by_size = {size: measured_speed("before", history, [attempt(size, 30)], work_of(config), NETWORK) for size in (1, 2)}
    said = {size: duration(config, work_of(config), NETWORK, 4, Stated(), speed, None).basis for size, speed in by_size.items()}
    assert "on 1 rank, which neither exchanged gradients nor shared the machine" in said[1]
    assert said[2].endswith("of run before on 2 ranks")


def test_too_few_steps_say_nothing() -> None:
    history = History.of(records(4, rank_passes_s=0.6, beside_s=0.1), [])
    assert measured_speed("before", history, [attempt(2, 4)], work_of(run_config()), NETWORK) is None
    assert measured_speed("before", History.of([], []), [], work_of(run_config()), NETWORK) is None


def test_what_is_stated_counts_before_what_was_measured() -> None:
    config = run_config(steps=100)
    found = duration(config, work_of(config), NETWORK, 1, Stated(tokens_per_s=6400.0), None, None)
    assert found.hours == pytest.approx(100 / 3600)
    by_mfu = duration(config, work_of(config), NETWORK, 4, Stated(mfu=0.5), None, 1e12)
    flops = sum(part.flops_of_step(NETWORK.flops) * part.phase.num_steps for part in work_of(config))
    assert by_mfu.hours == pytest.approx(flops / (4 * 0.5e12) / 3600)
    assert duration(config, work_of(config), NETWORK, 4, Stated(mfu=0.5), None, None).hours is None
    assert duration(config, work_of(config), None, 4, Stated(), None, None).hours is None


@pytest.mark.parametrize("stated", [Stated(mfu=0.5), Stated(tokens_per_s=6400.0)])
def test_a_stated_rate_over_full_rows_says_at_most(stated: Stated) -> None:
    config = run_config(steps=100)
    known, bound = (duration(config, work_of(config, is_bound=each), NETWORK, 1, stated, None, 1e12) for each in (False, True))
    assert (known.is_bound, bound.is_bound) == (False, True)
    assert bound.basis == f"{known.basis}; at most: every row counts as full"


def test_cost() -> None:
    assert cost(2.0, 8, Stated(price_per_hour=3.0)) == (48.0, None)
    assert cost(2.0, 8, Stated()) == (None, "no --price-per-hour")
    assert cost(None, 8, Stated(price_per_hour=3.0)) == (None, "hours are not known")


def test_values_are_plain_numbers() -> None:
    """NumPy's own types cannot be written as JSON."""
    history = History.of(records(30, rank_passes_s=0.6, beside_s=0.1), [])
    speed = measured_speed("before", history, [attempt(2, 30)], work_of(run_config()), NETWORK)
    assert speed is not None
    assert not any(isinstance(value, np.generic) for value in vars(speed).values())
