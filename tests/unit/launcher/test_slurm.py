"""What Slurm is asked for with a run, what becomes of the job, and when it goes back into the queue. Slurm's commands are programs of our own."""

import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError, EnvironmentMismatchError, ExitCode
from data_pipeline.storage import Location
from launcher import cli
from launcher.cluster_config import ElasticCluster, SlurmCluster, duration_s
from launcher.clusters import allocation, ray_node, requeueing, slurm_jobs
from launcher.clusters.ray_node import answers, free_ports, own_address, resources
from launcher.clusters.requeueing import JobEnd, count_start, goes_back, idle_starts, is_stopped, put_back, record_spent, waits_again
from launcher.clusters.slurm import JobScript, job_script, quoted
from launcher.clusters.slurm_jobs import job_state
from launcher.config import load_cluster_config, validate_cluster
from launcher.control import request_stop
from launcher.lease import Lease
from launcher.submission import (
    Submission,
    newest_submission,
    read_submission,
    revoke,
    submission_folder,
    wait_again,
    waiting_submission,
)
from launcher.taken_jobs import JobState
from tests.support.answers import require_documented
from tests.support.slurm_commands import SlurmCommands
from tests.support.tiny_run import tiny_config
from trainer.runlog import RunFolder

GOLDEN = Path(__file__).parents[2] / "golden" / "slurm-job.sh"
SECRET = "planted-secret-5e3f"
SMALLEST = {"kind": "slurm", "environment": {"venv": "/opt/venv"}}
WHOLE = {
    **SMALLEST,
    "nodes": 4,
    "partition": "gpu",
    "account": "my-project",
    "time_limit": "12:00:00",
    "gpus_per_node": 8,
    "cpus_per_task": 64,
    "options": ["--constraint=h100&nvlink", "--exclusive"],
    "min_workers": 8,
    "grace_s": 300,
    "setup_commands": ["module load cuda/13", "export HTTPS_PROXY=http://proxy:3128"],
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmCommands:
    """A folder with a run that is not there yet, and a user with a secret, on a machine that belongs to a Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm_jobs, "ASKED_EVERY_S", -1.0)
    for name in [name for name in os.environ if name.startswith(("RAY_", "MASKWRIGHT_", "SLURM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    Path("run.yaml").write_text(yaml.safe_dump(tiny_config()))
    Path("slurm.yaml").write_text(yaml.safe_dump(SMALLEST))
    found = SlurmCommands(tmp_path / "bin", monkeypatch)
    monkeypatch.setattr(slurm_jobs, "known_name", [])
    found.answer("scontrol", "Configuration data as of today\nClusterName             = here\n")
    found.answer("sbatch", "17\n")
    found.queue("PENDING")
    return found


def invoke(*arguments: str) -> int:
    return cli.run(list(arguments), debug=False)


def submit(*arguments: str) -> int:
    return invoke("submit", "run.yaml", "--cluster", "slurm.yaml", *arguments)


def status(capsys: pytest.CaptureFixture[str]) -> tuple[str, int, str]:
    capsys.readouterr()
    invoke("status", "tiny", "--storage", "storage", "--json")
    found = json.loads(capsys.readouterr().out)
    return found["state"], found["exit_code"], found["cause"]


def tiny() -> RunFolder:
    return RunFolder(Location.at("storage/tiny"))


def newest() -> Submission:
    found = newest_submission(tiny())
    assert found is not None
    return found


def script_of(settings: dict[str, object], root: str = "/shared/my runs/tiny") -> JobScript:
    run = RunFolder(Location(root))
    submission = Submission(1, "tiny-12e7b4af-0001", "", ["run"], "/home/me", 0, "login", 1.5, "slurm")
    cluster = validate_cluster(settings, "slurm.yaml")
    assert isinstance(cluster, SlurmCluster)
    return job_script(run, submission, cluster, "maskwright-0.zip")


def test_the_scripts_are_the_golden_ones() -> None:
    assert "".join(script_of(settings).script for settings in (SMALLEST, WHOLE)) == GOLDEN.read_text()


@given(st.text(min_size=1).filter(lambda name: name.isprintable() and not set("/\\:") & set(name) and name.strip(".")))
def test_a_folder_of_any_name_is_one_word_of_the_script(name: str) -> None:
    root = f"/shared/{name}/tiny"
    *_, path, command = script_of(SMALLEST, root).script.splitlines()
    assert shlex.split(path) == ["export", f"PYTHONPATH={root}/submissions/0001/maskwright-0.zip"]
    assert shlex.split(command) == ["exec", "/opt/venv/bin/python", "-P", "-m", "launcher.clusters.allocation", root, "1"]


@pytest.mark.parametrize("name", ["two\nlines", "a\ttab", "\x1b[0m", "back\\slash", "a:b"])
def test_folders_that_no_script_can_hold_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        script_of(SMALLEST, f"/shared/{name}/tiny")
    with pytest.raises(ConfigError, match="is no folder"):
        script_of(SMALLEST, "s3://bucket/tiny")


def test_paths_are_quoted_as_sbatch_reads_them() -> None:
    """As seen with Slurm 22.05."""
    assert quoted("""/odd dir/100%/#1/'q"b""") == '''"/odd dir/100%%/#1/'q\\"b"'''


@pytest.mark.parametrize(
    "settings",
    [
        {"options": ["--comment=a b"]},
        {"options": ["--mem=0\n#SBATCH --uid=0"]},
        {"options": ["--mem=0 # rm"]},
        {"options": ["--comment='x'"]},
        {"options": ["mem=0"]},
        {"options": ["-p gpu"]},
        {"options": ["--output=/dev/null"]},
        {"options": ["--out=/dev/null"]},
        {"options": ["--export=ALL"]},
        {"options": ["--no-requeue"]},
        {"partition": "gpu --uid=0"},
        {"partition": "gpu\n"},
        {"account": "-x"},
        {"time_limit": "1h"},
        {"time_limit": 43200},
        {"time_limit": "1", "grace_s": 3600},
        {"grace_s": 60},
        {"time_limit": "4:19", "grace_s": 140},
        {"nodes": 0},
        {"environment": {"venv": "venv"}},
        {"environment": {"venv": "/x; rm -rf"}},
        {"environment": None},
        {"min_workers": 3, "num_workers": 2},
    ],
)
def test_cluster_files_that_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        script_of({**SMALLEST, **settings})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("90:30", 5430), ("12:00:00", 43200), ("2-0", 172800), ("1-2:03", 93780), ("2-00:00:00", 172800), ("0", math.inf)],
)
def test_lengths_of_time_as_slurm_writes_them(text: str, expected: float) -> None:
    assert duration_s(text) == expected


def test_lengths_of_time_want_quotes() -> None:
    with pytest.raises(ConfigError, match='put it in quotes, as in "12:00:00"'):
        script_of({**SMALLEST, "time_limit": yaml.safe_load("12:00:00")})


def test_the_driver_sees_the_cluster_from_inside() -> None:
    cluster = load_cluster_config("slurm")
    assert isinstance(cluster, ElasticCluster)
    inside = cluster.inside()
    assert (inside.kind, inside.address, inside.environment, inside.num_workers) == ("ray", "auto", None, "auto")


def test_a_dry_run_prints_the_script_and_does_nothing(slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("--dry-run") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#!/bin/bash\n#SBATCH --job-name=tiny-")
    assert SECRET not in printed
    assert submit("--dry-run", "--json") == 0
    (planned,) = require_documented("submit", capsys.readouterr().out)
    assert planned["script"].startswith("#!/bin/bash\n")
    assert not slurm.calls("sbatch")
    assert not Path("storage").exists()


def test_submitting_leaves_the_run_where_everybody_finds_it(slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], told["submission"], told["cluster"]) == ("tiny", newest().job, "Slurm")
    folder = submission_folder(tiny(), 1)
    assert slurm.calls("sbatch") == [f"--parsable {folder / 'job.sh'}"]
    assert newest().arguments == ["run", str(folder / "run.yaml"), "--cluster", str(folder / "inside.yaml")]
    assert load_cluster_config(str(folder / "inside.yaml")).kind == "ray"
    assert load_cluster_config(str(folder / "cluster.yaml")).kind == "slurm"
    written = b"".join(path.read_bytes() for path in Path("storage").rglob("*") if path.is_file())
    assert SECRET.encode() not in written
    assert status(capsys) == ("submitted", ExitCode.RUNNING, "")
    assert submit() == ExitCode.CONFLICT


def test_the_environment_changes_neither_a_job_nor_an_answer(slurm: SlurmCommands, monkeypatch: pytest.MonkeyPatch) -> None:
    """SBATCH_EXPORT=ALL would override the script's `--export=NONE`, and inside another job its SLURM_ variables would be taken for ours."""
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "token", "HOME": "/home/me"}
    others = {"SBATCH_EXPORT": "ALL", "SBATCH_NO_REQUEUE": "1", "SLURM_JOB_ID": "3", "SQUEUE_STATES": "RUNNING", "SCANCEL_NAME": "x"}
    for name, value in {**kept, **others}.items():
        monkeypatch.setenv(name, value)
    assert submit() == 0
    assert invoke("status", "tiny", "--storage", "storage") == 0
    for program in ("sbatch", "squeue"):
        environment = slurm.environment(program)
        assert environment.items() >= kept.items()
        assert not others.keys() & environment.keys()
    assert "unset SLURM_JWT" in (submission_folder(tiny(), 1).path / "job.sh").read_text(), "the job has the rights of its machine"


def test_the_packages_run_from_their_zip(slurm: SlurmCommands) -> None:
    """Before they are unpacked on a machine."""
    assert submit() == 0
    (package,) = submission_folder(tiny(), 1).path.glob("maskwright-*.zip")
    code = "from launcher.clusters import allocation; print(allocation.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env={**os.environ, "PYTHONPATH": str(package)}, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == f"{package}/launcher/clusters/allocation.py", done.stderr


def test_why_a_job_waits_is_told(slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    slurm.queue("PENDING", reason="Nodes required for job are DOWN")
    assert status(capsys) == ("submitted", ExitCode.RUNNING, "Slurm lets it wait: Nodes required for job are DOWN")


def test_what_waits_for_long_is_asked_for_ever_more_seldom(slurm: SlurmCommands, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(slurm_jobs, "ASKED_EVERY_S", 2.0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    jobs = slurm_jobs.SlurmJobs(slurm.folder, 0.0, 60.0)

    def asked(seconds: int) -> int:
        before = len(slurm.calls("squeue"))
        for _ in range(seconds):
            jobs.look("tiny-that-waits")
            now[0] += 1.0
        return len(slurm.calls("squeue")) - before

    assert asked(60) == 5, "after 0, 2, 6, 14 and 30 seconds"
    assert asked(60) == 2
    slurm.queue("RUNNING")
    assert asked(60) == 30
    assert not slurm.calls("scontrol")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition name specified\n",
            ExitCode.CONFIG,
            "Slurm refuses the job: Invalid partition name specified",
        ),
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)\n",
            ExitCode.UNREACHABLE,
            "does not answer",
        ),
    ],
)
def test_a_job_that_is_not_taken_is_revoked(error: str, code: ExitCode, said: str, slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.answer("sbatch", error=error)
    assert submit() == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert said in lines[0]
    assert waiting_submission(tiny()) is None


def test_a_machine_without_slurm(slurm: SlurmCommands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit() == ExitCode.UNREACHABLE
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "belongs to no Slurm" in lines[0]
    assert not Path("storage").exists()


@pytest.mark.parametrize("verb", [["run", "run.yaml"], ["doctor"]])
def test_nobody_drives_such_a_cluster_from_outside(verb: list[str], slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]) -> None:
    del slurm
    assert invoke(*verb, "--cluster", "slurm.yaml") == ExitCode.USAGE
    assert "maskwright submit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "status", "printed", "state", "code", "cause"),
    [
        ("PENDING", 0, "", "submitted", ExitCode.RUNNING, ""),
        ("RUNNING", 0, "", "submitted", ExitCode.RUNNING, ""),
        ("CANCELLED", 0, "", "stopped", ExitCode.INTERRUPTED, "was stopped"),
        ("FAILED", 7 << 8, "error: n1 does not see it\nShare it.\n", "failed", ExitCode.STORAGE, "n1 does not see it"),
        ("FAILED", 127 << 8, "slurm_script: line 9: /opt/venv/bin/python: No such file or directory\n", "failed", ExitCode.ENVIRONMENT, "No such"),
        ("FAILED", 53, "", "failed", ExitCode.STORAGE, "could not write the output"),
        ("FAILED", 9, "", "interrupted", ExitCode.INTERRUPTED, "was killed (exit code 137)"),
        ("TIMEOUT", 0, "", "interrupted", ExitCode.INTERRUPTED, "ended by its cluster: TIMEOUT"),
        ("NODE_FAIL", 1, "", "interrupted", ExitCode.INTERRUPTED, "ended by its cluster: NODE_FAIL"),
        ("OUT_OF_MEMORY", 0, "", "failed", ExitCode.FAILED, "more memory than Slurm gives it"),
    ],
)
def test_what_became_of_a_job_that_never_drove(
    name: str, status: int, printed: str, state: str, code: int, cause: str, slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit() == 0
    slurm.queue(name, status)
    (submission_folder(tiny(), 1).path / "job.log").write_text(printed)
    found = globals()["status"](capsys)
    assert found[:2] == (state, code)
    assert cause in found[2]


def test_what_the_queue_has_forgotten_the_accounts_know(slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    slurm.queue("")
    slurm.answer("sacct", "CANCELLED by 1000|0:15\n")
    assert status(capsys)[0] == "stopped"
    slurm.answer("sacct", "FAILED|0:9\n")
    assert "exit code 137" in status(capsys)[2]
    slurm.answer("sacct", error="Slurm accounting storage is disabled\n")
    assert status(capsys)[0] == "submitted", "for a minute, a job may be on its way"
    assert f"--name={newest().job}" in slurm.calls("sacct")[-1]


def test_a_slurm_that_is_down_leaves_it_open(slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    slurm.answer("squeue", error="slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n")
    state, code, cause = status(capsys)
    assert (state, code) == ("submitted", ExitCode.RUNNING)
    assert "whether it still waits is not known" in cause


def test_a_slurm_that_is_down_is_said_before_anything_is_written(slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.answer("scontrol", error="slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)\n")
    assert submit() == ExitCode.UNREACHABLE
    assert "Unable to contact slurm controller" in capsys.readouterr().err
    assert not Path("storage").exists()


def test_another_slurm_is_not_asked_for_the_job(slurm: SlurmCommands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Which would know no such job, and so say that nothing comes of it."""
    assert submit() == 0
    monkeypatch.setattr(slurm_jobs, "known_name", [])
    slurm.answer("scontrol", "ClusterName = elsewhere\n")
    slurm.queue("")
    state, code, cause = status(capsys)
    assert (state, code) == ("submitted", ExitCode.RUNNING)
    assert "the Slurm cluster here, this machine belongs to elsewhere" in cause
    assert not slurm.calls("squeue")


def test_what_waits_is_taken_out_of_the_queue(slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    job = newest().job
    (slurm.folder / "scancel").write_text(
        f"#!/bin/bash\nprintf '%40s%40s\\n' CANCELLED 0 > {slurm.folder}/squeue.out; echo scancel $* >> {slurm.folder}/calls\n"
    )
    assert invoke("stop", "tiny", "--storage", "storage") == 0
    assert slurm.calls("scancel") == [f"--name={job}"]
    assert status(capsys)[0] == "stopped"


def drive(ends: bool = True, **end: Any) -> None:
    """As the job does: take the run, and leave it."""
    with Lease.acquire(tiny()):
        tiny().append_event("command_started", attempt=0, verb="run", submission=newest().job)
        if ends:
            tiny().append_event("stopped", attempt=1, **(end or {"exit_code": 75}))


def test_a_job_that_goes_back_into_the_queue_waits_again(slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    drive()
    slurm.queue("RUNNING")
    assert status(capsys)[0] == "stopped", "a run that was stopped, whose job is about to end"
    wait_again(tiny(), newest())
    slurm.queue("PENDING")
    assert status(capsys) == ("submitted", ExitCode.RUNNING, "")
    assert submit() == ExitCode.CONFLICT
    assert invoke("resume", "tiny", "--storage", "storage") == ExitCode.CONFLICT
    drive()
    assert status(capsys)[0] == "stopped"
    assert invoke("resume", "tiny", "--storage", "storage") == 0
    assert newest().number == 2


def test_a_job_whose_machine_was_lost_waits_again_by_slurms_doing(slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody was left to say so in the run's folder."""
    assert submit() == 0
    drive(ends=False)
    assert status(capsys)[0] == "submitted"
    assert submit() == ExitCode.CONFLICT
    slurm.queue("COMPLETED")
    assert status(capsys)[0] == "interrupted"
    assert submit() == 0


@pytest.mark.parametrize("end", [{"exit_code": 75, "by": "SIGTERM"}, {"cause": "requested"}])
def test_a_job_that_slurm_requeues_as_it_ends_it_waits_again(end: dict[str, Any], slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]) -> None:
    """Its driver was told to save and end, and the job was killed before it could say that it begins anew, or the driver before it said more."""
    assert submit() == 0
    drive(**end)
    slurm.queue("PENDING")
    assert status(capsys)[0] == "submitted"
    assert submit() == ExitCode.CONFLICT
    assert invoke("resume", "tiny", "--storage", "storage") == ExitCode.CONFLICT
    slurm.queue("CANCELLED")
    assert status(capsys)[:2] == ("stopped", ExitCode.INTERRUPTED)
    assert invoke("stop", "tiny", "--storage", "storage") == ExitCode.CONFLICT
    assert submit() == 0


def test_a_run_that_was_requeued_is_resumed_with_changes(slurm: SlurmCommands) -> None:
    """Its job was cancelled while it waited to begin anew."""
    assert submit() == 0
    drive()
    tiny().config.write_bytes((submission_folder(tiny(), 1) / "run.yaml").read_bytes())
    tiny().append_metrics({"step": 1})
    assert waits_again(tiny(), 1)
    slurm.queue("CANCELLED")
    assert invoke("resume", "tiny", "--storage", "storage", "--set", "optimizer.lr=0.0005") == 0
    assert newest().arguments[:4] == ["resume", tiny().root.url, "--set", "optimizer.lr=0.0005"]
    assert invoke("resume", "tiny", "--storage", "storage") == 0
    assert newest().overrides == ["optimizer.lr=0.0005"], "what has not begun is not forgotten"


def test_who_stops_a_run_is_told_that_it_is_stopped(slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    drive(exit_code=75, by="maskwright stop")
    slurm.queue("RUNNING")
    assert status(capsys)[0] == "stopped"
    assert len(slurm.calls("squeue")) == 0


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("CONFIGURING", 0, JobState("waiting", message="Slurm lets it wait: Priority")),
        ("REQUEUE_HOLD", 0, JobState("waiting", message="Slurm lets it wait: Priority")),
        ("COMPLETING", 0, JobState("running")),
        ("SUSPENDED", 0, JobState("running")),
        ("COMPLETED", 0, JobState("ended", exit_code=0, message="said")),
        ("FAILED", 12, JobState("ended", exit_code=12, message="said")),
        ("CANCELLED", 0, JobState("ended", was_stopped=True)),
        ("REVOKED", 0, JobState("ended", was_lost=True, message="REVOKED")),
        ("DEADLINE", 0, JobState("ended", was_lost=True, message="DEADLINE")),
        ("SOMETHING_NEW", 0, JobState("running")),
    ],
)
def test_slurms_names_for_states(name: str, code: int, expected: JobState) -> None:
    assert job_state(name, code, "said", "Priority") == expected


@pytest.mark.parametrize(
    ("end", "expected", "exit_code"),
    [
        (JobEnd(75, by_slurm=True, is_restart=True), True, 75),
        (JobEnd(75, by_slurm=True, idle_starts=3), True, 75),
        (JobEnd(75, by_slurm=True, idle_starts=4), False, 11),
        (JobEnd(75, by_slurm=True, by_person=True, idle_starts=4), False, 75),
        (JobEnd(-15, by_slurm=True), True, 75),
        (JobEnd(4, by_slurm=True), True, 4),  # Ray on the other machines was told, too
        (JobEnd(75, by_slurm=True, by_person=True), False, 75),
        (JobEnd(75), False, 75),  # maskwright stop
        (JobEnd(0, by_slurm=True), False, 0),
        (JobEnd(12, by_slurm=True), False, 12),
        (JobEnd(75, lost_ray=True, idle_starts=3), True, 75),
        (JobEnd(6, lost_ray=True, idle_starts=4), False, 11),
        (JobEnd(8), False, 8),
        (JobEnd(8, is_restart=True, idle_starts=2), True, 8),  # of what Slurm has lost, not all is dead
        (JobEnd(0, lost_ray=True), False, 0),
        (JobEnd(-9), False, 137),
    ],
)
def test_when_a_job_goes_back_into_the_queue(end: JobEnd, expected: bool, exit_code: int) -> None:
    assert (goes_back(end), end.exit_code) == (expected, exit_code)


def test_starts_in_which_nothing_is_saved_are_counted(slurm: SlurmCommands, capsys: pytest.CaptureFixture[str]) -> None:
    del slurm
    assert submit() == 0
    found: list[int] = []
    for start in range(6):
        begun = count_start(tiny(), 1)
        if start == 2:
            tiny().append_event("stage_finished", attempt=1, stage="prepare", elapsed_s=1.0)
        found.append(idle_starts(tiny(), begun))
    assert found == [1, 2, 0, 1, 2, 3]
    drive()
    record_spent(tiny())
    assert status(capsys)[:2] == ("failed", ExitCode.RETRIES_SPENT)


@pytest.mark.parametrize(("by", "after_s", "expected"), [("maskwright stop", 5.0, True), ("maskwright stop", -5.0, False), ("SIGTERM", 5.0, False)])
def test_who_stops_a_run_while_its_job_ends_does_not_want_it_back(by: str, after_s: float, expected: bool, tmp_path: Path) -> None:
    run = RunFolder(Location.at(tmp_path / "tiny"))
    request = request_stop(run, grace_s=60.0, save=True, by=by, lease="1")
    assert is_stopped(run, request.time - after_s) == expected


@pytest.mark.parametrize(("state", "is_put_back"), [("RUNNING", True), ("COMPLETING", False), ("PENDING", False), ("", False)])
def test_what_slurm_cancels_or_has_put_back_is_left_alone(state: str, is_put_back: bool, slurm: SlurmCommands) -> None:
    slurm.answer("squeue", f"{state}\n")
    put_back("17", 0.0)
    assert slurm.calls("scontrol") == (["requeue 17"] if is_put_back else [])


@pytest.mark.parametrize(
    ("head", "nodes", "is_told", "is_elastic", "expected"),
    [
        (None, None, False, False, None),
        (None, None, True, True, "Slurm ends the job"),
        (None, 75, False, True, "Slurm ends the job"),
        (None, 137, False, False, "Ray on the other machines has ended (exit code 137)"),
        (None, 137, False, True, None),  # two machines, the second lost: srun has no task left, the run shrinks
        (1, 137, False, True, "Ray's head has ended"),
    ],
)
def test_why_a_driver_is_told_to_end(head: int | None, nodes: int | None, is_told: bool, is_elastic: bool, expected: str | None) -> None:
    cause = allocation.why_to_end(head, nodes, is_told=is_told, is_elastic=is_elastic)
    assert (cause and cause.words) == expected
    assert (cause is not None and cause.by_slurm) == (expected == "Slurm ends the job")


@pytest.mark.parametrize(
    ("trap", "cause", "expected"),
    [
        ("", allocation.Cause("Slurm ends the job", by_slurm=True), JobEnd(-15, by_slurm=True)),
        ("trap '' TERM;", allocation.Cause("Slurm ends the job", by_slurm=True), JobEnd(-15, by_slurm=True)),
        ("trap '' TERM;", allocation.Cause("Ray's head has ended"), JobEnd(-15, lost_ray=True)),
        ("exit 12;", None, JobEnd(12)),
    ],
)
def test_a_driver_that_does_not_end_in_time_is_killed(
    trap: str, cause: allocation.Cause | None, expected: JobEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the job goes back into the queue before Slurm kills it."""
    monkeypatch.setattr(allocation, "LOOK_S", 0.01)
    driver = subprocess.Popen(["bash", "-c", f"{trap} echo; read -t 60 <> <(:)"], stdout=subprocess.PIPE)
    try:
        assert driver.stdout is not None
        driver.stdout.readline()  # the trap is set
        assert allocation.follow(driver, lambda: cause, 0.3) == expected
    finally:
        driver.kill()
        driver.communicate()


@pytest.mark.parametrize("program", ["squeue", "scontrol"])
def test_a_slurm_that_does_not_answer_is_asked_again(
    program: str, slurm: SlurmCommands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be started anew just then."""
    monkeypatch.setattr(requeueing, "PAUSE_S", 0.0)
    slurm.answer("squeue", "RUNNING\n")
    slurm.fail_once(program)
    put_back("17", 60.0)
    assert slurm.calls("scontrol")[-1:] == ["requeue 17"]
    assert capsys.readouterr().out.splitlines() == [
        f"job 17 is not back in the queue yet: Slurm does not answer: {program}: down",
        "job 17 goes back into the queue",
    ]
    slurm.answer(program, error="down\n")
    put_back("17", 0.0)
    assert "error: job 17 could not be put back" in capsys.readouterr().out


def test_a_machine_without_the_commands_of_the_end_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert allocation.main(["/nowhere", "1"]) == ExitCode.ENVIRONMENT
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "has no squeue, scontrol, srun in PATH" in lines[0]


def test_a_submission_that_was_given_up_does_not_wait_again(slurm: SlurmCommands) -> None:
    del slurm
    assert submit() == 0
    drive()
    assert waits_again(tiny(), 1)
    assert read_submission(tiny(), 1).waits(tiny())
    revoke(tiny(), newest())
    assert not waits_again(tiny(), 1)
    assert newest_submission(tiny()) is None


def test_a_machine_whose_head_is_gone_puts_the_job_back(slurm: SlurmCommands, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--no-kill` nobody else does: the machine that drives is lost, and the job runs on."""
    monkeypatch.setattr(allocation, "HEAD_S", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    slurm.answer("squeue", "RUNNING\n")
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        assert answers(address, 0.0, lambda: False)
    assert allocation.keep_node(lambda: subprocess.Popen(["true"]), str, address, threading.Event()) == ExitCode.UNREACHABLE
    assert slurm.calls("scontrol") == ["requeue 17"]


def test_a_node_is_told_to_end_by_the_signal_that_srun_hands_on() -> None:
    """At SIGTERM srun kills its tasks, whose files would stay."""
    tidies_up = "trap 'exit 9' USR1; exec 3<> <(:); echo; while :; do read -t 0.05 -u 3; done"
    with ray_node.ending(subprocess.Popen(["bash", "-c", tidies_up], stdout=subprocess.PIPE), by=allocation.END_NODES) as nodes:
        assert nodes.stdout is not None
        nodes.stdout.readline()
    nodes.stdout.close()
    assert nodes.returncode == 9


def test_ray_does_not_kill_for_what_others_take_on_a_shared_machine() -> None:
    with ray_node.place({}) as here:
        assert here.environment["RAY_memory_monitor_refresh_ms"] == "0"


def test_jobs_of_one_machine_take_different_ports() -> None:
    first = free_ports("127.0.0.1", 40_017)
    assert free_ports("127.0.0.1", 40_018) != first
    with socket.create_server(("127.0.0.1", first + 1)):
        assert free_ports("127.0.0.1", 40_017) == first + 2
    assert all(20_000 <= free_ports("127.0.0.1", job) < 32_000 for job in (1, 5_999, 6_000, 10**9))


def test_the_head_has_an_address_that_the_others_reach(slurm: SlurmCommands, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a machine often stands for 127.0.1.1 there, and not every machine has a way abroad."""
    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    slurm.answer("scontrol", "NodeName=n1 Arch=x86_64 NodeAddr=192.0.2.7 NodeHostName=n1 Version=22.05.8\n")
    assert list(allocation.own_names())[1:3] == ["localhost", "192.0.2.7"]
    slurm.answer("scontrol", error="down\n")
    assert list(allocation.own_names())[1] == "localhost"
    assert own_address(["localhost", "127.0.1.1", "192.0.2.7"]) == "192.0.2.7"
    with pytest.raises(EnvironmentMismatchError, match=socket.gethostname()):
        own_address(["localhost", "127.0.1.1"])


def test_ray_takes_what_the_job_has_of_the_machines() -> None:
    environment = {"SLURMD_NODENAME": "n1", "SLURM_CPUS_PER_TASK": "16", "SLURM_JOB_NUM_NODES": "4"}
    command = allocation.node_command("10.0.0.1:20034", environment)
    assert {"--nodes=3", "--ntasks=3", "--exclude=n1", "--cpus-per-task=16"} <= set(command)
    assert command[-2:] == ["--node", "10.0.0.1:20034"]
    assert resources({"SLURM_CPUS_ON_NODE": "16"}) == ["--num-cpus=16"]
    assert resources({"SLURM_CPUS_ON_NODE": "16", "SLURM_GPUS_ON_NODE": "4"}) == ["--num-cpus=16", "--num-gpus=4"]
