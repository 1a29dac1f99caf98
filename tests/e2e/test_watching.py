"""A run is watched from outside: Prometheus, a tracker of accelerate, and every verb's answer for programs."""

import json
import os
import re
import shutil
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.support import trackio_package
from tests.support.answers import require_documented
from tests.support.commands import Command, maskwright
from tests.support.tiny_run import CLUSTER, STEPS, write_run, write_task

pytestmark = [pytest.mark.timeout(900), pytest.mark.full]
IN_STORAGE = ["--storage", "storage"]


def watched(folder: Path, *arguments: str) -> Command:
    """A command in whose environment a tracker is installed, and whose metrics Ray passes on every second."""
    packages = os.pathsep.join([str(folder / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONPATH": packages, "TRACKIO_STAND_IN": str(folder / "trackio.jsonl"), "RAY_metrics_report_interval_ms": "1000"}
    return Command(list(arguments), folder, environment)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run of all stages that was scraped: its folder, what the command printed, and Ray's page of metrics."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "packages").mkdir()
    shutil.copyfile(trackio_package.__file__, folder / "packages/trackio.py")
    write_task(folder)
    finetune = {"tasks": [{"name": "words", "path": "task"}], "num_seeds": 1, "epochs": 1, "batch_size": 16, "max_length": 32}
    write_run(folder, finetune=finetune, tracking={"trackers": ["tensorboard", "trackio"], "project": "tiny models"})
    (folder / "cluster.yaml").write_text(yaml.safe_dump({**CLUSTER, "metrics": True}))
    command = watched(folder, "run", "run.yaml", "--cluster", "cluster.yaml", "--json").start()
    found: list[str] = []

    def scraped() -> bool:
        time.sleep(0.5)
        if address := re.search(r"metrics for Prometheus: (http://\S+)", command.text()):
            with suppress(OSError), urllib.request.urlopen(address[1], timeout=60) as answer:  # an agent without a CPU answers late, or not
                found.append(answer.read().decode())
        return bool(found) and f"step {float(STEPS)}" in _values(found[-1])

    try:
        command.wait_until(scraped, 300)
        assert command.wait(300) == 0, command.text()
    finally:
        command.kill_everything()
    return folder, command.text(), found[-1]


def _values(page: str) -> str:
    """`step 30.0` and so on, a line each: the metrics of the run, by the end of their names."""
    lines = re.findall(r'^ray_maskwright_(\w+)\{[^}]*run="tiny"[^}]*\} (\S+)$', page, re.MULTILINE)
    return "\n".join(f"{name} {value}" for name, value in lines)


def test_prometheus_reads_where_the_run_is(finished: tuple[Path, str, str]) -> None:
    folder, _, page = finished
    values = dict(line.split() for line in _values(page).splitlines())
    assert {"step", "attempts", "failures", "last_checkpoint", "loss", "mlm_loss", "nsp_loss", "grad_norm", "lr", "tokens_per_s", "mfu"} <= set(
        values
    )
    assert {"data_wait_s_total", "checkpoint_stall_s_total"} <= set(values)
    assert (float(values["attempts"]), float(values["failures"])) == (1, 0)
    assert float(values["last_checkpoint"]) % 5 == 0
    last = json.loads((folder / "storage/tiny/metrics.jsonl").read_text().splitlines()[-1])
    assert float(values["loss"]) == pytest.approx(last["loss"])


def test_a_tracker_of_accelerate_hears_every_step(finished: tuple[Path, str, str]) -> None:
    folder, _, _ = finished
    (_, init), _, *told = [json.loads(line) for line in (folder / "trackio.jsonl").read_text().splitlines()]
    assert init["project"] == "tiny models"
    assert [step for _, (step, values) in told[:-1] if "train/loss" in values] == list(range(STEPS))
    assert [step for _, (step, values) in told[:-1] if "validation/mlm_loss" in values] == [15, 30]
    assert told[-1][0] == "finish"
    events = (folder / "storage/tiny/events.jsonl").read_text()
    assert "tracker_failed" not in events


def test_every_verb_answers_as_documented(finished: tuple[Path, str, str]) -> None:
    folder, output, _ = finished
    (status,) = require_documented("run", output)
    assert (status["state"], status["step"]) == ("finished", STEPS)
    (corpus,) = (folder / "storage/corpora").glob("tiny-*")
    run = folder / "storage/tiny"
    for arguments in (
        ["prepare", "run.yaml", "--cluster", "cluster.yaml"],
        ["inspect", "run.yaml", "--step", "0", "--steps", "2", "--text", "1"],
        ["list", *IN_STORAGE],
        ["status", "tiny", *IN_STORAGE],
        ["logs", "tiny", *IN_STORAGE],
        ["export", "tiny", "--step", "25", *IN_STORAGE],
        ["evaluate", "tiny", *IN_STORAGE],
        ["evaluate", "tiny", "--text", "Karen [MASK].", *IN_STORAGE],
        ["report", "tiny", *IN_STORAGE],
        ["report", str(corpus)],
        ["verify", str(corpus)],
        ["verify", str(run / "checkpoints" / f"step-{STEPS:08d}")],
        ["verify", str(run / "models/final")],
        ["clean", *IN_STORAGE],
        ["plan", "run.yaml"],
        ["profile", "tiny", "--steps", "1", "--cluster", "cluster.yaml", *IN_STORAGE],
        ["doctor", *IN_STORAGE],
        ["finetune", "tiny", "--set", "finetune.epochs=2", "--cluster", "cluster.yaml", *IN_STORAGE],
    ):
        code, printed = maskwright(*arguments, "--json", folder=folder)
        assert code == 0, f"{arguments}\n{printed}"
        require_documented(arguments[0], printed)


def test_resume_and_stop_answer_as_documented(finished: tuple[Path, str, str]) -> None:
    folder, _, _ = finished
    steps = ["--set", "schedule.steps=5000", "--set", "tracking.trackers=[]"]
    resumed = watched(folder, "resume", "tiny", *steps, *IN_STORAGE, "--json").start()
    try:
        metrics = folder / "storage/tiny/metrics.jsonl"
        resumed.wait_until(lambda: len(metrics.read_bytes().splitlines()) > STEPS)
        code, printed = maskwright("stop", "tiny", *IN_STORAGE, "--json", folder=folder)
        assert code == 0, printed
        (status,) = require_documented("stop", printed)
        assert status["state"] == "stopped"
        assert resumed.wait() == 75
    finally:
        resumed.kill_everything()
    code, printed = maskwright("resume", "tiny", "--set", f"schedule.steps={status['step'] + 2}", *IN_STORAGE, "--json", folder=folder)
    assert code == 0, printed
    require_documented("resume", printed)
