"""Profiling steps of a real run on real ranks: what it says, and that it leaves the run as it is."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from data_pipeline.errors import InterruptedRunError, MaskwrightError, NoCheckpointError
from data_pipeline.storage import Location
from launcher.lease import PROFILE_FOLDER
from launcher.profiling import PROFILE, RESULT
from launcher.worker_process import WorkerTask, run_task
from tests.support.batches import small_config
from tests.support.contexts import StoppingContext
from tests.support.corpus import small_corpus
from tests.support.distributed import run_distributed
from trainer import profiling
from trainer.config import RunConfig
from trainer.context import LocalContext
from trainer.pretrain import pretrain
from trainer.profiling import profile_steps
from trainer.runlog import RunFolder

STEPS = 6


def config_of(stage: int, precision: str = "fp32") -> RunConfig:
    return small_config(
        zero={"stage": stage},
        precision=precision,
        batch={"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 32},
        schedule={"steps": STEPS, "warmup_steps": 2},
        checkpoint={"every_steps": 4},
        validation={"every_steps": 100, "micro_batches": 1},
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its profile."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and "profile" not in path.parts}


def profiled(context: LocalContext, config: RunConfig, corpus: str, run: str, name: str, steps: int = 2) -> MaskwrightError | None:
    try:
        profile_steps(config, corpus, run, f"{run}/profile/{name}", steps, context, 1)
    except MaskwrightError as error:
        return error
    return None


def profiles(rank: int, world_size: int, corpus: str, root: str) -> dict[str, MaskwrightError | None]:
    """Of a finished run under ZeRO 1, of one that has taken no step and is to choose its precision, at ZeRO 3; and what cannot be profiled."""
    context = LocalContext(rank, world_size)
    pretrain(config_of(1), corpus, f"{root}/done", context, 1)
    dist.barrier()  # rank 0 is the last to close its files
    before = contents(Path(root) / "done")
    found = {"done": profiled(context, config_of(1), corpus, f"{root}/done", "first")}
    assert contents(Path(root) / "done") == before
    profiling._LARGE_BYTES = 1000
    found["other layout"] = profiled(context, config_of(2), corpus, f"{root}/done", "first")
    found["fresh"] = profiled(context, config_of(3, "auto"), corpus, f"{root}/fresh", "first", steps=STEPS - 1)
    found["stopped"] = profiled(StoppingContext(rank, world_size, at=1), config_of(1), corpus, f"{root}/fresh", "stopped")
    if rank == 0:
        for path in (Path(root) / "done/checkpoints").rglob("*.pt"):
            path.write_bytes(b"damaged")
    dist.barrier()
    before = contents(Path(root) / "done")
    found["damaged"] = profiled(context, config_of(1), corpus, f"{root}/done", "damaged")
    assert contents(Path(root) / "done") == before, "what is damaged stays where it is"
    return found


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, MaskwrightError | None]]]:
    root = tmp_path_factory.mktemp("profiling")
    return root, run_distributed(profiles, 2, (small_corpus(root), str(root)), timeout_s=110)


def result(root: Path, run: str) -> dict[str, Any]:
    return (Location.at(root) / run / "profile" / "first" / "profile.json").read_json()


def test_the_largest_costs_and_the_phases_add_up(heard: tuple[Path, Any]) -> None:
    found = result(heard[0], "fresh")
    assert (found["checkpoint_step"], found["first_step"], found["num_steps"], found["world_size"]) == (None, 1, STEPS - 1, 2)
    assert (found["zero_stage"], found["device"], found["costs_of"]) == (3, "cpu", "cpu")
    assert found["precision"] in {"bf16", "fp32"}
    seconds = [cost["seconds"] for cost in found["costs"]]
    assert seconds == sorted(seconds, reverse=True)
    assert sum(cost["share"] for cost in found["costs"]) == pytest.approx(1.0)
    names = {cost["name"] for cost in found["costs"]}
    assert {"aten::addmm", "Python and waiting in agree", "Python and waiting in backward"} <= names
    calls = {cost["name"]: cost["calls"] for cost in found["costs"]}
    assert calls["Python and waiting in forward"] == 2 * (STEPS - 1), "the warm-up is not counted"
    phases = {phase["phase"]: phase for phase in found["phases"]}
    assert set(phases) == {"data", "agree", "forward", "backward", "reduce", "optimizer"}
    assert phases["reduce"]["seconds"] is None, "at stage 3 it cannot be told"
    assert sum(phase["seconds"] or 0.0 for phase in phases.values()) == pytest.approx(found["step_s"])
    assert 0.5 < sum(seconds) / (found["step_s"] * found["num_steps"]) < 1.5


def test_a_finished_run_is_profiled_in_its_last_steps_and_at_another_layout(heard: tuple[Path, Any]) -> None:
    """The second profile replaces the first, whose trace was small."""
    found = result(heard[0], "done")
    assert (found["checkpoint_step"], found["first_step"], found["zero_stage"]) == (STEPS, STEPS - 2, 2)
    assert [path.name for path in sorted((heard[0] / "done/profile/first").iterdir())] == ["profile.json", "trace.json.gz"]
    trace = json.loads(gzip.decompress((heard[0] / "done/profile/first/trace.json.gz").read_bytes()))
    labels = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("phase: ")}
    assert labels == {f"phase: {name}" for name in ("data", "agree", "forward", "backward", "reduce", "optimizer")}


def as_a_task(rank: int, world_size: int, corpus: str, root: str) -> None:
    """As a worker process does it: in a thread, told what to do by name, with a log of its own."""
    run, profile = RunFolder(Location.at(root)), RunFolder(Location.at(root) / PROFILE_FOLDER)
    arguments = {"config": config_of(0), "corpus": corpus, "run": run.root.url, "output": profile.root.url, "steps": 2, "attempt": 1}
    task = WorkerTask(PROFILE, arguments, profile.root.url, attempt=1, threads=1, home=root)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(run_task, task, rank, world_size, lambda: True).result()


def test_a_worker_process_profiles_and_leaves_its_log_with_the_profile(tmp_path: Path) -> None:
    corpus, run = small_corpus(tmp_path / "text"), tmp_path / "run"
    run.mkdir()
    run_distributed(as_a_task, 1, (corpus, str(run)), timeout_s=60)
    assert [path.name for path in run.iterdir()] == [PROFILE_FOLDER]
    assert sorted(path.name for path in (run / PROFILE_FOLDER).iterdir()) == ["logs", "profile.json", "trace.json"]
    assert "trainer.profiling:profile_steps" in (run / PROFILE_FOLDER / "logs/attempt-0001/rank-00000.log").read_text()
    found = json.loads((run / PROFILE_FOLDER / RESULT).read_text())
    assert found["trace"] == str(run / PROFILE_FOLDER / "trace.json")
    assert {phase["phase"] for phase in found["phases"]} == {"data", "agree", "forward", "backward", "reduce", "optimizer"}
    assert {"aten::addmm", "Python and waiting in reduce"} <= {cost["name"] for cost in found["costs"]}


def test_what_cannot_be_profiled_says_why_on_every_rank_and_nothing_else_is_left_behind(heard: tuple[Path, Any]) -> None:
    root, ranks = heard
    for found in ranks:
        assert [found[name] for name in ("done", "other layout", "fresh")] == [None, None, None]
        assert isinstance(found["stopped"], InterruptedRunError)
        assert isinstance(found["damaged"], NoCheckpointError)
    assert [path.name for path in (root / "fresh").iterdir()] == ["profile"]
    assert sorted(path.name for path in (root / "fresh/profile").iterdir()) == ["first"]
