"""The command line: exit codes, two-line errors, start-up without heavy libraries, `--json`."""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import ExitCode
from data_pipeline.storage import Location
from launcher import cli, verbs_model, verbs_stop
from launcher.config import dump_yaml
from launcher.lease import Lease
from launcher.options import command, completed
from trainer.config import RunConfig
from trainer.manifest import Circumstances, FileDigest, Manifest
from trainer.runlog import RunFolder
from trainer.state import TrainState

HEAVY = ("torch", "ray", "transformers", "pandas", "deepspeed", "accelerate", "webdataset", "pyarrow", "matplotlib", "sklearn")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MASKWRIGHT_STORAGE", raising=False)
    return tmp_path


@pytest.fixture
def made(here: Path) -> RunFolder:
    """A run of ten steps that has a configuration and nothing else."""
    run = RunFolder(Location.at(here / "runs/made"))
    run.config.write_bytes(dump_yaml(RunConfig.model_validate({"name": "made", "schedule": {"steps": 10, "warmup_steps": 1}})))
    return run


def write_config(**sections: object) -> str:
    Path("c.yaml").write_text(yaml.safe_dump({"name": "a", **sections}))
    return "c.yaml"


def invoke(*arguments: str) -> int:
    return cli.run(list(arguments), debug=False)


def error_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["status", "nope"]])
def test_start_up_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"import sys\nfrom launcher.cli import run\nrun({arguments!r}, debug=False)\nprint('LOADED', sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "LOADED []" in done.stdout, done.stdout[-300:]


def test_ranks_are_started_without_torch() -> None:
    """They import it themselves: the command that drives them would make them wait for seconds."""
    code = "import sys, launcher.retries, launcher.ray_worker\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"


def test_help_takes_less_than_a_second_of_cpu() -> None:
    code = "import time\nfrom launcher.cli import run\nrun(['--help'], debug=False)\nprint(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout.split()[-1]) < 1.0


@pytest.mark.parametrize("verb", [command.name for command in cli.app.registered_commands])
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(verb, "--help") == 0
    assert f"Example: maskwright {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nonsense"], ExitCode.USAGE),
        (["run"], ExitCode.USAGE),
        (["inspect", "c.yaml"], ExitCode.USAGE),
        (["inspect", "c.yaml", "--step", "-1"], ExitCode.USAGE),
        (["inspect", "c.yaml", "--step", "x"], ExitCode.USAGE),
        (["run", "no.yaml"], ExitCode.NOT_FOUND),
        (["prepare", "no.yaml"], ExitCode.NOT_FOUND),
        (["run", "c.yaml", "--set", "sede=1"], ExitCode.CONFIG),
        (["run", "c.yaml", "--set", "batch.global_batch_size=33"], ExitCode.CONFIG),
        (["run", "c.yaml", "--cluster", "nowhere"], ExitCode.NOT_FOUND),
        (["prepare", "c.yaml", "--set", "corpus.source=absent.txt"], ExitCode.NOT_FOUND),
        (["inspect", "c.yaml", "--step", "0", "--set", "corpus.source=absent.txt"], ExitCode.NOT_FOUND),
        (["inspect", "c.yaml", "--step", "2000000"], ExitCode.USAGE),
        (["inspect", "c.yaml", "--step", "0", "--world-size", "2", "--rank", "2"], ExitCode.USAGE),
        (["status", "nope"], ExitCode.NOT_FOUND),
        (["logs", "nope"], ExitCode.NOT_FOUND),
        (["stop", "nope"], ExitCode.NOT_FOUND),
        (["resume", "nope"], ExitCode.NOT_FOUND),
        (["export", "nope"], ExitCode.NOT_FOUND),
        (["finetune", "nope"], ExitCode.NOT_FOUND),
        (["evaluate", "nope"], ExitCode.NOT_FOUND),
        (["report", "nope"], ExitCode.NOT_FOUND),
        (["verify", "nope"], ExitCode.NOT_FOUND),
        (["clean", "nope"], ExitCode.NOT_FOUND),
        (["stop", "made"], ExitCode.CONFLICT),
        (["logs", "made"], ExitCode.NOT_FOUND),
        (["export", "made"], ExitCode.NOT_FOUND),
        (["profile", "nope"], ExitCode.NOT_FOUND),
        (["profile", "made"], ExitCode.NOT_FOUND),
        (["profile", "made", "--steps", "10"], ExitCode.USAGE),
        (["profile", "made", "--steps", "0"], ExitCode.USAGE),
        (["finetune", "made"], ExitCode.USAGE),
        (["finetune", "made", "--set", "finetune.tasks=[{name: a, path: b}]"], ExitCode.NOT_FOUND),
        (["evaluate", "made"], ExitCode.USAGE),
        (["evaluate", "made", "--text", "a [MASK]"], ExitCode.NOT_FOUND),
        (["resume", "made", "--set", "seed=5"], ExitCode.CONFIG),
        (["resume", "made", "--set", "nonsense=5"], ExitCode.CONFIG),
    ],
)
def test_bad_input(arguments: list[str], code: ExitCode, made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    write_config()
    made.append_metrics({"step": 0, "attempt": 1})
    assert invoke(*arguments) == code
    lines = error_of(capsys)
    assert lines
    if code != ExitCode.USAGE:
        assert lines[0].startswith("error: ")
        assert len(lines) == 2, "one line of cause, one of remedy"
    assert not any("Traceback" in line for line in lines)


def test_commands_that_are_named_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("status", "nope", "--storage", "my runs") == ExitCode.NOT_FOUND
    assert command("run", "my configs/a.yaml", overrides=["finetune.tasks=[{name: a}]"], storage="my runs") == (
        "maskwright run 'my configs/a.yaml' --set 'finetune.tasks=[{name: a}]' --storage 'my runs'"
    )
    assert completed("Look at it, then `maskwright resume`.", run="a b") == "Look at it, then `maskwright resume 'a b'`."
    assert completed("Run `maskwright status demo`.", run="other", storage="my runs") == "Run `maskwright status demo --storage 'my runs'`."
    assert completed("Run `maskwright status /runs/demo`.", storage="my runs") == "Run `maskwright status /runs/demo`."
    assert completed("`maskwright schema` lists every key.", run="a", storage="b") == "`maskwright schema` lists every key."


def test_a_first_run_that_failed_can_be_corrected_until_something_was_trained(capsys: pytest.CaptureFixture[str]) -> None:
    write_config()
    typo = ("run", "c.yaml", "--set", "corpus.source=artcles.txt", "--storage", "runs")
    assert invoke(*typo) == ExitCode.NOT_FOUND
    assert invoke(*typo[:-3], "corpus.source=articles.txt", "--set", "seed=7", *typo[-2:]) == ExitCode.NOT_FOUND
    assert "articles.txt" in error_of(capsys)[-2], "the change is taken, and the next thing that is wrong is told"
    run = RunFolder(Location.at("runs/a"))
    assert [(e["path"], e["after"]) for e in run.read_events() if e["kind"] == "config_changed"] == [
        ("corpus.source", "articles.txt"),
        ("seed", 7),
    ]
    run.append_metrics({"step": 0, "attempt": 1})
    assert invoke(*typo) == ExitCode.CONFIG
    assert "cannot continue with corpus.source" in error_of(capsys)[0]


@pytest.mark.parametrize("storage", ["file.txt", "file.txt/below"])
def test_a_storage_that_is_a_file_is_an_error_of_storage(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_config()
    Path("file.txt").write_text("not a folder")
    assert invoke("run", "c.yaml", "--storage", storage) == ExitCode.STORAGE
    assert "a file is where a folder has to be" in error_of(capsys)[0]


def test_a_misspelt_architecture_is_one_error_and_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    for objective in ({}, {"sentence_objective": "none"}):  # refused with the file, or only when the network is asked for
        write_config(model={"architecture": "modrenbert"}, objective=objective, batch={"packing": "rows"} if not objective else {})
        assert invoke("run", "c.yaml") == ExitCode.CONFIG
        first, remedy = error_of(capsys)
        assert first.endswith("model.architecture modrenbert: there is no masked language model of that name; nearest: modernbert")
        assert remedy.startswith("Correct ")
        assert not Path("runs").exists()


def test_export_stays_in_the_models_folder(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("..", "a/b", "", ".hidden"):
        assert invoke("export", "made", "--name", name) == ExitCode.USAGE
    assert len(error_of(capsys)) == 8


def test_status_counts_attempts_of_pretraining_and_what_was_left_out(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    made.append_event("attempt_started", attempt=1, stage="pretrain")
    for step in (3, 4):
        made.append_event("data_skipped", attempt=1, step=step, corpus="c", shard="train-000000.tar", block=2, samples=9, cause="damaged")
    made.append_event("batch_skipped", attempt=1, step=5)
    made.append_event("attempt_started", attempt=2, stage="finetune")
    assert invoke("status", "made", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["attempt"], found["pretrain_attempts"], found["blocks_skipped"], found["batches_skipped"]) == (0, 1, 1, 1)
    assert invoke("status", "made") == 0
    out = capsys.readouterr().out
    assert "1 of pretraining, 0 resumed, 0 steps lost" in out
    assert "1 damaged blocks, 1 batches in numeric trouble" in out


def test_status_and_list_name_the_losses_of_the_objective(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"name": "made", "objective": "clm", "model": {"architecture": "gpt2"}}
    made.config.write_bytes(dump_yaml(RunConfig.model_validate(model)))
    made.append_metrics({"step": 0, "attempt": 1, "mlm_loss": 3.5, "nsp_loss": None, "tokens_per_s": 1000.0})
    assert invoke("status", "made") == 0
    out = capsys.readouterr().out
    assert "clm loss" in out
    assert not any(name in out for name in ("mlm", "nsp"))
    assert invoke("list") == 0
    assert "clm 3.5000" in capsys.readouterr().out
    assert invoke("status", "made", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["losses"], found["mlm_loss"], found["nsp_loss"]) == ({"clm": 3.5}, 3.5, None)


def test_list_goes_on_with_the_run_that_was_at_work_last(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Not with the last by name."""
    other = RunFolder(made.root.parent / "zero")
    other.config.write_bytes(made.config.read_bytes())
    other.append_event("command_started", attempt=0, verb="run", time=100.0)
    made.append_event("command_started", attempt=0, verb="run", time=200.0)
    assert invoke("list") == 0
    assert capsys.readouterr().out.rstrip().endswith("next: maskwright status made")


def test_a_run_that_only_fine_tunes_counts_no_steps(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    made.append_event("command_started", attempt=0, verb="finetune")
    assert invoke("status", "made") == 0
    assert "of 10" not in capsys.readouterr().out
    assert invoke("list") == 0
    assert "0/10" not in capsys.readouterr().out


def test_a_byte_that_is_no_text_does_not_end_status(made: RunFolder) -> None:
    made.append_event("command_started", attempt=0, verb="run")
    with made.events.path.open("ab") as file:
        file.write(b'{"kind": "\xff\xfe\n')
    assert invoke("status", "made") == 0


def test_a_current_folder_that_is_gone(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gone = here / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        assert invoke("list") == ExitCode.USAGE
    finally:
        os.chdir(here)
    assert error_of(capsys)[0] == "error: the current folder no longer exists"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["status", "nope"], debug=True) == ExitCode.NOT_FOUND
    assert "Traceback" in capsys.readouterr().err


def test_an_unforeseen_exception_is_a_line_and_exit_code_1(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    made.events.write_bytes(b'{"no": "kind"}\n')
    assert invoke("status", "made") == ExitCode.INTERNAL
    lines = error_of(capsys)
    assert lines[0].startswith("internal error: KeyError")
    assert "--debug" in lines[1]


def test_running_run_is_a_conflict_for_run_and_resume(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(name="made", schedule={"steps": 10, "warmup_steps": 1})
    with Lease.acquire(made):
        assert invoke("resume", "made") == ExitCode.CONFLICT
        assert "already running" in error_of(capsys)[0]
        assert invoke("run", "c.yaml") == ExitCode.CONFLICT
        assert invoke("status", "made", "--exit-code") == ExitCode.RUNNING


def test_export_leaves_a_run_alone_that_is_exporting(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Both would write the same unfinished folder."""
    with Lease.acquire(made) as lease:
        lease.beat(stage="pretrain")
        assert invoke("export", "made") == ExitCode.NOT_FOUND, "there is no corpus yet"
        lease.beat(stage="export")
        assert invoke("export", "made") == ExitCode.CONFLICT
        assert "maskwright status" in error_of(capsys)[-1]


def test_run_refuses_a_configuration_that_would_make_another_model(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(name="made", schedule={"steps": 10, "warmup_steps": 1}, seed=3)
    made.append_metrics({"step": 0, "attempt": 1})
    assert invoke("run", config) == ExitCode.CONFIG
    assert "seed: 0 -> 3" in error_of(capsys)[0]
    assert "lease.json" not in made.root.children(), "the refused command left its lease"


@pytest.mark.parametrize(
    ("kinds", "state", "code"),
    [
        ([], "created", ExitCode.INTERRUPTED),
        (["command_started", "attempt_started"], "interrupted", ExitCode.INTERRUPTED),
        (["command_started", "attempt_started", "finished"], "finished", ExitCode.OK),
        (["command_started", "finished", "command_started"], "interrupted", ExitCode.INTERRUPTED),
        (["command_started", "stopped"], "stopped", ExitCode.INTERRUPTED),
        (["command_started", "failed"], "failed", ExitCode.DIVERGED),
    ],
)
def test_status_follows_from_the_run_folder(
    kinds: list[str], state: str, code: ExitCode, made: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in kinds:
        made.append_event(kind, attempt=1, exit_code=int(code), cause="c", remedy="r")
    for step in range(4):
        made.append_metrics({"step": step, "attempt": 1, "mlm_loss": 7.0 - step, "nsp_loss": None, "loss": 1.0, "tokens_per_s": 1000.0})
    assert invoke("status", "made", "--json", "--exit-code") == code
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["exit_code"], found["step"], found["steps"], found["mlm_loss"]) == (state, code, 4, 10, 4.0)
    assert invoke("list", "--json") == 0
    assert [run["id"] for run in json.loads(capsys.readouterr().out)] == ["made"]
    assert invoke("status", "made") == 0
    assert "next: maskwright" in capsys.readouterr().out


def test_a_task_that_cannot_be_read_leaves_a_finished_run_as_it_was(made: RunFolder, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made.models / "final" / "config.json").write_bytes(b"{}")
    for split in ("train", "dev", "test"):
        (here / f"{split}.jsonl").write_text('{"text": "a", "lbl": 0}\n')
    before = made.config.read_bytes()
    for path, code in (("nofolder", ExitCode.NOT_FOUND), (".", ExitCode.CONFIG)):
        assert invoke("finetune", "made", "--set", f"finetune.tasks=[{{name: a, path: {path}}}]") == code
        assert "task a: " in error_of(capsys)[0]
    assert (made.config.read_bytes(), made.read_events()) == (before, [])


def test_a_run_that_only_fine_tunes_is_not_pretrained_by_resume(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    made.append_event("command_started", attempt=0, verb="finetune")
    assert invoke("resume", "made") == ExitCode.USAGE
    assert "maskwright finetune" in error_of(capsys)[1]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runs/demo/models/final", "demo-final-finetune"),
        ("/bert", "bert-finetune"),
        ("/models/bert", "bert-finetune"),
        ("my models/gro ß/x y", "my-models-x-y-finetune"),
        ("/_/._-", "model-finetune"),
    ],
)
def test_fine_tuning_any_model_folder_makes_a_run_with_a_valid_name(folder: str, name: str) -> None:
    assert verbs_model.run_name_for(Location.at(folder)) == name


def test_a_run_that_cannot_be_read_does_not_hide_the_others(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (made.root.parent / "broken" / "run.yaml").write_bytes(b"name: broken\nsede: 3\n")
    assert invoke("list", "--json") == 0
    printed = capsys.readouterr()
    assert [run["id"] for run in json.loads(printed.out)] == ["made"]
    assert "sede: unknown key" in printed.err


@pytest.mark.parametrize(("arguments", "code"), [(["list"], 0), (["schema"], 0), (["status", "nope"], 5)])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str], code: int, made: RunFolder) -> None:
    process = subprocess.Popen([sys.executable, "-m", "launcher.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert "Traceback" not in process.stderr.read().decode()
    assert process.wait(60) == code


def test_a_terminal_that_is_closed_is_no_error(made: RunFolder) -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, "-m", "launcher.cli", "list"], stdout=theirs, stderr=subprocess.PIPE, start_new_session=True)
    os.close(theirs)
    os.close(ours)
    assert process.stderr
    assert process.stderr.read().decode() == ""
    assert process.wait(60) == 0


def test_unknown_run_names_the_nearest(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("status", "mad") == ExitCode.NOT_FOUND
    assert error_of(capsys)[1] == "Runs there: made."


def test_run_is_found_by_id_folder_and_storage(
    made: RunFolder, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke("status", "made") == 0
    assert invoke("status", "runs/made") == 0
    assert invoke("status", str(made.root)) == 0
    assert invoke("status", "made", "--storage", str(here / "elsewhere")) == ExitCode.NOT_FOUND
    monkeypatch.chdir("/")
    for verb in (["status", "made"], ["list"]):
        capsys.readouterr()
        assert invoke(*verb, "--storage", str(here / "runs")) == 0
        following = shlex.split(capsys.readouterr().out.rpartition("next: ")[2])
        assert following[3:] == ["--storage", str(here / "runs")], "the next command must find the run, too"
    monkeypatch.setenv("MASKWRIGHT_STORAGE", str(here / "runs"))
    assert invoke("status", "made") == 0


def test_logs(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    made.rank_log(1, 0).write_bytes(b"old\n")
    made.rank_log(2, 0).write_bytes(b"one\ntwo\n")
    assert invoke("logs", "made") == 0
    shown = capsys.readouterr()
    assert shown.out == "one\ntwo\n"
    assert shown.err == "attempt 2; --attempt shows those before\n"
    assert invoke("logs", "made", "--follow") == 0, "nobody drives the run, so there is nothing to wait for"
    assert capsys.readouterr().out == "one\ntwo\n"
    assert invoke("logs", "made", "--attempt", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"attempt": 1, "rank": 0, "line": "old"}
    assert invoke("logs", "made", "--rank", "7") == ExitCode.NOT_FOUND
    assert "rank-00000.log" in error_of(capsys)[1]


def test_following_the_log_of_a_killed_run_ends(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    made.rank_log(1, 0).write_bytes(b"one\ntw")
    assert invoke("logs", "made", "--follow") == 0
    assert capsys.readouterr().out == "one\ntw"
    assert invoke("logs", "made", "--follow", "--rank", "3") == ExitCode.NOT_FOUND


def test_status_tells_where_training_is_not_where_it_was_before_it_resumed(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"mlm_loss": 7.0, "nsp_loss": None, "loss": 1.0, "tokens_per_s": 1000.0}
    for attempt, steps in ((1, range(9)), (2, range(5, 7))):
        made.append_event("attempt_started", attempt=attempt)
        if attempt == 2:
            made.append_event("resumed", attempt=2, step=5, steps_lost=4)
        for step in steps:
            made.append_metrics({"step": step, "attempt": attempt, **values})
    with made.metrics.path.open("ab") as file:
        file.write(b'{"st\n')  # cut by a crash
    with Lease.acquire(made):
        assert invoke("status", "made", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["mlm_loss"], found["steps_lost"]) == (7, 7.0, 4)
    assert found["seconds_left"] >= 0


def test_status_of_a_long_run_reads_the_end_of_its_metrics(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.dumps({"step": 0, "attempt": 1, "padding": "x" * 400}).encode() + b"\n"
    made.metrics.write_bytes(record * 200_000)
    made.append_metrics({"step": 8, "attempt": 1, "mlm_loss": 3.0})
    started_at = time.process_time()
    assert invoke("status", "made", "--json") == 0
    assert time.process_time() - started_at < 0.4
    assert json.loads(capsys.readouterr().out)["step"] == 9


def test_init_copies_the_examples_and_overwrites_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("init", "mine") == 0
    assert Path("mine/runs/bert-base.yaml").is_file()
    assert Path("mine/clusters/local.yaml").is_file()
    assert "next: maskwright run mine/runs/" in capsys.readouterr().out
    assert invoke("init", "mine") == ExitCode.CONFLICT
    assert invoke("init", "mine", "--force") == 0


def test_schema_prints_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("schema") == 0
    found = json.loads(capsys.readouterr().out)
    assert "schedule" in found["run"]["properties"]
    assert "max_failures" in found["cluster"]["$defs"]["RayCluster"]["properties"]
    assert found["run"]["properties"]["seed"]["description"]


def test_verify_a_checkpoint(made: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.checkpoints.path / "step-00000005"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    assert invoke("verify", str(folder)) == ExitCode.NO_CHECKPOINT
    capsys.readouterr()
    manifest = Manifest(
        attempt=1,
        circumstances=Circumstances.now(world_size=1, zero_stage=1, precision="fp32", attention={}),
        files={"state.json": FileDigest.of(folder / "state.json")},
        train_state=TrainState(step=5),
        config={},
    )
    (folder / "MANIFEST.json").write_text(json.dumps(manifest.to_json()))
    assert invoke("verify", str(folder), "--json") == 0
    assert json.loads(capsys.readouterr().out)["intact"] is True
    (folder / "state.json").write_text("{ ")
    assert invoke("verify", str(folder)) == ExitCode.NO_CHECKPOINT
    assert "state.json" in error_of(capsys)[0]


def test_stop_kills_a_driver_that_does_not_answer(made: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with Lease.acquire(made) as lease:
            state = lease.state
        from dataclasses import replace

        from launcher.lease import process_start

        deaf_state = replace(state, pid=deaf.pid, pid_started=process_start(deaf.pid), time=time.time())
        made.lease.write_json(asdict(deaf_state))
        monkeypatch.setattr(verbs_stop, "KILL_AFTER_S", 0.3)
        assert invoke("stop", "made", "--now") == 0
        assert deaf.wait(10) == -9
        request = made.stop_request.read_json()
        assert (request["save"], request["by"]) == (False, "maskwright stop")
        assert "maskwright resume made" in capsys.readouterr().out
    finally:
        deaf.kill()
        deaf.wait()
