"""What the README says, word for word, with the wheel installed outside the checkout."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import ExitCode
from tests.support.text import generate_documents
from tests.support.tiny_task import write_task

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
SMALL = {
    "tokenizer.vocab_size": 600,
    "model.num_layers": 1,
    "model.hidden_size": 32,
    "model.num_heads": 2,
    "schedule.steps": 2,
    "schedule.warmup_steps": 1,
    "finetune.epochs": 1,
    "finetune.num_seeds": 1,
}
"""The demo's sizes, made small; nothing else of the README's commands is changed."""
LONG = {"profile", "doctor"}
"""Verbs that start processes of their own again."""


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder away from the checkout with the wheel in a virtual environment; dependencies are borrowed from this environment."""
    folder = tmp_path_factory.mktemp("outside")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", ".venv", cwd=folder)
    (site_packages,) = (folder / ".venv/lib").glob("python*/site-packages")
    # A plain path line: the editable install's own .pth is not followed from there, so the checkout stays invisible.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / ".venv/bin/python"),
        "install",
        "--no-deps",
        "--ignore-installed",
        str(wheel),
        cwd=folder,
    )
    return folder


def run(*command: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "MASKWRIGHT_STORAGE"}}
    environment["PATH"] = f"{cwd / '.venv/bin'}:{environment['PATH']}"
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def readme_commands() -> list[list[str]]:
    """Every `maskwright` command of the README's code blocks, without comments."""
    blocks = re.findall(r"(?:^    .*\n)+", README, flags=re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("maskwright ")]


def settings() -> list[str]:
    return [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def run_of_ones_own(outside: Path) -> Path:
    """The folder `outside` after the first command, which pretrains and fine-tunes."""
    origin = run(".venv/bin/python", "-c", "import trainer; print(trainer.__file__)", cwd=outside)
    assert origin.startswith(str(outside)), "the checkout leaked into the wheel's environment"
    run("maskwright", "init", cwd=outside)
    with gzip.open(outside / "articles.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in generate_documents(200, seed=3))
    write_task(outside / "topics")
    first = readme_commands()[0]
    assert first[1] == "run"
    run(*first, *settings(), cwd=outside)
    (outside / "my.yaml").write_bytes((outside / "runs/mine/run.yaml").read_bytes())
    return outside


def run_the_others(outside: Path, which: Callable[[str], bool]) -> None:
    """The commands of the README behind the first whose verbs are asked for, as they stand there."""
    (corpus,) = outside.glob("runs/corpora/articles-*")
    for command in readme_commands()[1:]:
        if which(command[1]):
            run(*("1" if word == "1000" else word.replace("NAME", corpus.name) for word in command), cwd=outside)


@pytest.mark.timeout(420)
def test_the_commands_of_the_readme_work_as_they_stand(run_of_ones_own: Path) -> None:
    run_the_others(run_of_ones_own, lambda verb: verb not in LONG)
    snippet = re.search(r"^    from transformers.*\n    .*\n", README, flags=re.MULTILINE)
    assert snippet is not None
    code = "\n".join(line.strip() for line in snippet[0].splitlines())
    assert "token_str" in run(".venv/bin/python", "-c", code, cwd=run_of_ones_own)


@pytest.mark.full
@pytest.mark.timeout(420)
def test_the_long_commands_of_the_readme_work_as_they_stand(run_of_ones_own: Path) -> None:
    assert {command[1] for command in readme_commands()} >= LONG
    run_the_others(run_of_ones_own, lambda verb: verb in LONG)


def test_the_tables_of_the_readme_are_true() -> None:
    section = README.partition("## Exit codes\n")[2].partition("\n## ")[0]  # the table of benchmarks has numbers in cells, too
    codes = {int(code) for code in re.findall(r"\| (\d+) \|", section)}
    assert codes == {int(code) for code in ExitCode}
    for folder in ("launcher", "trainer", "data_pipeline", "cluster_configs", "tests"):
        assert f"    {folder}/" in README
        assert (REPOSITORY / folder).is_dir()
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)`?", README):
        assert f"\n{target}:" in makefile, f"the README names `make {target}`"
