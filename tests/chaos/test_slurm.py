"""Runs on a real Slurm with two machines: followed, put back into the queue by a signal and by a lost machine, stopped, resumed and refused."""

import json
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.commands import Command, maskwright
from tests.support.slurm import Slurm
from tests.support.tiny_run import write_run

STEPS = 60
SECRET = secrets.token_hex(16)
PATIENCE_S = 1500.0

pytestmark = pytest.mark.timeout(4000)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm") / "daemons") as found:
        yield found


class Submitter:
    """A user on a login node: a folder with a run and a cluster file."""

    def __init__(self, slurm: Slurm, name: str) -> None:
        self.slurm, self.folder = slurm, slurm.folder.parent / name
        self.run = self.folder / "storage/tiny"
        self.token, self.followed, self.environment = "", "", b""
        schedule = {"steps": STEPS, "warmup_steps": 5}
        write_run(
            self.folder, schedule=schedule, checkpoint={"every_steps": 10, "keep_last": 3}, validation={"every_steps": STEPS, "micro_batches": 1}
        )
        self.write_cluster()

    def write_cluster(self, **settings: object) -> None:
        config = {"kind": "slurm", "environment": {"venv": sys.prefix}, "nodes": 2, "num_workers": 2, "threads_per_worker": 1, "use_gpu": False}
        (self.folder / "slurm.yaml").write_text(yaml.safe_dump({**config, **settings}))

    def command(self, *words: str) -> Command:
        return Command(list(words), self.folder, {**self.slurm.environment, "AWS_SECRET_ACCESS_KEY": SECRET, "MASKWRIGHT_STORAGE": "storage"})

    def call(self, *words: str, code: int = 0) -> str:
        """A verb to its end; what it prints."""
        found, output = maskwright(
            *words, folder=self.folder, timeout_s=PATIENCE_S, MASKWRIGHT_STORAGE="storage", AWS_SECRET_ACCESS_KEY=SECRET, **self.slurm.environment
        )
        assert found == code, output
        return output

    def submit(self) -> str:
        """The name of the job."""
        said = self.call("submit", "run.yaml", "--cluster", "slurm.yaml", "--json")
        return json.loads(said.splitlines()[-1])["submission"]  # what people read comes first, on stderr

    def status(self) -> dict[str, Any]:
        return json.loads(self.call("status", "tiny", "--json"))

    def step(self) -> int:
        """Steps that the newest attempt has made, all in all."""
        file = self.run / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return json.loads(lines[-1])["step"] + 1 if lines else 0

    def wait_for(self, what: str, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"no {what}\n{self.log()}"
            time.sleep(0.2)

    def log(self) -> str:
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.run.glob("submissions/*/job.log")))

    def driver_environment(self) -> bytes:
        """Of the process that drives the run; empty while there is none."""
        for pid in self.slurm.processes():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"launcher.submitted" in words and str(self.run).encode() in words:
                    return Path(f"/proc/{pid}/environ").read_bytes()
        return b""

    def losses(self) -> list[float]:
        """Of each step the one of its last attempt."""
        records = map(json.loads, (self.run / "metrics.jsonl").read_text().splitlines())
        return [loss for _, loss in sorted({record["step"]: record["loss"] for record in records}.items())]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in map(json.loads, (self.run / "events.jsonl").read_text().splitlines()) if event["kind"] == kind]


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm) -> Submitter:
    """A run that was followed to its end."""
    user = Submitter(slurm, "undisturbed")
    command = user.command("submit", "run.yaml", "--cluster", "slurm.yaml", "--follow").start()
    try:
        command.wait_until(lambda: any(token.stat().st_size == 64 for token in user.run.glob("submissions/0001/token")), PATIENCE_S)
        (token,) = user.run.glob("submissions/0001/token")
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        user.token = token.read_text()
        command.wait_until(user.driver_environment, PATIENCE_S)
        user.environment = user.driver_environment()
        assert command.wait(PATIENCE_S) == 0, command.text()
    finally:
        command.kill_everything()
    user.followed = command.text()
    return user


@pytest.mark.full
def test_a_submitted_run_is_followed_to_its_end(slurm: Slurm, undisturbed: Submitter) -> None:
    for word in ("submitted to Slurm as job tiny-", "prepare", f"step {STEPS}/{STEPS}", "export", "report"):
        assert word in undisturbed.followed
    found = undisturbed.status()
    assert (found["state"], found["exit_code"], found["step"]) == ("finished", 0, STEPS)
    assert slurm.state(found["submission"]) == "COMPLETED"
    assert len(list(undisturbed.run.glob("logs/attempt-0001/rank-*.log"))) == 2, "a rank on each machine: neither has room for two"


@pytest.mark.full
def test_what_is_secret_is_told_nobody(slurm: Slurm, undisturbed: Submitter) -> None:
    told = slurm.call("scontrol", "show", "job", slurm.job(undisturbed.status()["submission"]))
    script = (undisturbed.run / "submissions/0001/job.sh").read_text()
    written = [path.read_bytes() for path in undisturbed.folder.rglob("*") if path.is_file()]
    for word in (SECRET, undisturbed.token):
        assert word not in told + script + undisturbed.followed
        assert not any(word.encode() in data for data in written)
    assert SECRET.encode() not in undisturbed.environment, "what is secret where a run is submitted stays there"


@pytest.mark.full
def test_a_signal_puts_the_job_back_into_the_queue_and_nothing_is_lost(slurm: Slurm, undisturbed: Submitter) -> None:
    """By the batch step alone, as before its time limit: the run saves first."""
    user = Submitter(slurm, "signalled")
    job = user.submit()
    user.wait_for("step", lambda: user.step() >= 12)
    slurm.call("scancel", "--batch", "--signal=TERM", slurm.job(job))
    user.wait_for("requeue", lambda: slurm.restarts(job) == 1)
    assert user.status()["state"] in {"submitted", "running"}
    assert "was submitted already" in user.call("submit", "run.yaml", "--cluster", "slurm.yaml", code=8) or user.status()["state"] == "running"
    user.wait_for("end", lambda: slurm.state(job) == "COMPLETED")
    assert user.losses() == undisturbed.losses()
    (resumed,) = user.events("resumed")
    assert resumed["steps_lost"] == 0
    found = user.status()
    assert (found["state"], found["submission"], found["attempt"]) == ("finished", job, 2)


@pytest.mark.full
def test_a_signal_to_the_steps_puts_the_job_back_into_the_queue(slurm: Slurm, undisturbed: Submitter) -> None:
    """`scancel --signal=TERM` without `--batch`, and preemption, take Ray from the other machine: what was saved before is what it continues from."""
    user = Submitter(slurm, "preempted")
    job = user.submit()
    user.wait_for("step", lambda: user.step() >= 12)
    slurm.call("scancel", "--signal=TERM", slurm.job(job))
    user.wait_for("requeue", lambda: slurm.restarts(job) == 1)
    user.wait_for("end", lambda: slurm.state(job) == "COMPLETED")
    assert user.losses() == undisturbed.losses()


@pytest.mark.full
def test_a_job_that_is_requeued_by_hand_waits_again(slurm: Slurm, undisturbed: Submitter) -> None:
    """`scontrol requeue`, as in preemption: Slurm puts the job back by itself and soon kills it. Nobody is told that the run has stopped."""
    user = Submitter(slurm, "requeued")
    job = user.submit()
    user.wait_for("step", lambda: user.step() >= 12)
    slurm.call("scontrol", "requeue", slurm.job(job))
    states: set[str] = set()

    def has_ended() -> bool:
        states.add(user.status()["state"])
        return slurm.state(job) == "COMPLETED"

    user.wait_for("end", has_ended)
    assert slurm.restarts(job) == 1
    assert states <= {"running", "submitted", "finished"}
    assert user.losses() == undisturbed.losses()


@pytest.mark.full
def test_a_lost_machine_puts_the_job_back_into_the_queue(slurm: Slurm, undisturbed: Submitter) -> None:
    """The one that drives: nobody is left to say anything, and Slurm acts by itself."""
    user = Submitter(slurm, "lost")
    job = user.submit()
    user.wait_for("step", lambda: user.step() >= 12)
    slurm.kill_node("n1")
    user.wait_for("requeue", lambda: slurm.restarts(job) == 1)
    user.wait_for("a status that says so", lambda: user.status()["state"] == "submitted")
    slurm.start_node("n1")
    user.wait_for("end", lambda: slurm.state(job) == "COMPLETED")
    assert user.losses() == undisturbed.losses()


@pytest.mark.full
def test_a_run_is_stopped_and_resumed(slurm: Slurm, undisturbed: Submitter) -> None:
    user = Submitter(slurm, "stopped")
    job = user.submit()
    user.wait_for("step", lambda: user.step() >= 12)
    assert "run tiny stopped; newest checkpoint" in user.call("stop", "tiny")
    found = user.status()
    assert (found["state"], found["exit_code"]) == ("stopped", 75)
    user.wait_for("end of the job", lambda: slurm.state(job) == "FAILED")
    assert slurm.restarts(job) == 0, "who stops a run does not want it back"
    assert "-0002" in user.call("resume", "tiny")
    user.call("logs", "tiny", "-f")
    assert user.status()["state"] == "finished"
    assert user.losses() == undisturbed.losses()


def test_what_waits_in_the_queue_can_be_stopped(slurm: Slurm) -> None:
    user = Submitter(slurm, "waiting")
    user.write_cluster(options=["--hold"])
    job = user.submit()
    assert user.status()["state"] == "submitted"
    user.call("stop", "tiny")
    assert slurm.state(job) == "CANCELLED"
    assert user.status()["state"] == "stopped"


@pytest.mark.full
def test_what_slurm_refuses_is_told_in_two_lines(slurm: Slurm) -> None:
    user = Submitter(slurm, "refused")
    user.write_cluster(partition="nowhere")
    said = user.call("submit", "run.yaml", "--cluster", "slurm.yaml", code=3).strip().splitlines()
    assert len(said) == 2
    assert "Invalid partition name specified" in said[0]
    assert not list(user.run.glob("submissions/*/submission.json"))


@pytest.mark.full
def test_a_job_that_dies_before_it_drives_is_found_with_its_cause(slurm: Slurm) -> None:
    """In a folder whose name means something to shells and to sbatch."""
    user = Submitter(slurm, """odd 100% #1 it's "$(false)\"""")
    user.write_cluster(environment={"venv": "/nowhere"})
    job = user.submit()
    user.wait_for("end", lambda: slurm.state(job) == "FAILED")
    found = user.status()
    assert (found["state"], found["exit_code"]) == ("failed", 6)
    assert "/nowhere/bin/python" in found["cause"]
