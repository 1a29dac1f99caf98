"""Errors a user can act on: one line of cause, one line of remedy, one documented exit code (pure)."""

import json
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every verb; documented in the README, never renumbered."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    CONFIG = 3
    UNREACHABLE = 4
    NOT_FOUND = 5
    ENVIRONMENT = 6
    STORAGE = 7
    CONFLICT = 8
    FAILED = 10
    RETRIES_SPENT = 11
    DIVERGED = 12
    NO_CHECKPOINT = 13
    DATA_CORRUPT = 14
    RUNNING = 20
    INTERRUPTED = 75
    CTRL_C = 130


class MaskwrightError(Exception):
    """A failure whose cause and remedy are known.

    `cause` says what was expected, what was found and where; `remedy` says what to do next. Survives pickling, so that a
    worker's error reaches the driver whole.
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause}\n{self.remedy}"


class UsageError(MaskwrightError):
    """The command line asks for something that cannot be."""

    exit_code = ExitCode.USAGE


class ConfigError(MaskwrightError):
    """A configuration that cannot be honoured."""

    exit_code = ExitCode.CONFIG


def too_few_documents() -> ConfigError:
    """What a corpus is refused with of which nothing is left when a document is held out for validation."""
    return ConfigError(
        "the corpus has fewer than 2 distinct documents: none is left to train on",
        "Use more text. A .txt of up to 1 MB is one document: cut it into a file a document, or make it .jsonl, a line a document.",
    )


class UnreachableError(MaskwrightError):
    """A service that does not answer, or refuses us."""

    exit_code = ExitCode.UNREACHABLE


class StorageUnreachableError(UnreachableError):
    """Storage that gives no answer for now, or fails as storage does that is about to recover: trying again later may succeed."""


class NotFoundError(MaskwrightError):
    """A run, corpus, model or file that is not there."""

    exit_code = ExitCode.NOT_FOUND


class EnvironmentMismatchError(MaskwrightError):
    """Software that is missing or differs from what the run needs."""

    exit_code = ExitCode.ENVIRONMENT


class StorageError(MaskwrightError):
    """Storage that is full, unwritable or not shared."""

    exit_code = ExitCode.STORAGE


class ConflictError(MaskwrightError):
    """Somebody else holds the run or the corpus."""

    exit_code = ExitCode.CONFLICT


class RetriesSpentError(MaskwrightError):
    """The run failed more often than its budget allows."""

    exit_code = ExitCode.RETRIES_SPENT


class DivergedError(MaskwrightError):
    """Training is in numeric trouble: a loss or gradients that are not finite, or a loss far above those before it."""

    exit_code = ExitCode.DIVERGED


class NumericTroubleError(DivergedError):
    """Numeric trouble at a step that another attempt should try again from an earlier checkpoint.

    `step` counts from 0; `kind` is what is wrong there, as in the event `numeric_trouble`; `value` is the loss or gradient norm.
    """

    def __init__(self, cause: str, remedy: str, step: int | None = None, kind: str | None = None, value: float | None = None) -> None:
        super().__init__(cause, remedy)
        self.step = step
        self.kind = kind
        self.value = value


class NoCheckpointError(MaskwrightError):
    """No committed checkpoint is intact."""

    exit_code = ExitCode.NO_CHECKPOINT


class DataCorruptError(MaskwrightError):
    """Input text, shards or an index that are damaged.

    `shard` (a file name) and `block` (its number within the shard) say which block of a corpus cannot be used; None where it is something else.
    """

    exit_code = ExitCode.DATA_CORRUPT

    def __init__(self, cause: str, remedy: str, shard: str | None = None, block: int | None = None) -> None:
        super().__init__(cause, remedy)
        self.shard = shard
        self.block = block


class InterruptedRunError(MaskwrightError):
    """The run was asked to stop; it can be resumed."""

    exit_code = ExitCode.INTERRUPTED


def json_fault(error: ValueError) -> str:
    """What `json.loads` found wrong with a line of a file; its own message counts lines, too."""
    return f"{error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
