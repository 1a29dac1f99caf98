"""A run that is killed, in part or as a whole, ends with the bits of the run that nobody touched."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import Command, maskwright, worker_pid
from tests.support.outcomes import assert_same, events, metrics
from tests.support.tiny_run import write_run

STEPS = 90
"""So many that ranks have not taken the last of them before they notice that the driver is dead: about a second."""
SEED = int(os.environ.get("MASKWRIGHT_KILL_SEED", random.SystemRandom().randrange(10**6)))

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this module live; they share one corpus."""
    path = tmp_path_factory.mktemp("kill")
    write_run(path, precision="bf16", schedule={"steps": STEPS, "warmup_steps": 5})
    return path


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Callable[[int], Path]:
    """The run folder of an undisturbed run at a ZeRO stage; each is made once."""
    made: dict[int, Path] = {}

    def run_of(stage: int) -> Path:
        if stage not in made:
            code, output = maskwright(*run_arguments(f"undisturbed-{stage}", stage), folder=folder)
            assert code == 0, output
            made[stage] = folder / f"storage/undisturbed-{stage}"
        return made[stage]

    return run_of


def run_arguments(name: str, stage: int) -> list[str]:
    return ["run", "run.yaml", "--cluster", "cluster.yaml", "--set", f"name={name}", "--set", f"zero.stage={stage}"]


def kill_worker(command: Command, run: Path) -> None:
    pid = worker_pid(run, attempt=1, rank=1)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def kill_driver(command: Command, run: Path) -> None:
    del run
    command.kill_driver()


def kill_everything(command: Command, run: Path) -> None:
    del run
    command.kill_everything()


KILLS = {"worker": kill_worker, "driver": kill_driver, "everything": kill_everything}
SAMPLE = {("worker", 1)}
"""What `make test` tries; there, e2e/test_run.py resumes what Ctrl-C has ended."""
CASES = [
    pytest.param(victim, stage, id=f"{victim}-zero{stage}", marks=() if (victim, stage) in SAMPLE else pytest.mark.full)
    for victim in KILLS
    for stage in (0, 1, 2, 3)
]


@pytest.mark.parametrize(("victim", "stage"), CASES)
def test_killed_run_ends_bit_identical(victim: str, stage: int, folder: Path, undisturbed: Callable[[int], Path]) -> None:
    reference = undisturbed(stage)
    name = f"{victim}-{stage}"
    run = folder / "storage" / name
    step = random.Random(f"{SEED}-{name}").randrange(2, STEPS // 3)
    print(f"killing the {victim} at step {step} (MASKWRIGHT_KILL_SEED={SEED})")
    command = Command(run_arguments(name, stage), folder).start()
    try:
        command.wait_until(lambda: max(metrics(run), default=-1) >= step)
        KILLS[victim](command, run)
        if victim == "worker":
            assert command.wait() == 0, command.text()
        else:
            code, output = maskwright("resume", name, "--storage", "storage", folder=folder)
            assert code == 0, output
            if victim == "driver":
                command.wait_until_gone()
    finally:
        command.kill_everything()
    assert_same(run, reference)
    if (run / "checkpoints").exists() and step >= 6:
        (resumed,) = events(run, "resumed")
        assert resumed["repeated"] == resumed["skipped"] == 0
        assert resumed["step"] % 5 == 0
    assert events(run, "worker_failed")
    assert events(run, "finished")
