"""Attempts of a run: their numbers, and how each rank's attempt failed (reads and writes the run folder)."""

import re
import time
import traceback
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from data_pipeline.errors import (
    DataCorruptError,
    ExitCode,
    InterruptedRunError,
    MaskwrightError,
    NotFoundError,
    NumericTroubleError,
    StorageUnreachableError,
)
from data_pipeline.remote import is_passing
from data_pipeline.storage import Location, is_unwritable
from launcher.policy import Failure, FailureKind
from trainer.redaction import without_hidden
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
_RECORD = re.compile(r"failure-(\d+)(?:-([a-z]+))?\.json")
"""The kind is in the name, so that a listing finds what explains the others; records of earlier releases have none."""
_MOST_READ = 32
_READS_AT_ONCE = 16
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


def driver_log(run: RunFolder) -> Location:
    """Log of the commands that drove the run."""
    return run.root / "logs" / "driver.log"


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
    elif is_unwritable(error):
        code, cause = ExitCode.STORAGE, f"rank {rank}: {_first_line(error)}"
        remedy = "Free space (`maskwright clean`), check the permissions, or choose another --storage."
    else:
        code = ExitCode.FAILED
        cause = f"rank {rank}: {type(error).__name__}: {_first_line(error)}"
        remedy = f"See `maskwright logs {run.root.name} --rank {rank}`."
    text = "".join(traceback.format_exception(error))
    record = RankFailure(rank, kind.value, int(code), without_hidden(cause), without_hidden(remedy), without_hidden(text), time.time())
    (attempt_folder(run, attempt) / f"failure-{rank:05d}-{kind.value}.json").write_json(asdict(record))


def classify(error: BaseException) -> FailureKind:
    """Who is to blame for an exception of a rank; looks through causes, because a lost peer is often reported at second hand."""
    if any(_is_lost_peer(link) for link in _chain(error)):
        return FailureKind.INFRASTRUCTURE
    for known, kind in _KINDS.items():
        if isinstance(error, known):
            return kind
    if is_unwritable(error):
        return FailureKind.KNOWN
    return FailureKind.INFRASTRUCTURE if isinstance(error, OSError) or is_passing(error) else FailureKind.BUG


_KINDS = {
    InterruptedRunError: FailureKind.INTERRUPTED,
    DataCorruptError: FailureKind.DATA,
    NumericTroubleError: FailureKind.NUMERIC,
    StorageUnreachableError: FailureKind.INFRASTRUCTURE,
    MaskwrightError: FailureKind.KNOWN,
}
"""The first that fits."""


def read_failure(run: RunFolder, attempt: int) -> Failure | None:
    """The failure of an attempt as its ranks recorded it: the one that explains the others; None when nobody recorded any.

    Of a thousand records some dozens are read, those of the kinds that explain most.
    """
    folder = attempt_folder(run, attempt)
    records = sorted(
        _read_records(folder, _most_telling(folder.children())), key=lambda record: (_PRECEDENCE.index(FailureKind(record.kind)), record.time)
    )
    if not records:
        return None
    first = records[0]
    return Failure(FailureKind(first.kind), first.cause, first.remedy, ExitCode(first.exit_code), first.rank, first.traceback)


def _most_telling(names: Iterable[str]) -> list[str]:
    """Of the files in an attempt's folder the failure records to read: by what their names say of the kind, then by rank."""
    precedence = {kind.value: place for place, kind in enumerate(_PRECEDENCE)}
    matches = filter(None, map(_RECORD.fullmatch, names))
    return [match[0] for match in sorted(matches, key=lambda match: (precedence.get(match[2], -1), int(match[1])))[:_MOST_READ]]


def _read_records(folder: Location, names: list[str]) -> list[RankFailure]:
    def read(name: str) -> RankFailure | None:
        try:
            return RankFailure(**(folder / name).read_json())
        except (NotFoundError, ValueError, TypeError):
            return None  # the rank died while it wrote: the death itself is the news, and the driver sees it

    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        return [record for record in pool.map(read, names) if record is not None]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_lost_peer(error: BaseException) -> bool:
    if type(error).__name__ in {"DistBackendError", "DistNetworkError", "DistStoreError"}:
        return True
    text = str(error).lower()
    retold = type(error) is MaskwrightError  # by a rank that heard of it
    return (retold or isinstance(error, RuntimeError)) and any(word in text for word in _PEER_LOSS) and not any(word in text for word in _BUGS)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
