"""Attempts of a run: their numbers, and how each rank's attempt failed (reads and writes the run folder)."""

import errno
import re
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from data_pipeline.errors import DataCorruptError, ExitCode, InterruptedRunError, MaskwrightError, NotFoundError, NumericTroubleError
from data_pipeline.storage import Location
from launcher.policy import Failure, FailureKind
from trainer.runlog import RunFolder

_PEER_LOSS = (
    "gloo",
    "nccl",
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket timeout",
    "monitoredbarrier",
    "cuda error",
)
_ATTEMPT = re.compile(r"attempt-(\d+)")
_BUGS = ("device-side assert",)
"""In errors of CUDA: what the program did. The rest (ECC, a lost device, a failed launch) is the machine's."""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_PRECEDENCE = (
    FailureKind.KNOWN,
    FailureKind.DATA,
    FailureKind.NUMERIC,
    FailureKind.INTERRUPTED,
    FailureKind.BUG,
    FailureKind.INFRASTRUCTURE,
)


def attempt_folder(run: RunFolder, attempt: int) -> Location:
    """Folder of an attempt's logs and failure records."""
    return run.rank_log(attempt, 0).parent


def stacks_folder(run: RunFolder, attempt: int) -> Location:
    """Where the stacks of an attempt's ranks lie, when they were asked for."""
    return attempt_folder(run, attempt) / "stacks"


def last_attempt(run: RunFolder) -> int:
    """Number of the newest attempt; 0 when there is none."""
    names = (run.root / "logs").children()
    return max((int(match[1]) for name in names if (match := _ATTEMPT.fullmatch(name))), default=0)


def claim_attempt(run: RunFolder) -> int:
    """The next attempt number; no two callers ever get the same."""
    number = last_attempt(run) + 1
    while not (attempt_folder(run, number) / "claim").claim(f"{time.time()} {uuid.uuid4().hex}".encode()):
        number += 1
    return number


@dataclass(frozen=True)
class RankFailure:
    """What ended one rank."""

    rank: int
    kind: str
    exit_code: int
    cause: str
    remedy: str
    traceback: str
    time: float


def record_failure(run: RunFolder, attempt: int, rank: int, error: BaseException) -> None:
    """Leave the error of a rank where the driver finds it, whatever becomes of the process."""
    kind = classify(error)
    if isinstance(error, MaskwrightError):
        code, cause, remedy = error.exit_code, error.cause, error.remedy
    elif _is_full(error):
        code, cause = ExitCode.STORAGE, f"rank {rank}: {_first_line(error)}"
        remedy = "Free space (`maskwright clean`) or choose another --storage."
    else:
        code = ExitCode.FAILED
        cause = f"rank {rank}: {type(error).__name__}: {_first_line(error)}"
        remedy = f"See `maskwright logs {run.root.name} --rank {rank}`."
    text = "".join(traceback.format_exception(error))
    record = RankFailure(rank, kind.value, int(code), cause, remedy, text, time.time())
    (attempt_folder(run, attempt) / f"failure-{rank:05d}.json").write_json(asdict(record))


def classify(error: BaseException) -> FailureKind:
    """Who is to blame for an exception of a rank; looks through causes, because a lost peer is often reported at second hand."""
    if any(_is_lost_peer(link) for link in _chain(error)):
        return FailureKind.INFRASTRUCTURE
    for known, kind in _KINDS.items():
        if isinstance(error, known):
            return kind
    if isinstance(error, OSError):
        return FailureKind.KNOWN if _is_full(error) else FailureKind.INFRASTRUCTURE
    return FailureKind.BUG


_KINDS = {
    InterruptedRunError: FailureKind.INTERRUPTED,
    DataCorruptError: FailureKind.DATA,
    NumericTroubleError: FailureKind.NUMERIC,
    MaskwrightError: FailureKind.KNOWN,
}
"""The first that fits."""


def read_failure(run: RunFolder, attempt: int) -> Failure | None:
    """The failure of an attempt as its ranks recorded it: the one that explains the others; None when nobody recorded any."""
    records = sorted(_read_records(run, attempt), key=lambda record: (_PRECEDENCE.index(FailureKind(record.kind)), record.time))
    if not records:
        return None
    first = records[0]
    return Failure(FailureKind(first.kind), first.cause, first.remedy, ExitCode(first.exit_code), first.rank, first.traceback)


def _read_records(run: RunFolder, attempt: int) -> Iterator[RankFailure]:
    folder = attempt_folder(run, attempt)
    for name in folder.children():
        if name.startswith("failure-"):
            try:
                yield RankFailure(**(folder / name).read_json())
            except (NotFoundError, ValueError, TypeError):
                continue  # the rank died while it wrote: the death itself is the news, and the driver sees it


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_lost_peer(error: BaseException) -> bool:
    if type(error).__name__ in {"DistBackendError", "DistNetworkError", "DistStoreError"}:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _PEER_LOSS) and not any(word in text for word in _BUGS)


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _NO_SPACE


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
