"""Secrets by name: where they are taken from, what is refused, and that no artefact of a rank has their values."""

import json
import multiprocessing
import os
import traceback
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import ConfigError, EnvironmentMismatchError, ExitCode
from data_pipeline.storage import Location
from launcher import cli
from launcher.attempts import claim_attempt, read_failure
from launcher.cluster_config import KubeRayCluster, LocalCluster
from launcher.cluster_environment import SecretFile
from launcher.config import validate_cluster
from launcher.env_from import take_variables
from launcher.policy import FailureKind
from launcher.worker_process import WorkerTask, run_task
from tests.support.tiny_run import tiny_config
from trainer import redaction
from trainer.context import RunContext
from trainer.redaction import redacted, without_hidden
from trainer.runlog import RunFolder

SECRET = "planted-secret-9b1c"
OTHER = "another-secret-77aa"


@pytest.fixture(autouse=True)
def _own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a test takes stays in this process."""
    monkeypatch.setattr(redaction, "_hidden", [])
    monkeypatch.setattr(os, "environ", dict(os.environ))


def a_file(folder: Path, text: str, mode: int = 0o600) -> SecretFile:
    path = folder / "secrets.env"
    path.write_text(text)
    path.chmod(mode)
    return SecretFile(file=str(path))


def test_variables_come_from_the_environment_and_from_files(tmp_path: Path) -> None:
    os.environ["PLANTED"] = SECRET
    take_variables(["PLANTED", a_file(tmp_path, f"# tokens\n\nOTHER_KEY={OTHER}=x\nEMPTY=\n")])
    assert os.environ["OTHER_KEY"] == f"{OTHER}=x"
    assert os.environ["EMPTY"] == ""
    assert without_hidden(f"a {SECRET} and {OTHER}=x.") == redacted(f"a {SECRET} and {OTHER}=x.") == "a (redacted) and (redacted)."


def test_short_values_are_words_and_no_secrets() -> None:
    os.environ["PLANTED"] = "1"
    take_variables(["PLANTED"])
    assert redacted("step 11 of 100") == "step 11 of 100"


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        (f"KEY={SECRET}", 0o644, "can be read or changed by others (mode 0644)"),
        (f"KEY={SECRET}", 0o620, "mode 0620"),
        (f"KEY={SECRET}\nexport OTHER={SECRET}", 0o600, "line 2 of"),
        (SECRET, 0o600, "line 1 of"),
    ],
)
def test_files_that_are_no_good_are_refused_and_not_told(text: str, mode: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentMismatchError) as caught:
        take_variables([a_file(tmp_path, text, mode)])
    assert said in caught.value.cause
    assert SECRET not in f"{caught.value.cause}{caught.value.remedy}"
    assert "KEY" not in os.environ


def test_what_a_machine_lacks_is_named(tmp_path: Path) -> None:
    for source, said in ((SecretFile(file=str(tmp_path / "no.env")), "no.env cannot be read"), ("MISSING", "the variable MISSING is not set")):
        with pytest.raises(EnvironmentMismatchError, match=said):
            take_variables([source])
    (tmp_path / "link.env").symlink_to(a_file(tmp_path, f"KEY={SECRET}").file)
    with pytest.raises(EnvironmentMismatchError):
        take_variables([SecretFile(file=str(tmp_path / "link.env"))])


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        ({"env_from": [{"secret": "a", "keys": ["B"]}]}, "expected names of variables or {file: PATH}"),
        ({"kind": "kuberay", "environment": {"image": "a"}, "env_from": ["B"]}, "expected {secret: NAME, keys: [VARIABLE]}"),
        ({"env_from": [f"KEY={SECRET}"]}, "env_from"),
    ],
)
def test_each_kind_of_cluster_has_its_own_secrets(cluster: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_cluster(cluster, "test")
    assert said in caught.value.cause


def test_inside_kubernetes_secrets_are_variables() -> None:
    cluster = validate_cluster({"kind": "kuberay", "environment": {"image": "a"}, "env_from": [{"secret": "a", "keys": ["B", "C"]}]}, "test")
    assert isinstance(cluster, KubeRayCluster)
    assert cluster.inside().env_from == ("B", "C")


def entry_leaks(context: RunContext, seen: str) -> None:
    """Says its secrets in every way that it has."""
    import logging

    Path(seen).write_text(json.dumps([os.environ["PLANTED"], os.environ["OTHER_KEY"]]))
    print("printed", os.environ["PLANTED"], os.environ["OTHER_KEY"])
    logging.getLogger("tracker").warning("logged in with %s", os.environ["OTHER_KEY"])
    context.run.append_event("tracker_failed", attempt=1, causes=[f"the tracker does not know {os.environ['PLANTED']}"])
    raise RuntimeError("the tracker is of no use") from ValueError(f"the tracker does not know {os.environ['PLANTED']}")


def what_ray_sees(task: WorkerTask, told: str) -> None:
    """Run the task as Ray does, and keep what it raises."""
    try:
        run_task(task, 0, 1, lambda: True)
    except RuntimeError as error:
        Path(told).write_text("".join(traceback.format_exception(error)))


def test_a_rank_has_its_secrets_and_nothing_that_it_leaves_behind_does(tmp_path: Path) -> None:
    os.environ["PLANTED"] = SECRET
    run = RunFolder(Location.at(tmp_path / "runs" / "run"))
    sources = ("PLANTED", a_file(tmp_path, f"OTHER_KEY={OTHER}"))
    seen = str(tmp_path / "seen")
    task = WorkerTask(f"{__name__}:entry_leaks", {"seen": seen}, run.root.url, claim_attempt(run), threads=1, home=str(tmp_path), env_from=sources)
    told = tmp_path / "runs" / "told-to-ray"
    process = multiprocessing.get_context("fork").Process(target=what_ray_sees, args=(task, str(told)))
    process.start()
    process.join(100)  # it imports torch
    assert process.exitcode == 0
    assert json.loads(Path(seen).read_text()) == [SECRET, OTHER]
    log = run.rank_log(1, 0).read_bytes().decode()
    assert "printed (redacted) (redacted)" in log
    assert "logged in with (redacted)" in log
    assert "the tracker is of no use" in told.read_text()
    assert run.read_events()[-1]["causes"] == ["the tracker does not know (redacted)"]
    failure = read_failure(run, 1)
    assert failure is not None
    assert failure.cause == "rank 0: RuntimeError: the tracker is of no use"
    assert "the tracker does not know (redacted)" in failure.traceback
    files = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert len(files) >= 3
    assert not [path for path, data in files.items() if SECRET.encode() in data or OTHER.encode() in data]
    assert SECRET not in repr(task)


def test_a_rank_whose_machine_lacks_a_secret_fails_for_good(tmp_path: Path) -> None:
    run = RunFolder(Location.at(tmp_path / "run"))
    task = WorkerTask(f"{__name__}:entry_leaks", {"seen": ""}, run.root.url, claim_attempt(run), threads=1, home=str(tmp_path), env_from=("MISSING",))
    process = multiprocessing.get_context("fork").Process(target=run_task, args=(task, 0, 1, lambda: True))
    process.start()
    process.join(60)
    failure = read_failure(run, 1)
    assert failure is not None
    assert (failure.kind, failure.exit_code) == (FailureKind.KNOWN, ExitCode.ENVIRONMENT)
    assert "the variable MISSING is not set" in failure.cause


def test_a_command_without_its_secrets_ends_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**tiny_config(), "storage": str(tmp_path / "storage")}))
    (tmp_path / "here.yaml").write_text(yaml.safe_dump({"env_from": ["MISSING"]}))
    code = cli.run(["run", str(tmp_path / "run.yaml"), "--cluster", str(tmp_path / "here.yaml")], debug=False)
    lines = capsys.readouterr().err.strip().splitlines()
    assert (code, len(lines)) == (ExitCode.ENVIRONMENT, 2)
    assert "MISSING" in lines[0]
    assert not (tmp_path / "storage").exists()
    assert LocalCluster(env_from=("MISSING",)).model_dump(mode="json")["env_from"] == ["MISSING"]
