"""What a cluster is asked for with a run, what the run's folder tells of it, and what becomes of it. Ray's Jobs API is a server of our own."""

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import ConfigError, ConflictError, EnvironmentMismatchError, ExitCode
from data_pipeline.storage import Location
from launcher import cli, job_request, run_status, submitting, verbs_stop, verbs_submit, watching
from launcher import lease as lease_module
from launcher.attempts import claim_attempt
from launcher.cluster_config import RayCluster
from launcher.cluster_environment import Environment
from launcher.config import dump_yaml, load_run_config
from launcher.job_request import job_request as request_for
from launcher.job_request import pack_packages, package_name
from launcher.lease import Lease, LeaseState, holder
from launcher.run_status import read_status
from launcher.submission import (
    Submission,
    claim,
    driving_submission,
    new_job_name,
    newest_submission,
    next_number,
    revoke,
    submission_folder,
    waiting_submission,
)
from launcher.submitting import end_of
from launcher.taken_jobs import JobState
from tests.support.answers import require_documented
from tests.support.jobs_api import JobsApi
from tests.support.tiny_run import tiny_config
from trainer.runlog import RunFolder

GOLDEN = Path(__file__).parents[2] / "golden" / "submission.json"
SECRET = "planted-secret-5e3f"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run that is not there yet, and a user without a token but with a secret."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("RAY_", "MASKWRIGHT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    Path("run.yaml").write_text(yaml.safe_dump(tiny_config()))
    return tmp_path


@pytest.fixture
def api() -> Iterator[JobsApi]:
    with JobsApi() as found:
        write_cluster(found)
        yield found


def write_cluster(api: JobsApi) -> None:
    Path("ray.yaml").write_text(f"kind: ray\ndashboard: {api.address}\n")


def invoke(*arguments: str) -> int:
    return cli.run(list(arguments), debug=False)


def submit(*arguments: str) -> int:
    return invoke("submit", "run.yaml", "--cluster", "ray.yaml", *arguments)


def hand_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that the cluster does not know is gone, however lately it was submitted."""
    monkeypatch.setattr(submitting, "_HANDOVER_S", 0.0)


def tiny() -> RunFolder:
    return RunFolder(Location.at("storage/tiny"))


def status(capsys: pytest.CaptureFixture[str]) -> tuple[str, int, str]:
    capsys.readouterr()
    invoke("status", "tiny", "--storage", "storage", "--json")
    found = json.loads(capsys.readouterr().out)
    return found["state"], found["exit_code"], found["cause"]


def a_submission(run: RunFolder, number: int = 1, lease: int = 0) -> Submission:
    folder = submission_folder(run, number)
    arguments = ["run", str(folder / "run.yaml"), "--cluster", str(folder / "inside.yaml")]
    return Submission(number, f"{run.root.name}-12e7b4af-{number:04d}", "http://head:8265", arguments, "/home/me/texts", lease, "laptop", 1.5)


def test_the_request_is_the_golden_one() -> None:
    """Whoever changes it changes what clusters of running releases are asked for."""
    run = RunFolder(Location("/shared/my runs/tiny"))
    clusters = [RayCluster(kind="ray"), RayCluster(kind="ray", environment=Environment(venv="/opt/venv/"))]
    requests = [vars(request_for(run, a_submission(run), cluster, "maskwright-0.zip")) for cluster in clusters]
    assert requests == json.loads(GOLDEN.read_text())


def test_the_request_has_no_configuration_and_no_environment() -> None:
    config = load_run_config("run.yaml", [f"corpus.source=https://host/text.jsonl?token={SECRET}"])
    run = RunFolder(Location.at(config.storage) / config.name)
    assert SECRET not in json.dumps(vars(request_for(run, a_submission(run), RayCluster(kind="ray"), "p.zip")))


@pytest.mark.parametrize("storage", [f"sftp://me:{SECRET}@host/runs", f"https://host/runs?sig={SECRET}"])
def test_credentials_in_the_address_of_the_storage_are_refused(storage: str) -> None:
    run = RunFolder(Location(f"{storage}/tiny"))
    with pytest.raises(ConfigError) as caught:
        request_for(run, a_submission(run), RayCluster(kind="ray"), "p.zip")
    assert SECRET not in str(caught.value)


def test_packages_are_packed_alike_whenever_and_wherever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    for name in ("first", "second"):
        for package in ("trainer", "launcher", "data_pipeline", "other"):
            folder = tmp_path / name / package
            (folder / "__pycache__").mkdir(parents=True)
            (folder / "module.py").write_text(f"name = {package!r}\n")
            (folder / "__pycache__" / "module.pyc").write_text(name)
            (folder / ".hidden").write_text(name)
        os.utime(tmp_path / name / "trainer" / "module.py", (10**9, 10**9 + len(packed)))
        packed.append(pack_packages(tmp_path / name))
    assert packed[0] == packed[1]
    assert package_name(packed[0]) == package_name(packed[1]) != package_name(packed[0] + b"x")
    names = zipfile.ZipFile(io.BytesIO(packed[0])).namelist()
    assert names == ["data_pipeline/module.py", "launcher/module.py", "trainer/module.py"]
    monkeypatch.setattr(job_request, "MOST_BYTES", len(packed[0]) - 1)
    with pytest.raises(EnvironmentMismatchError, match="more than"):
        pack_packages(tmp_path / "first")


def test_the_packages_that_travel_are_ours_and_whole(tmp_path: Path) -> None:
    repository = Path(__file__).parents[3]
    archive = zipfile.ZipFile(io.BytesIO(pack_packages(repository)))
    archive.extractall(tmp_path / "there")
    code = "import launcher.cli, launcher.submitted; print(launcher.submitted.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "there")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == str(tmp_path / "there/launcher/submitted.py"), done.stderr
    assert (tmp_path / "there/launcher/report_template.html.j2").exists()


def test_no_job_has_the_name_of_another() -> None:
    """A cluster remembers the jobs of runs whose folders are gone."""
    names = [new_job_name(tiny(), 1) for _ in range(100)]
    assert len(set(names)) == len(names)
    assert all(name.startswith("tiny-") and name.endswith("-0001") for name in names)


def test_a_submission_waits_until_somebody_drives() -> None:
    run = tiny()
    assert newest_submission(run) is None
    with Lease.acquire(run):
        pass
    submission = a_submission(run, next_number(run), lease=1)
    claim(run, submission)
    with pytest.raises(ConflictError):
        claim(run, submission)
    assert waiting_submission(run) == driving_submission(run, []) == submission
    with Lease.acquire(run):
        assert waiting_submission(run) is None
    assert driving_submission(run, [{"kind": "command_started"}]) is None, "a command has driven the run since"
    assert driving_submission(run, [{"kind": "command_started", "submission": submission.job}]) == submission
    later = a_submission(run, next_number(run), lease=2)
    claim(run, later)
    assert (later.number, newest_submission(run)) == (2, later)
    (submission_folder(run, 2) / "run.yaml").write_bytes(b"name: tiny")
    revoke(run, later)
    assert (next_number(run), newest_submission(run)) == (3, submission)


def test_submitting_leaves_the_run_where_everybody_finds_it(api: JobsApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    said = capsys.readouterr().out
    (job,) = api.jobs
    assert f"run tiny submitted to {api.address} as job {job}" in said
    for verb in ("logs", "status", "stop"):
        assert f"maskwright {verb} " in said
    folder = tiny().root / "submissions" / "0001"
    assert api.jobs[job]["entrypoint"] == f"python -m launcher.submitted {tiny().root} 1"
    (package,) = api.packages.values()
    assert "launcher/submitted.py" in zipfile.ZipFile(io.BytesIO(package)).namelist()
    assert load_run_config(folder.path / "run.yaml") == load_run_config(tiny().config.path)
    assert load_run_config(tiny().config.path).storage == str(Path.cwd() / "storage")
    assert invoke("list", "--storage", "storage", "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["id"], listed["state"], listed["exit_code"], listed["submission"]) == ("tiny", "submitted", ExitCode.RUNNING, job)
    written = b"".join(path.read_bytes() for path in Path("storage").rglob("*") if path.is_file())
    assert SECRET.encode() not in written
    assert SECRET not in json.dumps(api.jobs)


def test_packages_that_are_there_are_not_sent_again(api: JobsApi, monkeypatch: pytest.MonkeyPatch) -> None:
    hand_over_at_once(monkeypatch)
    assert submit() == 0
    api.jobs.clear()
    (name,) = api.packages
    api.packages[name] = b"untouched"
    assert submit() == 0
    assert api.packages == {name: b"untouched"}


def test_a_dry_run_does_nothing(api: JobsApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("--dry-run") == 0
    assert submit("--dry-run", "--json") == 0
    shown, again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    require_documented("submit", json.dumps(again))
    assert shown["dashboard"] == again["dashboard"] == api.address
    assert shown["submission_id"].endswith("-0001")
    assert not api.jobs
    assert not Path("storage").exists()


@pytest.mark.parametrize(
    ("told", "state", "code", "cause"),
    [
        ({"status": "PENDING"}, "submitted", ExitCode.RUNNING, ""),
        ({"status": "RUNNING"}, "submitted", ExitCode.RUNNING, ""),
        ({"status": "STOPPED"}, "stopped", ExitCode.INTERRUPTED, "was stopped"),
        ({"status": "FAILED", "message": "runtime_env setup failed: no room"}, "failed", ExitCode.FAILED, "no room"),
        (
            {"status": "FAILED", "driver_exit_code": 7, "message": "logs:\nerror: head does not see it\nShare it."},
            "failed",
            7,
            "head does not see it",
        ),
        ({"status": "FAILED", "driver_exit_code": 127, "message": "sh: python: not found"}, "failed", ExitCode.ENVIRONMENT, "python: not found"),
        (None, "interrupted", ExitCode.INTERRUPTED, "does not know job"),
    ],
)
def test_what_became_of_a_job_that_never_drove(
    told: dict[str, object] | None,
    state: str,
    code: int,
    cause: str,
    api: JobsApi,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hand_over_at_once(monkeypatch)
    assert submit() == 0
    (job,) = api.jobs
    if told is None:
        api.jobs.clear()
    else:
        api.jobs[job].update(told)
    found = status(capsys)
    assert found[:2] == (state, code)
    assert cause in found[2]
    assert submit() == (ExitCode.CONFLICT if state == "submitted" else ExitCode.OK)


def test_a_cluster_that_is_gone_leaves_it_open(api: JobsApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    with JobsApi() as other:
        api.__exit__(None, None, None)
        state, code, cause = status(capsys)
        assert (state, code) == ("submitted", ExitCode.RUNNING)
        assert "whether it still waits is not known" in cause
        write_cluster(other)
        assert submit() == 0, "a cluster that is gone must not hold the run for ever"
        assert [job[-5:] for job in other.jobs] == ["-0002"]
        api.__enter__()


def test_a_run_that_somebody_drives_is_not_submitted(api: JobsApi, capsys: pytest.CaptureFixture[str]) -> None:
    with Lease.acquire(tiny()):
        assert submit() == ExitCode.CONFLICT
    assert "already running" in capsys.readouterr().err
    assert not api.jobs


def test_a_run_that_is_being_handed_over_is_not_submitted(api: JobsApi, capsys: pytest.CaptureFixture[str]) -> None:
    """Between a submission and its job, which comes with the packages, the cluster knows nothing of it."""
    claim(tiny(), replace(a_submission(tiny()), dashboard=api.address, time=time.time()))
    assert submit() == ExitCode.CONFLICT
    assert "is about to start" in capsys.readouterr().err
    assert not api.jobs


@pytest.mark.parametrize("moment", ["version", "jobs"])
def test_a_job_that_begins_while_its_run_is_submitted_again(
    moment: str, api: JobsApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whenever the first job takes the run, one driver is left that `status`, `stop` and `resume` know."""
    assert submit() == 0
    (job,) = api.jobs
    answer = api.answer
    lease: list[Lease] = []

    def begin(method: str, path: str, body: bytes) -> tuple[int, object]:
        found = answer(method, path, body)
        if not lease and path in {"version": ["/api/version"], "jobs": ["/api/jobs/", f"/api/jobs/{job}"]}.get(moment, []):
            lease.append(Lease.acquire(tiny()))
            tiny().append_event("command_started", attempt=0, verb="run", submission=job)
            api.jobs[job]["status"] = "RUNNING"
        return found

    monkeypatch.setattr(api, "answer", begin)
    assert submit() == ExitCode.CONFLICT
    assert list(api.jobs) == [job]
    capsys.readouterr()
    assert invoke("status", "tiny", "--storage", "storage", "--json") == 0
    assert json.loads(capsys.readouterr().out)["submission"] == job


@pytest.mark.parametrize("is_claimed", [True, False])
def test_the_status_of_a_run_whose_job_begins_while_it_is_read(is_claimed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease is a number first, and a file after that."""
    run, held = tiny(), list[Lease]()
    run.config.write_bytes(dump_yaml(load_run_config("run.yaml")))
    run.append_event("stopped", attempt=1)
    claim(run, a_submission(run))

    if is_claimed:
        (run.root / "leases/00000001").claim(b"token")

    def begin_after(asked: RunFolder) -> LeaseState | None:
        found = holder(asked)
        if not held:
            held.append(Lease.acquire(run))
        return found

    monkeypatch.setattr(run_status, "holder", begin_after)
    assert read_status(run).state in {"submitted", "running"}


def test_a_job_that_found_the_run_taken_is_not_its_driver() -> None:
    run = tiny()
    first, second = a_submission(run, 1), a_submission(run, 2)
    claim(run, first)
    claim(run, second)
    with Lease.acquire(run):
        assert driving_submission(run, [{"kind": "command_started", "submission": first.job}]) == first


def test_a_driver_elsewhere_that_died_holds_no_submission_up_for_its_clock(
    api: JobsApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease_module, "STALE_AFTER_S", 0.5)
    with Lease.acquire(tiny()) as lease:
        pass
    tiny().lease.write_json(asdict(replace(lease.state, machine="the head", time=time.time() + 3600)))
    assert submit() == 0
    assert "looking whether it still is" in capsys.readouterr().out
    assert len(api.jobs) == 1


def test_a_job_that_is_not_taken_is_revoked(api: JobsApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.refuses_jobs = True
    assert submit() == ExitCode.UNREACHABLE
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "no agent" in lines[0]
    assert waiting_submission(tiny()) is None
    api.refuses_jobs = False
    assert submit() == 0
    assert [job[-5:] for job in api.jobs] == ["-0002"]


def test_a_change_that_makes_another_model_is_refused_here(api: JobsApi, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny()
    run.config.write_bytes(dump_yaml(load_run_config("run.yaml")))
    run.append_metrics({"step": 0, "attempt": 1})
    assert submit("--set", "seed=5") == ExitCode.CONFIG
    assert "seed: 0 -> 5" in capsys.readouterr().err
    assert not api.jobs


@pytest.mark.parametrize(("token", "said"), [(None, "wants a Ray token"), ("wrong", "does not accept our Ray token")])
def test_tokens_that_do_not_fit(token: str | None, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if token is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with JobsApi("right") as api:
        write_cluster(api)
        assert submit() == ExitCode.UNREACHABLE
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 2
        assert said in lines[0]
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
        assert submit() == 0
        assert "right" not in json.dumps(api.jobs)


@pytest.mark.parametrize(
    ("dashboard", "code", "said"),
    [
        ("http://127.0.0.1:1", ExitCode.UNREACHABLE, "no Ray cluster takes jobs at http://127.0.0.1:1"),
        ("http://10.1.2.3:8265", ExitCode.UNREACHABLE, "there is no token for it"),
        ("http://[fe80::1]:8265/", ExitCode.UNREACHABLE, "the Ray cluster at [fe80::1]:8265 can be reached"),
        ("http://10.1.2.3", ExitCode.UNREACHABLE, "the Ray cluster at 10.1.2.3:80 can be reached"),
        ("head:8265", ExitCode.CONFIG, "dashboard: expected"),
        (f"http://me:{SECRET}@head:8265", ExitCode.CONFIG, "dashboard: expected"),
        ("null", ExitCode.CONFIG, "has no dashboard"),
    ],
)
def test_addresses_that_are_no_good(dashboard: str, code: ExitCode, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("ray.yaml").write_text(f"kind: ray\ndashboard: {dashboard}\n")
    assert submit() == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert said in lines[0]
    assert not Path("storage").exists()


def test_addresses_of_others_do_not_lead_astray(api: JobsApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:2")
    assert submit() == 0
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:2"


def test_a_local_cluster_is_for_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("submit", "run.yaml", "--cluster", "local") == ExitCode.USAGE
    assert "maskwright run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "code"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, ExitCode.OK),
        ({"status": "FAILED", "driver_exit_code": 12}, ExitCode.DIVERGED),
        ({"status": "FAILED", "driver_exit_code": 137}, ExitCode.INTERRUPTED),
        ({"status": "STOPPED"}, ExitCode.INTERRUPTED),
        ({"status": "FAILED", "message": "runtime_env setup failed"}, ExitCode.FAILED),
    ],
)
def test_who_follows_sees_what_is_printed_and_exits_alike(
    told: dict[str, object], code: ExitCode, api: JobsApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = api.answer

    def end_when_asked(method: str, path: str, body: bytes) -> tuple[int, object]:
        if path.endswith("/logs"):
            api.log += "a line\n"
            if api.log.count("line") == 2:
                next(iter(api.jobs.values())).update(told)
        return answer(method, path, body)

    monkeypatch.setattr(api, "answer", end_when_asked)
    monkeypatch.setattr(verbs_submit, "_LOOK_S", 0.01)
    assert submit("--follow") == code
    printed = capsys.readouterr()
    assert "a line\na line\na line\n" in printed.out
    assert len(printed.err.splitlines()) == (0 if code == told.get("driver_exit_code") else 2), "a command that ended by itself has told it already"


def test_programs_read_answers_only(api: JobsApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the job prints goes to stderr, where people are told things; of `logs` it is the answer, a line each."""
    monkeypatch.setattr(verbs_submit, "_LOOK_S", 0.01)
    answer = api.answer

    def end_when_asked(method: str, path: str, body: bytes) -> tuple[int, object]:
        if path.endswith("/logs"):
            next(iter(api.jobs.values())).update({"status": "SUCCEEDED", "driver_exit_code": 0})
        return answer(method, path, body)

    monkeypatch.setattr(api, "answer", end_when_asked)
    api.log = "one\ntwo\n"
    assert submit("--follow", "--json") == 0
    printed = capsys.readouterr()
    (submitted,) = require_documented("submit", printed.out)
    assert (submitted["submission"], len(printed.out.splitlines())) == (next(iter(api.jobs)), 1)
    assert "one\ntwo\n" in printed.err
    assert invoke("logs", "tiny", "--storage", "storage", "--json") == 0
    printed = capsys.readouterr()
    assert require_documented("logs", printed.out) == [{"attempt": 0, "rank": 0, "line": line} for line in ("one", "two")]
    assert len(printed.out.splitlines()) == 2


@pytest.mark.parametrize("held", ["elsewhere", "by nobody"])
def test_stop_tells_programs_what_it_tells_people(
    held: str, api: JobsApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A driver that was ended on another machine still holds its lease for a while; a job that has not begun never had one."""
    assert submit() == 0
    (job,) = api.jobs
    monkeypatch.setattr(verbs_stop, "KILL_AFTER_S", 0.0)
    if held == "elsewhere":
        with Lease.acquire(tiny()) as lease:
            pass
        tiny().lease.write_json(asdict(replace(lease.state, machine="the head", time=time.time())))
        tiny().append_event("command_started", attempt=0, verb="run", submission=job)
    capsys.readouterr()
    assert invoke("stop", "tiny", "--storage", "storage", "--now", "--json") == 0
    (status,) = require_documented("stop", capsys.readouterr().out)
    state = "interrupted" if held == "elsewhere" else "stopped"
    assert (status["state"], status["exit_code"], status["pid"]) == (state, ExitCode.INTERRUPTED, None)


def test_what_waits_can_be_stopped(api: JobsApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    assert invoke("stop", "tiny", "--storage", "storage") == 0
    (job,) = api.jobs.values()
    assert job["status"] == "STOPPED"
    assert "run tiny stopped; nothing saved yet" in capsys.readouterr().out
    assert invoke("stop", "tiny", "--storage", "storage") == ExitCode.CONFLICT


def test_a_driver_that_does_not_answer_is_ended_through_its_cluster(
    api: JobsApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit() == 0
    (job,) = api.jobs
    with Lease.acquire(tiny()) as lease:
        pass
    monkeypatch.setattr(verbs_stop, "KILL_AFTER_S", 0.5)
    tiny().lease.write_json(asdict(replace(lease.state, machine="the head", time=time.time())))
    tiny().append_event("command_started", attempt=0, verb="run", submission="another")
    assert invoke("stop", "tiny", "--storage", "storage", "--now") == ExitCode.CONFLICT, "nobody knows how to end that one"
    assert api.jobs[job]["status"] == "PENDING"
    tiny().append_event("command_started", attempt=0, verb="run", submission=job)
    assert invoke("stop", "tiny", "--storage", "storage", "--now") == 0
    assert api.jobs[job]["status"] == "STOPPED"
    said = capsys.readouterr().out
    assert "run tiny interrupted" in said
    assert "which `resume` waits for" in said
    monkeypatch.setattr(lease_module, "STALE_AFTER_S", 0.5)
    assert invoke("resume", "tiny", "--storage", "storage") == 0


def drive(job: str) -> None:
    """As the job does: take the run, and leave it."""
    with Lease.acquire(tiny()):
        tiny().append_event("command_started", attempt=0, verb="run", submission=job)
        tiny().append_event("stopped", attempt=1)


def test_a_submitted_run_is_resumed_where_it_ran(api: JobsApi) -> None:
    assert submit() == 0
    drive(next(iter(api.jobs)))
    assert invoke("resume", "tiny", "--storage", "storage", "--set", "schedule.steps=40") == 0
    submission = newest_submission(tiny())
    assert submission is not None
    cluster = str(submission_folder(tiny(), 2) / "inside.yaml")
    assert submission.arguments == ["resume", str(tiny().root), "--set", "schedule.steps=40", "--cluster", cluster]
    assert list(api.jobs)[1:] == [submission.job]


@pytest.mark.parametrize("is_stopped", [True, False])
def test_what_nobody_drove_is_resumed_as_it_was_meant(is_stopped: bool, api: JobsApi) -> None:
    """The run's folder has the configuration of the command before."""
    assert submit() == 0
    drive(next(iter(api.jobs)))
    assert submit("--set", "schedule.steps=40") == 0
    if is_stopped:
        assert invoke("stop", "tiny", "--storage", "storage") == 0
    else:
        api.jobs[list(api.jobs)[1]]["status"] = "FAILED"
    assert invoke("resume", "tiny", "--storage", "storage", "--set", "schedule.warmup_steps=7") == 0
    submission = newest_submission(tiny())
    assert submission is not None
    folder = submission_folder(tiny(), 3)
    assert submission.arguments == ["run", str(folder / "run.yaml"), "--cluster", str(folder / "inside.yaml")]
    config = load_run_config(str(folder / "run.yaml"))
    assert (config.schedule.steps, config.schedule.warmup_steps) == (40, 7)


def test_a_resume_that_nobody_drove_keeps_what_it_was_to_change(api: JobsApi) -> None:
    assert submit() == 0
    drive(next(iter(api.jobs)))
    assert invoke("resume", "tiny", "--storage", "storage", "--set", "schedule.steps=40") == 0
    assert invoke("stop", "tiny", "--storage", "storage") == 0
    assert invoke("resume", "tiny", "--storage", "storage") == 0
    submission = newest_submission(tiny())
    assert submission is not None
    assert submission.arguments[:4] == ["resume", str(tiny().root), "--set", "schedule.steps=40"]


def test_a_token_goes_to_no_address_that_another_user_wrote(
    api: JobsApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    assert submit() == 0
    asked, answer = list[str](), api.answer

    def note(method: str, path: str, body: bytes) -> tuple[int, object]:
        asked.append(path)
        return answer(method, path, body)

    monkeypatch.setattr(api, "answer", note)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    capsys.readouterr()
    for verb in (["stop", "tiny"], ["resume", "tiny"]):
        assert invoke(*verb, "--storage", "storage") == ExitCode.UNREACHABLE
        assert "another user submitted run tiny" in capsys.readouterr().err
    assert "another user" in status(capsys)[2]
    assert not asked
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", api.address)
    assert status(capsys)[2] == ""
    assert asked


def test_who_lists_asks_no_cluster(api: JobsApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    api.jobs.clear()
    capsys.readouterr()
    assert invoke("list", "--storage", "storage", "--json") == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["submitted"]


@pytest.mark.parametrize("dashboard", ["file:///etc/passwd", "http://me@head:8265", "http://head:8265/?to=there", "head"])
def test_an_address_in_storage_that_is_none_is_no_submission(dashboard: str) -> None:
    file = submission_folder(tiny(), 1) / "submission.json"
    file.write_json({**asdict(a_submission(tiny())), "dashboard": dashboard})
    assert newest_submission(tiny()) is None


def test_what_waits_on_a_cluster_that_is_gone_is_given_up_when_asked(api: JobsApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    api.__exit__(None, None, None)
    assert invoke("stop", "tiny", "--storage", "storage") == ExitCode.UNREACHABLE
    assert "maskwright stop --now" in capsys.readouterr().err
    assert invoke("stop", "tiny", "--storage", "storage", "--now") == 0
    state, code, cause = status(capsys)
    assert (state, code) == ("stopped", ExitCode.INTERRUPTED)
    assert "was stopped before it began" in cause
    with JobsApi() as other:
        write_cluster(other)
        assert submit() == 0
        assert [job[-5:] for job in other.jobs] == ["-0002"]
    api.__enter__()


def test_the_log_of_a_job_is_waited_for_only_while_its_cluster_answers(
    api: JobsApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit() == 0
    api.__exit__(None, None, None)
    monkeypatch.setattr(watching, "SILENCE_S", 0.1)
    assert invoke("logs", "tiny", "--storage", "storage", "-f") == ExitCode.UNREACHABLE
    assert "whether it still waits is not known" in capsys.readouterr().err
    api.__enter__()


def test_the_log_is_that_of_what_was_submitted_last(api: JobsApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    drive(next(iter(api.jobs)))
    tiny().rank_log(1, 0).write_bytes(b"the old attempt\n")
    assert submit() == 0
    api.log = "preparing\n"
    capsys.readouterr()
    assert invoke("logs", "tiny", "--storage", "storage") == 0
    assert capsys.readouterr().out == "preparing\n"
    assert invoke("logs", "tiny", "--storage", "storage", "--attempt", "1") == 0
    assert capsys.readouterr().out == "the old attempt\n"


def test_nothing_of_a_run_that_waits_is_removed(api: JobsApi, capsys: pytest.CaptureFixture[str]) -> None:
    """To remove, a lease is taken, by whose number a job would know that it is not wanted any more."""
    assert submit() == 0
    (tiny().checkpoints / "step-00000005.partial" / "part").write_bytes(b"x")
    assert invoke("clean", "tiny", "--storage", "storage", "--yes") == ExitCode.CONFLICT
    assert invoke("clean", "--storage", "storage", "--yes") == 0
    assert "waits on a cluster" in capsys.readouterr().out
    assert waiting_submission(tiny()) is not None


def test_the_log_of_a_job_that_has_not_trained(api: JobsApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    api.log = "preparing\n"
    assert invoke("logs", "tiny", "--storage", "storage") == 0
    assert capsys.readouterr().out.endswith("preparing\n")


def test_the_log_of_a_job_is_waited_for(api: JobsApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    (job,) = api.jobs
    looks, answer = [], api.answer

    def end_at_the_third_look(method: str, path: str, body: bytes) -> tuple[int, object]:
        looks.extend([path] if path == f"/api/jobs/{job}" else [])
        if len(looks) == 3:
            api.log = "killed\n"
            api.jobs[job]["status"] = "FAILED"
        return answer(method, path, body)

    monkeypatch.setattr(api, "answer", end_at_the_third_look)
    assert invoke("logs", "tiny", "--storage", "storage", "-f") == 0
    assert capsys.readouterr().out.endswith("killed\n")
    assert len(looks) == 3


def test_a_submitted_run_is_watched_from_its_wait_to_its_end(
    api: JobsApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit() == 0
    capsys.readouterr()
    monkeypatch.setattr("launcher.verbs_status.time.sleep", lambda _: drive(next(iter(api.jobs))))
    assert invoke("status", "tiny", "--storage", "storage", "--watch", "--exit-code") == ExitCode.INTERRUPTED
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["submitted", "stopped"]


def test_a_cluster_that_is_gone_is_not_watched_for_ever(api: JobsApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    api.__exit__(None, None, None)
    monkeypatch.setattr(watching, "SILENCE_S", 0.0)
    assert invoke("status", "tiny", "--storage", "storage", "--watch") == ExitCode.UNREACHABLE
    assert len(capsys.readouterr().err.splitlines()) == 2
    api.__enter__()


def test_the_log_of_any_rank_is_followed_from_before_its_run_begins(
    api: JobsApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit() == 0
    (job,) = api.jobs
    capsys.readouterr()

    def begin_and_end() -> None:
        with Lease.acquire(tiny()):
            tiny().append_event("command_started", attempt=0, verb="run", submission=job)
            claim_attempt(tiny())
            for rank in range(2):
                tiny().rank_log(1, rank).write_bytes(f"rank {rank} begins\nrank {rank} ends\n".encode())
            tiny().append_event("finished", attempt=1)

    pauses = iter([lambda: None, begin_and_end])
    monkeypatch.setattr("launcher.verbs_run.time.sleep", lambda _: next(pauses)())
    assert invoke("logs", "tiny", "--storage", "storage", "--rank", "1", "-f") == 0
    assert capsys.readouterr().out == "rank 1 begins\nrank 1 ends\n"


def test_packages_that_are_too_large_are_not_sent(api: JobsApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(job_request, "MOST_BYTES", 1000)
    assert submit() == ExitCode.ENVIRONMENT
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "more than the 1,000 that may travel with a job" in lines[0]
    assert not api.jobs
    assert not Path("storage").exists()


def test_what_a_submission_took_is_in_the_events(api: JobsApi) -> None:
    assert submit() == 0
    (event,) = tiny().read_events()
    assert (event["kind"], [event["submission"]]) == ("submitted", list(api.jobs))
    assert min(event[key] for key in ("command_s", "packing_s", "upload_s")) >= 0
    assert read_status(tiny()).start_up == {}
    drive(event["submission"])
    tiny().append_event("attempt_started", attempt=1, stage="pretrain")
    tiny().append_event("first_step", attempt=1, step_s=0.0)
    assert {"command", "packing", "upload", "job", "driver"} <= set(read_status(tiny()).start_up)


def test_the_job_runs_the_command_of_the_submission_where_it_was_submitted(here: Path) -> None:
    run = tiny()
    submission = Submission(1, "job-1", "http://head:8265", ["list", "--storage", "elsewhere"], str(here), 0, "laptop", 1.5)
    claim(run, submission)
    done = subprocess.run(
        [sys.executable, "-m", "launcher.submitted", str(run.root), "1"], cwd="/", capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"no runs in {here / 'elsewhere'}" in done.stdout


def test_storage_that_the_head_does_not_see(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher.submitted", str(here / "no"), "1"], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == ExitCode.STORAGE
    assert len(done.stderr.strip().splitlines()) == 2
    assert "does not see submission 1" in done.stderr


@pytest.mark.parametrize(
    ("job", "state", "code", "cause"),
    [
        (JobState("ended", exit_code=0), "finished", 0, ""),
        (JobState("ended", exit_code=14, message="logs:\nerror: one\nfirst\nerror: two\nsecond\nnext"), "failed", 14, "two"),
        (JobState("ended", exit_code=75, message="error: one\nfirst\ninterrupted: two\nsecond\n"), "stopped", ExitCode.INTERRUPTED, "two"),
        (JobState("ended", exit_code=137), "interrupted", ExitCode.INTERRUPTED, "killed (exit code 137)"),
        (JobState("ended", exit_code=-9), "interrupted", ExitCode.INTERRUPTED, "killed (exit code -9)"),
        (JobState("ended", exit_code=127, message="sh: x: not found\n"), "failed", ExitCode.ENVIRONMENT, "sh: x: not found"),
        (JobState("ended", was_stopped=True), "stopped", ExitCode.INTERRUPTED, "was stopped"),
        (JobState("ended", message="supervisor died: x\n\n.\n"), "failed", ExitCode.FAILED, "supervisor died: x"),
        (JobState("ended"), "failed", ExitCode.FAILED, "the job failed"),
        (JobState("unknown"), "interrupted", ExitCode.INTERRUPTED, "does not know"),
    ],
)
def test_how_jobs_end(job: JobState, state: str, code: int, cause: str) -> None:
    end = end_of(a_submission(tiny()), job)
    assert (end.state, end.exit_code) == (state, code)
    assert cause in end.cause
    assert ": two" not in end.cause
    assert end.remedy == ("second" if cause == "two" else "Submit the run again.")
