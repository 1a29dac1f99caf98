"""Input files: formats, partitions, rules for documents, errors that name the place."""

import gzip
import json
import os
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline import source_digests
from data_pipeline.config import CorpusConfig
from data_pipeline.errors import ConfigError, DataCorruptError, NotFoundError
from data_pipeline.executor import InProcessExecutor
from data_pipeline.reading import ONE_DOCUMENT_BYTES, read_documents
from data_pipeline.source_digests import describe_sources
from data_pipeline.sources import Partition, Piece, SourceFile, limit_documents, list_files, list_inputs
from data_pipeline.storage import Location


def _read(config: CorpusConfig) -> list[str]:
    return [text for partition in list_inputs(config).partitions for text in read_documents(partition)]


def _lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


def test_every_format_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n\n\nstill one")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"two"))
    (tmp_path / "c.txt.zst").write_bytes(zstandard.compress(b"th") + zstandard.compress(b"ree"))
    (tmp_path / "d.jsonl").write_bytes(_lines(["four", "five"]))
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(_lines(["six"])))
    (tmp_path / "f.jsonl.zst").write_bytes(zstandard.compress(_lines(["seven"])))
    (tmp_path / "sub").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["eight", None], "n": [1, 2]}), tmp_path / "sub" / "g.parquet")
    (tmp_path / "ignored.csv").write_text("no")
    (tmp_path / ".hidden.txt").write_text("no")
    expected = ["one\n\n\n\nstill one", "two", "three", "four", "five", "six", "seven", "eight", ""]
    assert _read(CorpusConfig(source=str(tmp_path))) == expected
    assert _read(CorpusConfig(source=(str(tmp_path / "d.jsonl"), str(tmp_path / "a.txt")))) == ["four", "five", expected[0]]


def test_a_long_text_file_is_cut_at_two_blank_lines(tmp_path: Path) -> None:
    paragraph = "word " * 1000 + "\n"
    part = (paragraph * 60 + "\n") * 2
    (tmp_path / "long.txt").write_text(part + "\n" + part + "\n\n\n" + part)
    found = _read(CorpusConfig(source=str(tmp_path / "long.txt")))
    assert [text.strip() for text in found] == [part.strip()] * 3


def test_a_long_text_file_without_separators_is_cut_all_the_same(tmp_path: Path) -> None:
    text = ("word " * 2000 + "\n") * 1000
    (tmp_path / "long.txt").write_text(text)
    found = _read(CorpusConfig(source=str(tmp_path / "long.txt")))
    assert "".join(found) == text
    assert max(map(len, found)) <= 4 * ONE_DOCUMENT_BYTES + 10_001


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7, 50])
def test_byte_ranges_hold_every_line_once(tmp_path: Path, num_parts: int) -> None:
    texts = [f"{'x' * (number % 13)}{number}" for number in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines(texts))
    size = path.stat().st_size
    file = SourceFile(str(path), "a.jsonl", "jsonl", None, size)
    cuts = [size * part // num_parts for part in range(num_parts + 1)]
    pieces = tuple(Piece(file, start, stop) for start, stop in pairwise(cuts))
    assert list(read_documents(Partition(pieces, "text"))) == texts


def test_large_inputs_become_several_partitions(tmp_path: Path) -> None:
    rows = [json.dumps({"text": "y" * 99_000})] * 700  # 69 MB
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    options = {"compression": "none", "use_dictionary": False}
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [f"{n:020d}" * 1000 for n in range(2000)]}), tmp_path / "b.parquet", row_group_size=100, **options
    )
    inputs = list_inputs(CorpusConfig(source=str(tmp_path)))
    assert len(inputs.partitions) > 3
    assert sum(1 for partition in inputs.partitions for _ in read_documents(partition)) == 2700


def test_limit_takes_the_first_documents() -> None:
    file = SourceFile("a", "a", "txt", None, 1)
    partitions = [Partition((Piece(file, start=number),), "text") for number in range(4)]
    limited = limit_documents(partitions, [3, 0, 5, 5], 6)
    assert [(partition.pieces[0].start, partition.max_documents) for partition in limited] == [(0, 3), (2, 3)]  # type: ignore[union-attr]


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    for folder in ("one", "two", "three"):
        (tmp_path / folder / "texts").mkdir(parents=True)
        (tmp_path / folder / "texts" / "a.txt").write_text("same" if folder != "three" else "othr")
    config = CorpusConfig(source=tuple(str(tmp_path / folder / "texts") for folder in ("one", "two", "three")))
    one, two, three = describe_sources(config, Location(str(tmp_path / "digests.json")), InProcessExecutor())
    assert one == two
    assert one["digest"] != three["digest"]
    assert (one["name"], one["files"], one["bytes"]) == ("texts", 1, 4)


def _digest(source: Path, cache: Path) -> str:
    return describe_sources(CorpusConfig(source=str(source)), Location(str(cache)), InProcessExecutor())[0]["digest"]


def test_an_unchanged_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = tmp_path / "a.txt", tmp_path / "cache" / "digests.json"
    source.write_text("some text")
    first = _digest(source, cache)
    assert not cache.exists()  # it was written just now: a change in the same tick of the clock would go unseen
    monkeypatch.setattr(source_digests, "_SETTLED_NS", -(10**18))
    assert _digest(source, cache) == first
    with monkeypatch.context() as patched:
        patched.setattr(source_digests, "_hash_file", lambda url: pytest.fail("hashed again"))
        assert _digest(source, cache) == first
    cache.write_text("{")
    assert _digest(source, cache) == first


@pytest.mark.parametrize("change", ["content", "same size and time", "another file in its place"])
def test_a_changed_file_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.setattr(source_digests, "_SETTLED_NS", -(10**18))
    source, cache = tmp_path / "a.txt", tmp_path / "digests.json"
    source.write_text("some text")
    first, before = _digest(source, cache), source.stat()
    assert cache.exists()
    if change == "another file in its place":
        (tmp_path / "b").write_text("same size"[:9])
        (tmp_path / "b").replace(source)
    else:
        source.write_text("more text" if change == "same size and time" else "longer text")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert _digest(source, cache) != first


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("latin.txt", "line\ncaf\xe9".encode("latin-1"), DataCorruptError, r"latin.txt is not UTF-8: byte 0xe9 at offset 8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', DataCorruptError, r"bad.jsonl: line 2 is not JSON"),
        ("list.jsonl", b"[1]\n", DataCorruptError, "line 1 is not a JSON object"),
        ("number.jsonl", b'{"text": 3}\n', DataCorruptError, "line 1: `text` is not a string"),
        ("column.jsonl", b'{"body": "a", "id": 1}\n', ConfigError, "has no column `text`; it has body, id"),
        ("cut.jsonl.gz", gzip.compress(_lines([str(n) * 50 for n in range(200)]))[:-200], DataCorruptError, r"cut.jsonl.gz is damaged at line \d+"),
        ("not.jsonl.gz", b"plain", DataCorruptError, "not.jsonl.gz is damaged at line 1"),
        ("not.jsonl.zst", b"plain text, no archive", DataCorruptError, "not.jsonl.zst is damaged at line 1"),
        (
            "cut.jsonl.zst",
            zstandard.compress(_lines([f"{n**9}" for n in range(999)]))[:-99],
            DataCorruptError,
            r"zst is damaged at line \d+: .*frame",
        ),
        ("bad.parquet", b"PAR1 no", DataCorruptError, "bad.parquet is not Parquet"),
    ],
)
def test_errors_name_the_place(tmp_path: Path, name: str, content: bytes, error: type[Exception], message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        _read(CorpusConfig(source=str(tmp_path / name)))


def test_line_numbers_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines(["x"] * 9) + b"broken\n")
    file = SourceFile(str(path), "a.jsonl", "jsonl", None, path.stat().st_size)
    with pytest.raises(DataCorruptError, match="line 10 is not JSON"):
        list(read_documents(Partition((Piece(file, 50, file.num_bytes),), "text")))


def test_missing_column_of_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="it has body"):
        _read(CorpusConfig(source=str(tmp_path)))


def test_missing_and_unreadable_sources(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        list_files(str(tmp_path / "absent"))
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ConfigError, match=r"holds no \.txt"):
        list_files(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be read"):
        list_files(str(tmp_path / "a.docx"))
