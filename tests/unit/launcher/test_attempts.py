"""Attempts: numbers that nobody shares, and failures that explain themselves."""

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ConnectionClosedError, EndpointConnectionError, NoCredentialsError

from data_pipeline.config import DataConfig
from data_pipeline.errors import (
    ConfigError,
    DataCorruptError,
    DivergedError,
    ExitCode,
    InterruptedRunError,
    MaskwrightError,
    NumericTroubleError,
    StorageError,
    StorageUnreachableError,
    UnreachableError,
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
        (MaskwrightError("rank 3 could not save: RuntimeError: CUDA error: uncorrectable ECC error", "b"), FailureKind.INFRASTRUCTURE),
        (StorageError("rank 3 could not write to /mnt/nccl", "b"), FailureKind.KNOWN),
        (ConnectionResetError("reset"), FailureKind.INFRASTRUCTURE),
        (RuntimeError("CUDA error: device-side assert triggered"), FailureKind.BUG),
        (RuntimeError("NCCL watchdog: CUDA error: device-side assert triggered"), FailureKind.BUG),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), FailureKind.INFRASTRUCTURE),
        (RuntimeError("NCCL error: unhandled system error"), FailureKind.INFRASTRUCTURE),
        (OSError(errno.ENOSPC, "No space left on device"), FailureKind.KNOWN),
        (OSError(errno.EIO, "Input/output error"), FailureKind.INFRASTRUCTURE),
        (OSError(errno.EROFS, "Read-only file system"), FailureKind.KNOWN),
        (PermissionError(errno.EACCES, "Permission denied"), FailureKind.KNOWN),
        (StorageUnreachableError("a", "b"), FailureKind.INFRASTRUCTURE),
        (UnreachableError("a", "b"), FailureKind.KNOWN),
        (EndpointConnectionError(endpoint_url="http://127.0.0.1:1"), FailureKind.INFRASTRUCTURE),
        (ConnectionClosedError(endpoint_url="http://127.0.0.1:1"), FailureKind.INFRASTRUCTURE),
        (NoCredentialsError(), FailureKind.BUG),
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


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_storage_that_must_not_be_written_is_said_with_its_own_code(run: RunFolder, code: int) -> None:
    record_failure(run, 1, 0, OSError(code, "no"))
    found = read_failure(run, 1)
    assert found is not None
    assert (found.kind, found.exit_code) == (FailureKind.KNOWN, ExitCode.STORAGE)


def test_of_a_thousand_records_some_are_read_and_the_rare_cause_is_found(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read, asked = attempt_folder(run, 1), Location.read_bytes, []

    def reads(location: Location, settings: DataConfig | None = None) -> bytes:
        asked.append(location.name)
        return read(location, settings)

    monkeypatch.setattr(Location, "read_bytes", reads)
    record_failure(run, 1, 0, raised(GLOO))
    lost = (folder / "failure-00000-infrastructure.json").read_bytes()
    for rank in range(1, 1000):
        (folder.path / f"failure-{rank:05d}-infrastructure.json").write_bytes(lost)
    record_failure(run, 1, 700, StorageError("disk full", "free some"))
    asked.clear()
    found = read_failure(run, 1)
    assert found is not None
    assert (found.kind, found.rank, found.cause) == (FailureKind.KNOWN, 700, "disk full")
    assert "failure-00700-known.json" in asked
    assert len(asked) <= 32


def test_records_of_an_earlier_release_are_read(run: RunFolder) -> None:
    record_failure(run, 1, 1, raised(GLOO))
    record_failure(run, 1, 2, StorageError("disk full", "free some"))
    (attempt_folder(run, 1) / "failure-00002-known.json").path.rename((attempt_folder(run, 1) / "failure-00002.json").path)
    found = read_failure(run, 1)
    assert found is not None
    assert (found.kind, found.rank) == (FailureKind.KNOWN, 2)


def test_a_torn_record_is_not_a_failure_record(run: RunFolder) -> None:
    (attempt_folder(run, 1) / "failure-00000-known.json").write_bytes(b'{"rank": 0, "ki')
    assert read_failure(run, 1) is None
    record_failure(run, 1, 1, raised(GLOO))
    found = read_failure(run, 1)
    assert found is not None
    assert found.rank == 1


def test_attempt_numbers_are_claimed_once(run: RunFolder) -> None:
    assert last_attempt(run) == 0
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: claim_attempt(run), range(24)))
    assert sorted(numbers) == list(range(1, 25))
    assert last_attempt(run) == 24
    (run.root / "logs" / "attempt-0024 (copy)" / "rank-00000.log").write_bytes(b"")
    assert last_attempt(run) == 24
