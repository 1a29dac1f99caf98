"""Files of the local disk when it is full: nothing half-written is taken for whole."""

import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_pipeline.errors import StorageError
from data_pipeline.lines import LineReader, last_lines
from data_pipeline.storage import Location


@contextmanager
def files_up_to(num_bytes: int) -> Generator[None]:
    """Writes beyond this size are cut short or fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_that_does_not_fit_is_an_error_and_spoils_no_other(tmp_path: Path) -> None:
    file = Location.at(tmp_path / "lines.jsonl")
    file.append_line("first")
    with pytest.raises(StorageError, match="no space left while writing"), files_up_to(9):
        file.append_line("second")
    file.append_line("third")
    assert file.read_lines() == ["first", "sec", "third"]


def test_a_claim_that_does_not_fit_is_not_left_behind(tmp_path: Path) -> None:
    file = Location.at(tmp_path / "claim.json")
    with pytest.raises(StorageError, match="no space left while writing"), files_up_to(3):
        file.claim(b"somebody")
    assert not file.exists()
    assert file.claim(b"somebody")
    assert not file.claim(b"somebody else")


def test_lines_are_read_as_they_come_and_bytes_that_are_no_text_spoil_nothing(tmp_path: Path) -> None:
    file = Location.at(tmp_path / "lines.jsonl")
    reader = LineReader(file)
    assert (reader.read(), last_lines(file), file.read_lines()) == ([], [], [])
    file.write_bytes(b"first\nsec\xffnd\nthi")
    assert reader.read() == file.read_lines() == ["first", "sec\ufffdnd"]
    file.append_line("fourth")
    assert reader.read() == ["thi", "fourth"]
    late = LineReader(file)
    late.skip()
    file.append_line("fifth")
    assert late.read() == reader.read() == ["fifth"]
    assert last_lines(file)[-2] == "fifth"
