"""Receipts: what each rank's background leaves beside its files when it has written them, or cannot, so that rank 0 knows without a collective."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from data_pipeline import errors
from data_pipeline.errors import MaskwrightError, NotFoundError
from data_pipeline.storage import Location
from trainer.manifest import FileDigest

RECEIPTS = "receipts"
_READS_AT_ONCE = 16
_NAME = re.compile(r"rank-(\d+)(?:-retries)?\.json")


@dataclass(frozen=True)
class Receipt:
    """How far a rank is: its files by path relative to the checkpoint, or the error that keeps it from writing them."""

    rank: int
    files: dict[str, FileDigest]
    error: MaskwrightError | None = None
    is_final: bool = True
    """Whether nothing follows; a rank that will try again says so before."""

    def leave(self, part: Location) -> None:
        """Write it into the folder of the save. One after which another follows has a name of its own, also in the end: a store may carry out late
        what has been given up, and must not put it in the place of what followed."""
        error = self.error and {"type": type(self.error).__name__, "cause": self.error.cause, "remedy": self.error.remedy}
        files = {name: asdict(file) for name, file in self.files.items()}
        value = {"rank": self.rank, "files": files, "error": error, "is_final": self.is_final}
        with suppress(FileNotFoundError):  # between its rename and its sync rank 0 may have read it, and removed the folder
            (part / RECEIPTS / _name(self.rank, self.is_final)).write_json(value)

    @classmethod
    def read(cls, part: Location, rank: int) -> "Receipt":
        """A rank's final receipt, or the one before it.

        Raises:
            NotFoundError: there is none.
        """
        try:
            value: Any = (part / RECEIPTS / _name(rank, is_final=True)).read_json()
        except NotFoundError:
            value = (part / RECEIPTS / _name(rank, is_final=False)).read_json()
        error = value["error"] and getattr(errors, value["error"]["type"])(value["error"]["cause"], value["error"]["remedy"])
        return cls(value["rank"], {name: FileDigest(**file) for name, file in value["files"].items()}, error, value["is_final"])


def new_receipts(part: Location, seen: set[int]) -> Iterator[Receipt]:
    """The receipts of ranks that are not in `seen`: one listing, whatever the number of ranks."""
    matches = filter(None, map(_NAME.fullmatch, (part / RECEIPTS).children()))
    new = sorted({int(match[1]) for match in matches} - seen)
    if new:
        with ThreadPoolExecutor(min(len(new), _READS_AT_ONCE)) as pool:
            yield from filter(None, pool.map(partial(_read, part), new))


def _read(part: Location, rank: int) -> Receipt | None:
    try:
        return Receipt.read(part, rank)
    except NotFoundError:
        return None


def _name(rank: int, is_final: bool) -> str:
    return f"rank-{rank:05d}{'' if is_final else '-retries'}.json"
