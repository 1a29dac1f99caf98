"""report CORPUS: tables, JSON, and a page that needs nothing else."""

import json
import re
import shutil
import time
from pathlib import Path

import fsspec
import pytest

from data_pipeline.errors import ExitCode
from data_pipeline.prepare import Prepared
from data_pipeline.storage import Location
from launcher import cli
from launcher.corpus_report import CorpusReport


@pytest.fixture
def copy(tiny_corpus: Prepared, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_corpus.folder.url, tmp_path / "storage" / "corpora" / "tiny-0123"))


def invoke(*arguments: str) -> int:
    return cli.run(list(arguments), debug=False)


def test_tables_page_and_json(copy: Path, tiny_corpus: Prepared, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke("report", str(copy)) == 0
    shown = capsys.readouterr().out
    tokens = tiny_corpus.summary["train_tokens"] + tiny_corpus.summary["validation_tokens"]
    for said in ("Preparation", "exact duplicates", "Lengths in tokens", "Expected fill of rows", f"{tokens:,} tokens", "form no pair"):
        assert said in shown
    assert "chosen by a hash of their number" in shown
    assert f"next: open {copy}/report.html" in shown
    page = (copy / "report.html").read_text()
    assert page.count('<img src="data:image/svg+xml;base64,') == 5
    assert not re.search(r"(src|href)=\"(?!data:)|<script|@import|url\(", page)
    assert all(re.findall(r'alt="([^"]*)"', page))
    assert invoke("report", str(copy), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == f"{copy}/report.html"
    assert found["counts"]["train_tokens"] == tiny_corpus.summary["train_tokens"]
    assert [row["sequence_length"] for row in found["rows"]] == [32, 64]
    assert 0 < found["rows"][0]["fill_padded"]["64"] <= found["rows"][0]["fill_packed"]["64"] <= 1
    assert invoke("verify", str(copy)) == 0  # a report in its folder does not damage a corpus


def test_by_name_and_elsewhere(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("report", "tiny-0123", "--storage", "storage", "--output", "page.html") == 0
    assert (tmp_path / "page.html").exists()
    assert not (copy / "report.html").exists()
    assert invoke("report", "nothing", "--storage", "storage") == ExitCode.NOT_FOUND
    assert invoke("report", "memory://nothing/here", "--storage", "storage") == ExitCode.NOT_FOUND
    assert len(capsys.readouterr().err.strip().splitlines()) == 4


def test_in_a_store(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"report-{time.monotonic_ns()}"
    memory = fsspec.filesystem("memory")
    memory.put(str(copy), f"/{name}", recursive=True)
    assert invoke("report", f"memory://{name}", "--json") == 0
    assert memory.exists(f"/{name}/report.html")
    assert json.loads(capsys.readouterr().out)["corpus"] == f"memory://{name}"


def test_damage_is_not_reported_on(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "train-000000.tar"
    path.write_bytes(bytes(path.stat().st_size))
    assert invoke("report", str(copy)) == ExitCode.DATA_CORRUPT
    assert "train-000000.tar" in capsys.readouterr().err
    assert not (copy / "report.html").exists()


def test_what_others_wrote_is_escaped(copy: Path) -> None:
    report = CorpusReport.of(Location.at(copy))
    hostile = {"<script>alert(1)</script>": {"documents": 3, "test_texts_found": 2, "test_texts": 9, "removed": False}}
    page = CorpusReport(report.folder, report.statistics, hostile).render()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "Overlap with test sets" in page
