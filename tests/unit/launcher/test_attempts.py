"""Attempts: numbers that nobody shares, and failures that explain themselves."""

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline.errors import (
    ConfigError,
    DataCorruptError,
    DivergedError,
    ExitCode,
    InterruptedRunError,
    MaskwrightError,
    NumericTroubleError,
    StorageError,
)
from data_pipeline.storage import Location
from launcher.attempts import attempt_folder, claim_attempt, classify, last_attempt, read_failure, record_failure
from launcher.policy import FailureKind
from trainer.runlog import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(Location.at(tmp_path / "run"))


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    """The error, as if raised from `cause`."""
    error.__cause__ = cause
    return error


GLOO = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3712")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StorageError("a", "b"), FailureKind.KNOWN),
        (DivergedError("a", "b"), FailureKind.KNOWN),
        (InterruptedRunError("a", "b"), FailureKind.INTERRUPTED),
        (GLOO, FailureKind.INFRASTRUCTURE),
        (raised(MaskwrightError("not all ranks answered", "b"), GLOO), FailureKind.INFRASTRUCTURE),
        (ConnectionResetError("reset"), FailureKind.INFRASTRUCTURE),
        (RuntimeError("CUDA error: device-side assert triggered"), FailureKind.BUG),
        (RuntimeError("NCCL watchdog: CUDA error: device-side assert triggered"), FailureKind.BUG),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), FailureKind.INFRASTRUCTURE),
        (RuntimeError("NCCL error: unhandled system error"), FailureKind.INFRASTRUCTURE),
        (OSError(errno.ENOSPC, "No space left on device"), FailureKind.KNOWN),
        (OSError(errno.EIO, "Input/output error"), FailureKind.INFRASTRUCTURE),
        (DataCorruptError("a", "b"), FailureKind.DATA),
        (NumericTroubleError("a", "b"), FailureKind.NUMERIC),
        (RuntimeError("The size of tensor a (3) must match"), FailureKind.BUG),
        (KeyError("x"), FailureKind.BUG),
    ],
)
def test_classify(error: Exception, kind: FailureKind) -> None:
    assert classify(error) is kind


def test_the_cause_beats_its_consequences(run: RunFolder) -> None:
    record_failure(run, 1, 0, raised(GLOO))
    record_failure(run, 1, 1, raised(ConfigError("zero.stage is wrong", "Set it.")))
    record_failure(run, 1, 2, raised(GLOO))
    found = read_failure(run, 1)
    assert found is not None
    assert (found.kind, found.rank, found.exit_code, found.cause, found.remedy) == (
        FailureKind.KNOWN,
        1,
        ExitCode.CONFIG,
        "zero.stage is wrong",
        "Set it.",
    )
    assert "ConfigError" in found.traceback


def test_a_full_disk_is_said_with_its_own_code(run: RunFolder) -> None:
    record_failure(run, 1, 0, raised(GLOO))
    record_failure(run, 1, 1, OSError(errno.ENOSPC, "No space left on device", "/runs/step-5"))
    found = read_failure(run, 1)
    assert found is not None
    assert (found.kind, found.exit_code, found.rank) == (FailureKind.KNOWN, ExitCode.STORAGE, 1)
    assert "/runs/step-5" in found.cause


def test_a_torn_record_is_not_a_failure_record(run: RunFolder) -> None:
    (attempt_folder(run, 1) / "failure-00000.json").write_bytes(b'{"rank": 0, "ki')
    assert read_failure(run, 1) is None


def test_attempt_numbers_are_claimed_once(run: RunFolder) -> None:
    assert last_attempt(run) == 0
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: claim_attempt(run), range(24)))
    assert sorted(numbers) == list(range(1, 25))
    assert last_attempt(run) == 24
    (run.root / "logs" / "attempt-0024 (copy)" / "rank-00000.log").write_bytes(b"")
    assert last_attempt(run) == 24
