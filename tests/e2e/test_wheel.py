"""The wheel, installed outside the checkout, carries all that a user needs: `--help`, `init` and a short run."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TINY = [
    "corpus.max_documents=300",
    "tokenizer.vocab_size=600",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_heads=2",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=4",
    "schedule.steps=2",
    "schedule.warmup_steps=1",
    "finetune.tasks=[]",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it, away from the checkout; dependencies are borrowed from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder / "venv"), cwd=folder)
    (site_packages,) = (folder / "venv/lib").glob("python*/site-packages")
    # A plain path line: the editable install's own .pth is not followed from there, so the checkout stays invisible.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", str(folder / "venv/bin/python"), "install", "--no-deps", "--ignore-installed", str(wheel), cwd=folder)
    return folder


def run(*command: str, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.timeout(420)
def test_wheel_serves_outside_the_checkout(installed: Path) -> None:
    command = str(installed / "venv/bin/maskwright")
    origin = run(str(installed / "venv/bin/python"), "-c", "import trainer; print(trainer.__file__)", cwd=installed)
    assert origin.startswith(str(installed)), "the checkout leaked into the wheel's environment"
    assert "run" in run(command, "--help", cwd=installed)
    run(command, "init", "mine", cwd=installed)
    config = installed / "mine/runs/demo.yaml"
    assert config.is_file()
    settings = [word for setting in TINY for word in ("--set", setting)]
    run(command, "run", str(config), *settings, cwd=installed, MASKWRIGHT_STORAGE=str(installed / "storage"))
    assert (installed / "storage/demo/models/final/lineage.json").is_file()
