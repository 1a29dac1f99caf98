"""Every verb answers with --json as its schema says, as far as that needs no cluster (`tests/e2e/test_watching.py` has the others)."""

import json
from pathlib import Path

import pytest
import yaml

from data_pipeline.storage import Location
from launcher import cli
from launcher.answers.table import ANSWERS, answers_schema
from launcher.config import dump_yaml
from tests.support.answers import require_documented
from trainer.config import RunConfig
from trainer.manifest import Circumstances, FileDigest, Manifest
from trainer.runlog import RunFolder
from trainer.state import TrainState

VERBS = [command.name for command in cli.app.registered_commands if command.name]


@pytest.fixture(autouse=True)
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A storage with a run that has taken a step and left a log, a checkpoint and something to clean."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MASKWRIGHT_STORAGE", raising=False)
    Path("run.yaml").write_text(yaml.safe_dump({"name": "made", "schedule": {"steps": 10, "warmup_steps": 1}}))
    run = RunFolder(Location.at(tmp_path / "runs/made"))
    run.config.write_bytes(dump_yaml(RunConfig.model_validate({"name": "made", "schedule": {"steps": 10, "warmup_steps": 1}})))
    run.append_event("attempt_started", attempt=1, stage="pretrain")
    run.append_metrics({"step": 0, "attempt": 1, "loss": 7.5, "mlm_loss": 7.0, "nsp_loss": 0.5, "tokens_per_s": 1000.0})
    run.rank_log(1, 0).write_bytes(b"one\ntwo\n")
    checkpoint = run.checkpoints.path / "step-00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    circumstances = Circumstances.now(world_size=1, zero_stage=1, precision="fp32", attention={})
    files = {"state.json": FileDigest.of(checkpoint / "state.json")}
    manifest = Manifest(attempt=1, circumstances=circumstances, files=files, train_state=TrainState(step=5), config={})
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest.to_json()))
    (run.checkpoints.path / "step-00000010.partial-1").mkdir()
    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ["init", "mine"],
        ["schema"],
        ["schema", "--write", "schemas"],
        ["schema", "--answers"],
        ["plan", "run.yaml"],
        ["plan", "run.yaml", "--gpu", "H100", "--mfu", "0.4", "--price-per-hour", "3", "--failures-per-day", "1"],
        ["list"],
        ["status", "made"],
        ["logs", "made"],
        ["verify", "runs/made/checkpoints/step-00000005"],
        ["clean"],
        ["clean", "made", "--yes"],
    ],
    ids=" ".join,
)
def test_an_answer_is_as_documented(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*arguments, "--json"], debug=True) == 0
    printed = capsys.readouterr().out
    require_documented(arguments[0], printed)
    assert all(line.startswith(("{", "[")) for line in printed.splitlines()), "stdout is for the answer alone"


def test_every_verb_has_a_documented_answer() -> None:
    assert set(ANSWERS) == set(VERBS)
    for verb, answer in answers_schema().items():
        assert json.dumps(answer), verb


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run([verb, "--help"], debug=True)
    assert "--json" in capsys.readouterr().out


def test_a_key_that_is_not_documented_is_found() -> None:
    """The check itself can fail."""
    known = {"model": "runs/made/models/final", "step": 5}
    require_documented("export", json.dumps(known))
    for wrong in ({**known, "new": 1}, {"model": "a"}, {**known, "step": "5"}):
        with pytest.raises(AssertionError, match="not as documented"):
            require_documented("export", json.dumps(wrong))
