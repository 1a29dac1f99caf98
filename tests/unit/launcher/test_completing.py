"""Tab: the protocol that shells speak, what is offered, and how soon."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from data_pipeline.storage import Location
from launcher import cli, completing

HEAVY = ("torch", "ray", "transformers", "pandas", "deepspeed", "accelerate", "webdataset", "pyarrow", "matplotlib", "sklearn")

PressTab = Callable[[str], list[str]]


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With runs, and what is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MASKWRIGHT_STORAGE", raising=False)
    for name in ("demo", "demo-2", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.yaml").write_text(f"name: {name}\n")
    (tmp_path / "runs/corpora/c").mkdir(parents=True)
    (tmp_path / "runs/demons").mkdir()
    return tmp_path / "runs"


def protocol(line: str) -> dict[str, str]:
    """What bash puts into the environment when Tab is pressed at the end of a line."""
    return {"_MASKWRIGHT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}


@pytest.fixture
def press_tab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> PressTab:
    """What is offered at the end of a line."""

    def press(line: str) -> list[str]:
        with monkeypatch.context() as patch:
            for name, value in protocol(line).items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit):
                cli.main([])
        return capsys.readouterr().out.split()

    return press


def test_verbs_options_runs_and_clusters_are_offered(press_tab: PressTab) -> None:
    assert press_tab("maskwright sta") == ["status"]
    assert press_tab("maskwright status de") == ["demo", "demo-2"]
    assert press_tab("maskwright resume --storage runs ") == ["demo", "demo-2", "other"]
    assert "local" in press_tab("maskwright run my.yaml --cluster lo")
    assert "--json" in press_tab("maskwright status --js")


def test_a_path_and_a_storage_that_is_not_there_offer_nothing(press_tab: PressTab) -> None:
    assert press_tab("maskwright status runs/d") == [], "the shell itself completes paths"
    assert press_tab("maskwright status --storage nowhere d") == []


def test_it_loads_nothing_heavy(storage: Path) -> None:
    code = f"import sys\nfrom launcher.cli import main\ntry:\n    main([])\nfinally:\n    print('LOADED', sorted(set(sys.modules) & set({HEAVY!r})))"
    environment = {**os.environ, **protocol("maskwright logs o"), "MASKWRIGHT_STORAGE": str(storage)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[:2] == ["other", "LOADED []"]


def test_a_storage_that_hangs_holds_up_nobody(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completing, "_ANSWER_S", 0.02)
    monkeypatch.setattr(Location, "children", lambda self: time.sleep(30))
    line = typer.Context(typer.main.get_command(cli.app))
    line.params["storage"] = str(storage)
    started_at = time.monotonic()
    assert completing.runs(line, "d") == []
    assert time.monotonic() - started_at < 10


@pytest.mark.parametrize("shell", ["bash", *(pytest.param(shell, marks=pytest.mark.full) for shell in ("zsh", "fish"))])
def test_shells_get_their_script(shell: str) -> None:
    """In a process of its own, where typer asks which shell it is instead of looking at its parents."""
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "true", "HOME": os.getcwd()}
    command = [sys.executable, "-m", "launcher.cli", "--show-completion", shell]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert f"_MASKWRIGHT_COMPLETE=complete_{shell}" in done.stdout
    if shell == "bash":
        subprocess.run([*command[:-2], "--install-completion", shell], env=environment, capture_output=True, timeout=60, check=True)
        assert Path(".bash_completions/maskwright.sh").read_text().strip() == done.stdout.strip()
