"""Whole runs through the command line on the embedded cluster: all stages, again, stopped, interrupted, diverged."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Command, maskwright, worker_pid
from tests.support.tiny_run import write_run, write_task, write_text

STEPS = 100
"""Some seconds of training, so that it can be interrupted."""

pytestmark = pytest.mark.timeout(600)
ON_CLUSTER = ["--cluster", "cluster.yaml"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.yaml, two source files (so that Ray Data has something to do in parallel) and a task."""
    path = tmp_path_factory.mktemp("run")
    text = write_text(path).read_text().splitlines(keepends=True)
    (path / "first.jsonl").write_text("".join(text[:150]))
    (path / "second.jsonl").write_text("".join(text[150:]))
    write_task(path)
    task = {"name": "words", "path": "task"}
    corpus = {"name": "tiny", "source": ["first.jsonl", "second.jsonl"], "validation_fraction": 0.1}
    write_run(
        path,
        corpus=corpus,
        schedule={"steps": STEPS, "warmup_steps": 5},
        finetune={"tasks": [task], "num_seeds": 2, "epochs": 2, "batch_size": 16, "lr": 1e-3, "max_length": 32},
    )
    (path / "trainer").mkdir()  # a folder of the user's that is called like ours must not be imported by workers
    (path / "trainer/__init__.py").write_text("raise ImportError('the wrong trainer')\n")
    return path


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def kinds(run: Path) -> list[str]:
    return [event["kind"] for event in events(run)]


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, str]:
    """A run of all stages: its folder and what the command printed."""
    code, output = maskwright("run", "run.yaml", *ON_CLUSTER, folder=folder)
    assert code == 0, output
    return folder / "storage/tiny", output


def test_all_stages_leave_what_they_promise(finished: tuple[Path, str], folder: Path) -> None:
    run, output = finished
    for stage in ("prepare", "pretrain", "export", "finetune", "report"):
        assert f"\n{stage}" in output
    assert f"step {STEPS}/{STEPS}" in output
    assert output.count("  starting 2 workers ...") == 2, "for pretraining and for fine-tuning"
    assert "next: " in output
    assert len(output.splitlines()) < 60, "a line for each stage and each tenth of training, not more"
    assert (run / "models/final/model.safetensors").is_file()
    assert (run / "finetune/words/results.json").is_file()
    assert (run / "report.html").is_file()
    assert (run / "logs/attempt-0001/rank-00001.log").is_file()
    assert not (run / "lease.json").exists()
    assert kinds(run)[-2:] == ["finished", "stage_finished"], "the report is written last, and says that the run finished"
    assert "TF-IDF" in output
    (corpus,) = (folder / "storage/corpora").glob("tiny-*")  # beside it, .cache has the digests of the sources
    assert (corpus / "corpus.json").is_file()
    code, output = maskwright("status", "tiny", "--storage", "storage", "--json", "--exit-code", folder=folder)
    status = json.loads(output)
    assert (code, status["state"], status["step"], status["last_checkpoint"]) == (0, "finished", STEPS, STEPS)
    assert set(status["stages"]) == {"prepare", "pretrain", "export", "finetune", "report"}


def test_running_it_again_does_nothing(finished: tuple[Path, str], folder: Path) -> None:
    run, _ = finished
    before = {path: path.stat().st_mtime_ns for name in ("checkpoints", "models", "finetune") for path in (run / name).rglob("*") if path.is_file()}
    code, output = maskwright("run", "run.yaml", *ON_CLUSTER, folder=folder)
    assert code == 0, output
    assert output.count("skipped") == 5, output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [event for event in events(run) if event["kind"] == "attempt_started" and event["attempt"] > 2] == []


def test_inspect_says_what_was_trained_on(finished: tuple[Path, str], folder: Path) -> None:
    run, _ = finished
    trained = [json.loads(line)["batch_digest"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    for world_size in ("1", "3"):
        code, output = maskwright(
            "inspect", str(run / "run.yaml"), "--step", "0", "--steps", str(STEPS), "--world-size", world_size, "--json", folder=folder
        )
        assert code == 0, output
        assert [json.loads(line)["digest"] for line in output.splitlines()] == trained


def test_evaluate_repeats_the_recorded_score(finished: tuple[Path, str], folder: Path) -> None:
    run, _ = finished
    code, output = maskwright("evaluate", "tiny", "--storage", "storage", "--json", folder=folder)
    assert code == 0, output
    (score,) = json.loads(output.splitlines()[-1])
    results = json.loads((run / "finetune/words/results.json").read_text())
    assert score["num_rows"] == results["num_rows"]["test"]
    assert 0 <= score["accuracy"] <= 1


@pytest.mark.full
def test_profiling_shows_what_steps_cost_and_leaves_the_run_as_it_is(finished: tuple[Path, str], folder: Path) -> None:
    run, _ = finished

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and "profile" not in path.parts}

    before = files()
    code, output = maskwright("profile", "tiny", "--steps", "3", "--storage", "storage", folder=folder)
    assert code == 0, output
    assert f"3 steps from step {STEPS - 3} on with the weights of step {STEPS}: 2 ranks" in output
    assert "next: maskwright report tiny --storage storage" in output
    assert files() == before
    found = json.loads((run / "profile/profile.json").read_text())
    assert (found["world_size"], found["num_steps"]) == (2, 3)
    assert len(found["costs"]) > 10
    assert Path(found["trace"]).is_file()
    assert not (run / "profile/lease.json").exists()


def test_ctrl_c_saves_and_the_run_is_resumed_from_there(folder: Path, finished: tuple[Path, str]) -> None:
    """Also: while it runs, a second command is refused; of two that resume it at once one does, to the bits of the undisturbed run."""
    run = folder / "storage/interrupted"
    arguments = ["run", "run.yaml", *ON_CLUSTER, "--set", "name=interrupted", "--set", "finetune.tasks=[]", "--set", "checkpoint.every_steps=1000"]
    command = Command(arguments, folder).start()
    try:
        command.wait_until(lambda: (run / "lease.json").exists() and (run / "run.yaml").exists())
        others = [Command(words, folder).start() for words in (arguments, ["resume", "interrupted", "--storage", "storage"])]
        assert [other.wait() for other in others] == [8, 8], [other.text() for other in others]
        command.wait_until(lambda: steps_done(run) >= 1)
        os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does: to every process in the foreground
        assert command.wait() == 130, command.text()
        command.wait_until_gone()
    finally:
        command.kill_everything()
    assert kinds(run)[-1] == "stopped"
    (stopped,) = [event["step"] for event in events(run) if event["kind"] == "checkpoint_committed"]
    said = command.text()
    assert "saving what was trained" in said
    assert f"\ninterrupted: stopped at step {stopped} on request; it is saved\nContinue with `maskwright resume" in said
    assert 1 <= stopped < STEPS
    assert maskwright("status", "interrupted", "--storage", "storage", "--exit-code", folder=folder)[0] == 75
    both = [Command(["resume", "interrupted", "--storage", "storage"], folder).start() for _ in range(2)]
    try:
        assert sorted(one.wait() for one in both) == [0, 8], [one.text() for one in both]
    finally:
        for one in both:
            one.kill_everything()
    (resumed,) = [event for event in events(run) if event["kind"] == "resumed"]
    assert (resumed["step"], resumed["steps_lost"], resumed["repeated"]) == (stopped, 0, 0)
    weights = "models/final/model.safetensors"
    assert (run / weights).read_bytes() == (finished[0] / weights).read_bytes()


def wakes_per_s(pid: int) -> float:
    """How often the first thread of a process goes to sleep and wakes, over two seconds."""

    def wakes() -> int:
        lines = Path(f"/proc/{pid}/task/{pid}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("voluntary_ctxt_switches")))

    before = wakes()
    time.sleep(2)
    return (wakes() - before) / 2


@pytest.mark.full
@pytest.mark.parametrize(("flags", "saved"), [([], True), (["--now"], False)])
def test_stop_ends_the_run(flags: list[str], saved: bool, folder: Path) -> None:
    name = f"stopped-{saved}"
    run = folder / "storage" / name
    settings = ["--set", f"name={name}", "--set", "finetune.tasks=[]", "--set", "checkpoint.every_steps=100000", "--set", "schedule.steps=100000"]
    command = Command(["run", "run.yaml", *ON_CLUSTER, *settings], folder).start()
    try:
        command.wait_until(lambda: steps_done(run) >= 3)
        rank = worker_pid(run, attempt=1, rank=1)
        assert b"glibc.malloc.mmap_max=0" in Path(f"/proc/{rank}/environ").read_bytes(), "the C library reads it when the process starts"
        assert wakes_per_s(rank) < 40, "a thread of Ray's that has nothing to do wakes a hundred times a second"
        code, output = maskwright("stop", name, "--storage", "storage", *flags, folder=folder)
        assert code == 0, output
        assert command.wait(30) == 75, command.text()
    finally:
        command.kill_everything()
    assert ((run / "checkpoints").exists() and any((run / "checkpoints").glob("step-*/MANIFEST.json"))) == saved
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert kinds[-1] == "stopped"
    assert not {"worker_failed", "rank_unhealthy", "failed"} & set(kinds), "workers that went with Ray have not failed"
    assert maskwright("status", name, "--storage", "storage", "--exit-code", folder=folder)[0] == 75


@pytest.mark.full
def test_pretraining_continues_from_an_export_on_a_mixture_of_corpora_in_packed_rows(finished: tuple[Path, str], folder: Path) -> None:
    """A whole run from the exported model, with its tokenizer: its first loss is near the last one of the run before."""
    export = "storage/tiny/models/final"
    parts = [{"weight": weight, "corpus": {"source": name, "validation_fraction": 0.1}} for name, weight in (("first.jsonl", 3), ("second.jsonl", 1))]
    write_run(
        folder / "continued",
        corpus={},
        mixture=[{**part, "corpus": {**part["corpus"], "source": f"../{part['corpus']['source']}"}} for part in parts],
        name="continued",
        storage="../storage",
        tokenizer={"path": f"../{export}"},
        model={"init_from": f"../{export}"},
        objective={"mask_unit": "whole_word", "sentence_objective": "sop"},
        batch={"global_batch_size": 32, "micro_batch_size": 8, "sequence_length": 64, "packing": "rows"},
        schedule={"steps": 10, "warmup_steps": 2},
    )
    code, output = maskwright("run", "run.yaml", *ON_CLUSTER, folder=folder / "continued")
    assert code == 0, output
    run = folder / "storage/continued"
    losses, earlier = ([json.loads(line)["mlm_loss"] for line in (each / "metrics.jsonl").read_text().splitlines()] for each in (run, finished[0]))
    assert losses[0] < (earlier[0] + earlier[-1]) / 2
    lineage = json.loads((run / "models/final/lineage.json").read_text())
    assert lineage["tokenizer_digest"] == json.loads((finished[0] / "models/final/lineage.json").read_text())["tokenizer_digest"]
    assert Path(next(event["corpus"] for event in events(run) if "corpus" in event)).name.startswith("mixture-")
    assert "mixture" in (run / "report.html").read_text()


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_process_group_saves(number: signal.Signals, folder: Path) -> None:
    run = folder / "storage" / number.name
    settings = [
        "--set",
        f"name={number.name}",
        "--set",
        "finetune.tasks=[]",
        "--set",
        "checkpoint.every_steps=100000",
        "--set",
        "schedule.steps=100000",
    ]
    command = Command(["run", "run.yaml", *ON_CLUSTER, *settings], folder).start()
    try:
        command.wait_until(lambda: steps_done(run) >= 3)
        os.killpg(command.process.pid, number)  # as batch systems and closed terminals do; Ray's processes are not meant
        assert command.wait(60) == 75, command.text()
        command.wait_until_gone()
    finally:
        command.kill_everything()
    assert len([event for event in events(run) if event["kind"] == "checkpoint_committed"]) == 1
    assert kinds(run)[-1] == "stopped"


@pytest.mark.full
def test_divergence_is_tried_again_once_and_ends_the_run(folder: Path) -> None:
    settings = ["--set", "name=diverged", "--set", "optimizer.lr=1e30", "--set", "precision=fp32"]
    code, output = maskwright("run", "run.yaml", *ON_CLUSTER, *settings, folder=folder)
    assert code == 12, output
    run = folder / "storage/diverged"
    assert kinds(run).count("attempt_started") == 2
    assert kinds(run)[-1] == "failed"
    assert maskwright("status", "diverged", "--storage", "storage", "--exit-code", folder=folder)[0] == 12


@pytest.mark.full
def test_more_steps_are_a_deliberate_change(folder: Path, finished: tuple[Path, str]) -> None:
    settings = ["--set", "name=longer", "--set", "finetune.tasks=[]", "--set", "schedule.kind=constant"]
    code, output = maskwright("run", "run.yaml", *ON_CLUSTER, *settings, folder=folder)
    assert code == 0, output
    more = ["--set", f"schedule.steps={STEPS + 10}"]
    assert maskwright("run", "run.yaml", *ON_CLUSTER, *settings, *more, folder=folder)[0] == 3
    code, output = maskwright("resume", "longer", "--storage", "storage", *more, folder=folder)
    assert code == 0, output
    run = folder / "storage/longer"
    (change,) = [event for event in events(run) if event["kind"] == "config_changed"]
    assert (change["path"], change["before"], change["after"]) == ("schedule.steps", STEPS, STEPS + 10)
    assert (run / f"checkpoints/step-{STEPS + 10:08d}/MANIFEST.json").exists()
    exported = [event["exported_step"] for event in events(run) if event["kind"] == "stage_finished" and event["stage"] == "export"]
    assert exported == [STEPS, STEPS + 10]


@pytest.mark.full
def test_retries_are_spent(folder: Path) -> None:
    """A worker that dies at every attempt before the first checkpoint ends the run with exit code 11."""
    (folder / "frail.yaml").write_text((folder / "cluster.yaml").read_text() + "max_failures: 1\n")
    run = folder / "storage/frail"
    settings = ["--set", "name=frail", "--set", "finetune.tasks=[]", "--set", "checkpoint.every_steps=100000", "--set", "schedule.steps=100000"]
    command = Command(["run", "run.yaml", "--cluster", "frail.yaml", *settings], folder).start()
    try:
        for attempt in (1, 2):
            command.wait_until(lambda attempt=attempt: worker_pid(run, attempt, 0) is not None, timeout_s=240)
            pid = worker_pid(run, attempt, 0)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        assert command.wait() == 11, command.text()
    finally:
        command.kill_everything()
    assert kinds(run).count("worker_failed") == 2
