"""Reads the documents of a partition from text, JSON lines and Parquet; an error names the file and the place in it."""

import gzip
import io
import json
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any, cast

import pyarrow
import pyarrow.parquet

from data_pipeline import python_docs
from data_pipeline.errors import ConfigError, DataCorruptError, EnvironmentMismatchError, NotFoundError, json_fault
from data_pipeline.sources import Partition, Piece, SourceFile
from data_pipeline.storage import Location

ONE_DOCUMENT_BYTES = 1_000_000
"""A .txt up to this size is one document. In a longer one, two or more blank lines separate documents, and a document that has
reached this size ends at the next blank line, one of four times this size at the next line end."""
_ROWS = 1024
_ZSTD_READ_BYTES = 64 << 10
_REPAIR = "Repair or remove the file."


def read_documents(partition: Partition) -> Iterator[str]:
    """Raw text of the partition's documents, in order.

    Raises:
        DataCorruptError: text that is not UTF-8, a broken line or archive.
        ConfigError: there is no column `text_key`.
    """
    documents = (text for piece in partition.pieces for text in _read_piece(piece, partition.text_key))
    return islice(documents, partition.max_documents)


def count_documents(partition: Partition) -> int:
    """Number of documents, read but not processed."""
    return sum(1 for _ in read_documents(partition))


def count_row_groups(file: SourceFile) -> int:
    """Row groups of a Parquet file."""
    with _open_parquet(file) as parquet:
        return int(parquet.num_row_groups)


def _read_piece(piece: Piece | python_docs.Partition, text_key: str) -> Iterator[str]:
    if isinstance(piece, python_docs.Partition):
        return (document.text for document in python_docs.read_partition(piece))
    if piece.file.format == "txt":
        return _read_text(piece.file)
    if piece.file.format == "jsonl":
        return _read_json_lines(piece, text_key)
    return _read_parquet(piece, text_key)


def _read_text(file: SourceFile) -> Iterator[str]:
    lines = (line for _, line in _decoded_lines(Piece(file)))
    if file.text_bytes <= ONE_DOCUMENT_BYTES:
        yield "".join(lines)
        return
    document: list[str] = []
    num_characters = num_blank = 0
    for line in lines:
        num_blank = 0 if line.strip() else num_blank + 1
        is_full = num_characters >= ONE_DOCUMENT_BYTES and num_blank
        if document and (num_blank >= 2 or is_full or num_characters >= 4 * ONE_DOCUMENT_BYTES):
            yield "".join(document)
            document, num_characters = [], 0
        if document or line.strip():
            document.append(line)
            num_characters += len(line)
    if document:
        yield "".join(document)


def _read_json_lines(piece: Piece, text_key: str) -> Iterator[str]:
    for number, line in _decoded_lines(piece):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except ValueError as error:
            raise DataCorruptError(f"{_line(piece, number)} is not JSON: {json_fault(error)}", _REPAIR) from error
        if not isinstance(record, dict):
            raise DataCorruptError(f"{_line(piece, number)} is not a JSON object", _REPAIR)
        if text_key not in record:
            raise _no_column(piece.file, text_key, list(record))
        text = record[text_key]
        if not isinstance(text, str | None):
            raise DataCorruptError(f"{_line(piece, number)}: `{text_key}` is not a string", _REPAIR)
        yield text or ""


def _read_parquet(piece: Piece, text_key: str) -> Iterator[str]:
    with _open_parquet(piece.file) as parquet:
        names: list[str] = parquet.schema_arrow.names
        if text_key not in names:
            raise _no_column(piece.file, text_key, names)
        stop = parquet.num_row_groups if piece.stop is None else piece.stop
        try:
            for batch in parquet.iter_batches(_ROWS, row_groups=list(range(piece.start, stop)), columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str | None):
                        raise ConfigError(f"{piece.file.url}: column `{text_key}` does not hold text", "Set corpus.text_key to a text column.")
                    yield text or ""
        except (pyarrow.ArrowException, OSError) as error:
            raise DataCorruptError(f"{piece.file.url} is not intact Parquet: {error}", _REPAIR) from error


def _decoded_lines(piece: Piece) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of the lines that start within the piece."""
    with _open(piece.file) as file:
        offset = piece.start
        if offset:
            file.seek(offset - 1)
            offset += len(file.readline()) - 1  # a line belongs to the piece it starts in
        number = 0
        while piece.stop is None or offset < piece.stop:
            line = _read_line(file, piece, number + 1)
            if not line:
                return
            number += 1
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                raise DataCorruptError(
                    f"{piece.file.url} is not UTF-8: byte {line[error.start]:#04x} at offset {offset + error.start}",
                    "Convert it, for example with `iconv -t UTF-8`.",
                ) from error
            offset += len(line)


def _read_line(file: IO[bytes], piece: Piece, number: int) -> bytes:
    try:
        return file.readline()
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the content
            raise
        raise DataCorruptError(f"{piece.file.url} is damaged at line {number}: {error}", _REPAIR) from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # zstandard is optional
            raise
        raise DataCorruptError(f"{piece.file.url} is damaged at line {number}: {error}", _REPAIR) from error


def _open(file: SourceFile) -> IO[bytes]:
    try:
        opened = Location.at(file.url).open_binary()
    except FileNotFoundError as error:
        raise NotFoundError(f"{file.url} does not exist any more", "Do not change the source while it is being prepared.") from error
    if file.compression == "gzip":
        return cast("IO[bytes]", gzip.GzipFile(fileobj=opened))
    return io.BufferedReader(_ZstdReader(opened, file.url)) if file.compression == "zstd" else opened


class _ZstdReader(io.RawIOBase):
    """Zstandard frames one after the other. The package's own reader takes a cut file for a short one and stops after the first frame."""

    def __init__(self, compressed: IO[bytes], url: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise EnvironmentMismatchError(f"{url} needs the package zstandard", 'Install it: pip install "maskwright[zst]".') from error
        self._compressed = compressed
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._output:
            self._input = self._input or self._compressed.read(_ZSTD_READ_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._output, self._input = self._frame.decompress(self._input), b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def close(self) -> None:
        self._compressed.close()
        super().close()


@contextmanager
def _open_parquet(file: SourceFile) -> Generator[pyarrow.parquet.ParquetFile]:
    with Location.at(file.url).open_binary() as opened:
        try:
            parquet = pyarrow.parquet.ParquetFile(opened)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataCorruptError(f"{file.url} is not Parquet: {error}", _REPAIR) from error
        yield parquet


def _line(piece: Piece, number: int) -> str:
    """Place of a line; counting the lines before the piece is worth its cost only in an error."""
    if piece.start:
        with _open(piece.file) as file:
            before = 0
            offset = 0
            while offset < piece.start and (line := file.readline()):
                before += 1
                offset += len(line)
        number += before
    return f"{piece.file.url}: line {number}"


def _no_column(file: SourceFile, text_key: str, columns: list[str]) -> ConfigError:
    return ConfigError(f"{file.url} has no column `{text_key}`; it has {', '.join(sorted(columns))}", "Set corpus.text_key to one of them.")
