"""Numbers that go wrong in worker processes of a real run: what a machine got wrong leaves no bit behind, a bad batch is named."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import maskwright
from tests.support.faults import NumericFault, environment_of
from tests.support.outcomes import assert_same, events, metrics
from tests.support.tiny_run import STEPS, tiny_config, write_run

pytestmark = pytest.mark.timeout(600)

STEP = 13
"""Where trouble strikes; checkpoints are committed every 5 steps."""
PER_STEP = 8
FAULTY = STEP * PER_STEP + 6
"""A micro-batch of the second of two ranks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this module live; they share one corpus."""
    path = tmp_path_factory.mktemp("numeric")
    write_run(path, precision="bf16")
    batch = tiny_config()["batch"]
    assert batch["global_batch_size"] == PER_STEP * batch["micro_batch_size"]
    return path


def run(folder: Path, name: str, fault: NumericFault | None, *settings: str) -> tuple[int, str, Path]:
    """Exit code, output and run folder of a run with a fault in its worker processes."""
    overrides = [argument for setting in (f"name={name}", *settings) for argument in ("--set", setting)]
    environment = {} if fault is None else environment_of(fault)
    code, output = maskwright("run", "run.yaml", "--cluster", "cluster.yaml", *overrides, folder=folder, **environment)
    return code, output, folder / "storage" / name


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Callable[[int], Path]:
    """The run folder of an undisturbed run at a ZeRO stage; each is made once."""
    made: dict[int, Path] = {}

    def run_of(stage: int) -> Path:
        if stage not in made:
            code, output, made[stage] = run(folder, f"undisturbed-{stage}", None, f"zero.stage={stage}")
            assert code == 0, output
            assert not events(made[stage], "numeric_trouble")
        return made[stage]

    return run_of


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_machine_got_wrong_leaves_no_bit_behind(folder: Path, undisturbed: Callable[[int], Path], stage: int) -> None:
    once = NumericFault("gradient", FAULTY, once=str(folder / f"fault-{stage}-happened"))
    code, output, struck = run(folder, f"struck-{stage}", once, f"zero.stage={stage}")
    assert code == 0, output
    assert Path(once.once or "").exists()
    assert_same(struck, undisturbed(stage))
    [trouble], [resumed], [continued] = (events(struck, kind) for kind in ("numeric_trouble", "resumed", "continued"))
    assert (trouble["step"], trouble["trouble"], trouble["response"], trouble["rewind_to"]) == (STEP, "non_finite_gradients", "rewind", 10)
    assert trouble["micro_batches"] == [STEP * PER_STEP, STEP * PER_STEP + PER_STEP - 1]
    assert (resumed["step"], resumed["repeated"], resumed["skipped"]) == (10, 0, 0)
    assert (continued["step"], continued["same_step"], continued["relative_difference"]) == (10, True, 0.0)
    assert not events(struck, "batch_skipped")
    assert f"step {STEP}" in output


@pytest.mark.full
def test_a_bad_batch_is_skipped_after_one_rewind_and_named(folder: Path) -> None:
    code, output, struck = run(folder, "bad-batch", NumericFault("batch", FAULTY))
    assert code == 0, output
    assert [event["response"] for event in events(struck, "numeric_trouble")] == ["rewind", "skip"]
    [skipped] = events(struck, "batch_skipped")
    assert (skipped["step"], skipped["micro_batches"][0]) == (STEP, STEP * PER_STEP)
    assert sorted(metrics(struck)) == list(range(STEPS))
    assert metrics(struck)[STEP]["grad_norm"] is None
    assert f"the batch of step {STEP} (micro-batches 104 to 111) was skipped on purpose" in (struck / "report.html").read_text()


@pytest.mark.full
def test_a_bad_batch_stops_the_run_where_the_policy_says_so_and_inspect_shows_it(folder: Path) -> None:
    code, output, struck = run(folder, "stopped", NumericFault("batch", FAULTY), "numerics.policy=stop")
    assert code == 12, output
    assert f"the loss of step {STEP} is not finite" in output
    assert "micro-batches 104 to 111" in " ".join(output.split())
    code, text = maskwright("inspect", str(struck / "run.yaml"), "--step", str(STEP), "--json", folder=folder)
    assert code == 0, text
    code, output, struck = run(folder, "stopped", NumericFault("batch", FAULTY), "numerics.policy=skip_batch")
    assert code == 0, output
    assert [event["step"] for event in events(struck, "batch_skipped")] == [STEP]
