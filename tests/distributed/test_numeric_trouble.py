"""The loop in numeric trouble, under each policy: what ranks hear, what is recorded, and the bits that the run ends with."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DivergedError, MaskwrightError, NumericTroubleError
from data_pipeline.storage import Location
from tests.support.batches import small_config
from tests.support.corpus import small_corpus
from tests.support.distributed import run_distributed
from tests.support.faults import NumericFault, install
from trainer.config import RunConfig, ValidationConfig
from trainer.context import LocalContext
from trainer.pretrain import pretrain
from trainer.runlog import RunFolder

STEPS, MICRO_BATCHES = 9, 4
STEP = 5
"""Where trouble strikes: micro-batch 22, on the second of two ranks. Checkpoints are committed after steps 2, 4, 6 and 8."""
FAULTY = STEP * MICRO_BATCHES + 2
NEVER = NumericFault("gradient", micro_batch=10**9)
EXACT = ("loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "grad_norm", "lr", "batch_digest")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def config_of(policy: str, stage: int = 1, **numerics: Any) -> RunConfig:
    return small_config(
        precision="bf16",
        zero={"stage": stage},
        model={"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 64, "dropout": 0.1},
        batch={"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 32},
        schedule={"steps": STEPS, "warmup_steps": 2},
        checkpoint={"every_steps": 2, "keep_last": 4},
        validation={"every_steps": 100, "micro_batches": 2},
        numerics={"policy": policy, **numerics},
    )


def attempts(rank: int, world_size: int, corpus: str, run: str, config: RunConfig, fault: NumericFault) -> list[MaskwrightError]:
    """Attempts as the launcher makes them: another one after each rewind. Returns what each but a finished one ended with."""
    install(fault)
    ends: list[MaskwrightError] = []
    for attempt in range(1, 9):
        try:
            pretrain(config, corpus, run, LocalContext(rank, world_size), attempt)
        except NumericTroubleError as error:
            ends.append(error)
        except MaskwrightError as error:
            return [*ends, error]
        else:
            return ends
    return ends


def several(rank: int, world_size: int, corpus: str, root: str, cases: dict[str, tuple[RunConfig, NumericFault]]) -> dict[str, list[MaskwrightError]]:
    return {name: attempts(rank, world_size, corpus, f"{root}/{name}", config, fault) for name, (config, fault) in cases.items()}


def ends_of(corpus: str, root: Path, cases: dict[str, tuple[RunConfig, NumericFault]]) -> dict[str, list[MaskwrightError]]:
    """What the ranks heard, which has to be the same on both."""
    heard = run_distributed(several, 2, (corpus, str(root), cases), timeout_s=170)
    said = [{name: [(type(end), end.cause, end.remedy) for end in ends] for name, ends in rank.items()} for rank in heard]
    assert said[0] == said[1]
    return heard[0]


def steps_of(run: Path) -> list[tuple[Any, ...]]:
    """The exact numbers of each step of the surviving history."""
    return [tuple(record[name] for name in EXACT) for record in RunFolder(Location.at(run)).read_metrics()]


def digests_of(run: Path) -> dict[str, str]:
    """Of each file of the last checkpoint, its sha256."""
    manifest = (Location.at(run) / "checkpoints" / f"step-{STEPS:08d}" / "MANIFEST.json").read_json()
    return {name: file["sha256"] for name, file in manifest["files"].items()}


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in RunFolder(Location.at(run)).read_events() if event["kind"] == kind]


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.full) for stage in (0, 2, 3))])
def test_a_transient_fault_leaves_no_trace_after_a_rewind(corpus: str, tmp_path: Path, stage: int) -> None:
    once = NumericFault("gradient", FAULTY, once=str(tmp_path / "fault-happened"))
    cases = {"undisturbed": (config_of("rewind:1", stage), NEVER), "struck": (config_of("rewind:1", stage), once)}
    ends = ends_of(corpus, tmp_path, cases)
    assert ends["undisturbed"] == []
    [end] = ends["struck"]
    assert isinstance(end, NumericTroubleError)
    assert end.cause == "the gradients of step 5 are not finite (norm inf) although its loss is; resuming from the checkpoint of step 4"
    assert (end.step, end.kind) == (STEP, "non_finite_gradients")
    assert steps_of(tmp_path / "struck") == steps_of(tmp_path / "undisturbed")
    assert digests_of(tmp_path / "struck") == digests_of(tmp_path / "undisturbed")
    [trouble] = events_of(tmp_path / "struck", "numeric_trouble")
    assert (trouble["step"], trouble["trouble"], trouble["policy"], trouble["micro_batches"]) == (STEP, end.kind, "rewind:1", [20, 23])
    [resumed] = events_of(tmp_path / "struck", "resumed")
    assert (resumed["step"], resumed["repeated"], resumed["skipped"], resumed["deliberately_skipped"]) == (4, 0, 0, [])
    assert resumed["rewound_from"] == STEP
    assert 0 < resumed["load_s"] < 60
    [continued] = events_of(tmp_path / "struck", "continued")
    assert (continued["step"], continued["same_step"], continued["relative_difference"]) == (4, True, 0.0)


@pytest.mark.parametrize("validation", [{"every_steps": STEP + 1, "micro_batches": 2}, {"every_steps": 100, "micro_batches": 2}])
def test_weights_that_a_machine_spoils_after_a_step_are_rewound(corpus: str, tmp_path: Path, validation: dict[str, int]) -> None:
    """Found by the validation that follows, or by the save."""
    rewinding, stopping = (config_of(policy).model_copy(update={"validation": ValidationConfig(**validation)}) for policy in ("rewind:1", "stop"))
    cases = {
        "undisturbed": (rewinding, NEVER),
        "struck": (rewinding, NumericFault("weights", FAULTY, once=str(tmp_path / "fault-happened"))),
        "stopped": (stopping, NumericFault("weights", FAULTY)),
    }
    ends = ends_of(corpus, tmp_path, cases)
    assert ends["undisturbed"] == []
    [end], [stopped] = ends["struck"], ends["stopped"]
    assert isinstance(end, NumericTroubleError)
    assert end.cause.startswith("the weights after step 5 give nothing finite (")
    assert end.cause.endswith("; resuming from the checkpoint of step 4")
    assert type(stopped) is DivergedError
    assert "its batch is micro-batches 20 to 23; numerics.policy is stop" in stopped.cause
    assert steps_of(tmp_path / "struck") == steps_of(tmp_path / "undisturbed")
    assert digests_of(tmp_path / "struck") == digests_of(tmp_path / "undisturbed")
    [trouble] = events_of(tmp_path / "struck", "numeric_trouble")
    assert (trouble["step"], trouble["trouble"], trouble["rewind_to"]) == (STEP, "non_finite_weights", 4)


def test_a_bad_batch(corpus: str, tmp_path: Path) -> None:
    """Skipped after one rewind, or at once, or the end, by policy; the data of its step is consumed and the others are the same."""
    bad = NumericFault("batch", FAULTY)
    cases = {
        "rewind": (config_of("rewind:2"), bad),
        "skip": (config_of("skip_batch"), bad),
        "stop": (config_of("stop"), bad),
        "budget": (config_of("rewind:1", budget=1), bad),
        "spike": (config_of("skip_batch", spike_threshold=50.0, spike_window=8), NumericFault("spike", FAULTY)),
    }
    ends = ends_of(corpus, tmp_path, cases)
    assert [type(end) for end in ends["rewind"]] == [NumericTroubleError]
    assert ends["skip"] == ends["spike"] == []
    for name, reason in (("stop", "numerics.policy is stop"), ("budget", "numerics.budget 1 is spent")):
        end = ends[name][-1]
        assert type(end) is DivergedError
        assert end.cause == f"the loss of step 5 is not finite (inf); its batch is micro-batches 20 to 23; {reason}"
        assert f"maskwright inspect {tmp_path / name / 'run.yaml'} --step 5" in end.remedy
    assert [event["response"] for event in events_of(tmp_path / "rewind", "numeric_trouble")] == ["rewind", "skip"]
    assert [event["rewind_to"] for event in events_of(tmp_path / "rewind", "numeric_trouble")] == [2, None]
    assert events_of(tmp_path / "rewind", "resumed")[0]["step"] == 2
    assert [event["trouble"] for event in events_of(tmp_path / "spike", "numeric_trouble")] == ["loss_spike"]
    for name in ("rewind", "skip", "spike"):
        [skipped] = events_of(tmp_path / name, "batch_skipped")
        assert (skipped["step"], skipped["micro_batches"]) == (STEP, [20, 23])
        state = (Location.at(tmp_path / name) / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_json()
        assert (state["skipped_steps"], state["micro_batches_consumed"]) == ([STEP], STEPS * MICRO_BATCHES)
    assert steps_of(tmp_path / "rewind") == steps_of(tmp_path / "skip")
    others = [[step for step in steps_of(tmp_path / name) if step[-1] != steps_of(tmp_path / name)[STEP][-1]] for name in ("skip", "spike")]
    assert others[0] == others[1], "whatever was wrong with the batch, the others saw the same weights"
