"""Filters, scrubbing, near-duplicates and contamination inside `prepare`: what is counted, what goes, and that no layout changes it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import CorpusConfig, NearDuplicatesConfig, QualityConfig, TokenizerConfig
from data_pipeline.encoding import Encoder
from data_pipeline.errors import ConfigError, NotFoundError
from data_pipeline.executor import InProcessExecutor
from data_pipeline.index import CorpusIndex
from data_pipeline.partitions import Job, kept_documents, read_partition
from data_pipeline.prepare import Prepared, find_prepared, prepare
from data_pipeline.selection import select
from data_pipeline.sources import list_inputs
from data_pipeline.storage import Location
from tests.support.text import generate_documents

TOKENIZER = TokenizerConfig(vocab_size=300)
LENGTHS = (64,)
DOCUMENTS = [text for text in generate_documents(120, 9) if len(text.split()) > 80]
COPIES = [text.replace(text.split()[40], "otherwise", 1) for text in DOCUMENTS[:10]]
TEST_TEXTS = {"topics": [" ".join(DOCUMENTS[number].split()[10:40]) for number in range(4)] + ["too short"]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selection") / "texts"
    folder.mkdir()
    for name, texts in {"a": DOCUMENTS, "b": [*COPIES, DOCUMENTS[0]], "c": ["tiny", "write to jane@example.org and john@example.org"]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def _prepare(source: Path, storage: Path, texts: Mapping[str, Sequence[str]] | None = None, **settings: Any) -> Prepared:
    corpus = CorpusConfig(source=str(source), validation_fraction=0.1, **settings)
    return prepare(corpus, TOKENIZER, LENGTHS, Location.at(storage), InProcessExecutor(), lambda message: None, test_texts=lambda: texts or {})


def _kept(summary: dict[str, Any]) -> int:
    return summary["train_documents"] + summary["validation_documents"]


def test_nothing_is_dropped_unless_asked_for(source: Path, tmp_path: Path) -> None:
    summary = _prepare(source, tmp_path).summary
    names = ("duplicates", "low_quality", "near_duplicates", "contaminated", "quality", "personal_data")
    assert [summary[name] for name in names] == [1, 0, 0, 0, {}, {}]
    assert _kept(summary) == len(DOCUMENTS) + len(COPIES) + 2
    assert set(summary["cpu_seconds"]) >= {"read", "clean", "spill", "sentences", "encode", "write"}


def test_quality_rules_drop_documents_and_are_counted(source: Path, tmp_path: Path) -> None:
    summary = _prepare(source, tmp_path, quality={"min_words": 9}).summary
    assert summary["low_quality"] >= 2
    assert summary["quality"]["words"] == 2
    assert _kept(summary) == summary["documents"] - summary["low_quality"] - summary["duplicates"]


def test_a_corpus_that_is_all_bad_says_which_setting(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="documents fail it") as caught:
        _prepare(source, tmp_path, quality={"min_words": 90_000})
    assert "corpus.quality" in caught.value.remedy


def test_personal_data_is_replaced_and_counted(source: Path, tmp_path: Path) -> None:
    prepared = _prepare(source, tmp_path, personal_data=("email",))
    assert prepared.summary["personal_data"] == {"email": 2}
    assert "jane" not in (prepared.folder / "tokenizer" / "vocab.txt").read_bytes().decode()
    index = CorpusIndex.open(prepared.folder)
    encoder = Encoder.load(prepared.folder / "tokenizer")
    placeholder = encoder.encode([["<EMAIL>"]]).ids.tolist()
    held = [index.read_block(record).ids.tolist() for record in index.records]
    assert sum(ids[start : start + len(placeholder)] == placeholder for ids in held for start in range(len(ids))) == 2


def test_near_duplicates_leave_one_of_each_group(source: Path, tmp_path: Path) -> None:
    summary = _prepare(source, tmp_path, near_duplicates={"threshold": 0.6}).summary
    assert (summary["near_duplicates"], _kept(summary)) == (len(COPIES), len(DOCUMENTS) + 2)


def test_what_is_dropped_depends_on_no_layout(source: Path, tmp_path: Path) -> None:
    corpus = CorpusConfig(source=str(source), near_duplicates=NearDuplicatesConfig(threshold=0.6), contamination="remove")
    together = list_inputs(corpus).partitions
    alone = [replace(partition, pieces=(piece,)) for partition in together for piece in partition.pieces]
    orders: list[list[str]] = []
    for num_partitions, inputs in ((1, together), (4, alone), (17, alone[::-1])):
        job = Job(Location.at(tmp_path / str(num_partitions)), corpus, num_partitions, block_tokens=512, sequence_lengths=LENGTHS, held_out="digest")
        read = [read_partition(job, numbered) for numbered in enumerate(inputs)]
        spills = [name for receipt in read for name in receipt["spills"]]
        found = select(job, spills, TEST_TEXTS, InProcessExecutor())
        kept = [document for number in range(num_partitions) for document in kept_documents(job, spills, number)[0]]
        assert (found.contaminated, found.near_duplicates) == (8, len(COPIES) - 4)
        assert found.smallest_split_hash == min(document.split_hash for document in kept)
        orders.append([document.text for document in kept])
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) == len(DOCUMENTS) + 2 - 4
    assert not set(DOCUMENTS[:4]) & set(orders[0])


def test_contamination_is_reported_and_changes_nothing(source: Path, tmp_path: Path) -> None:
    plain = _prepare(source, tmp_path / "plain")
    compared = _prepare(source, tmp_path / "compared", TEST_TEXTS)
    assert plain.folder.name == compared.folder.name
    assert (plain.folder / "corpus.json").read_bytes() == (compared.folder / "corpus.json").read_bytes()
    assert not (plain.folder / "contamination.json").exists()
    found = (compared.folder / "contamination.json").read_json()["tasks"]["topics"]
    assert found.pop("digest")
    assert found == {"documents": 8, "removed": False, "test_texts": 5, "test_texts_long_enough": 4, "test_texts_found": 4}


def test_a_corpus_that_is_there_is_compared_with_a_new_task(source: Path, tmp_path: Path) -> None:
    prepared = _prepare(source, tmp_path, TEST_TEXTS, near_duplicates={})
    before = {path: path.read_bytes() for path in prepared.folder.path.rglob("*") if path.is_file()}
    again = _prepare(source, tmp_path, {**TEST_TEXTS, "other": [DOCUMENTS[20]]}, near_duplicates={})
    assert not again.created
    after = {path: path.read_bytes() for path in prepared.folder.path.rglob("*") if path.is_file()}
    assert [path.name for path in after if after[path] != before.get(path)] == ["contamination.json"]
    assert set(before) == set(after)
    assert {name: task["documents"] for name, task in (prepared.folder / "contamination.json").read_json()["tasks"].items()} == {
        "topics": 8,
        "other": 1,
    }
    written_at = (prepared.folder.path / "contamination.json").stat().st_mtime_ns
    _prepare(source, tmp_path, TEST_TEXTS, near_duplicates={})
    assert (prepared.folder.path / "contamination.json").stat().st_mtime_ns == written_at


def test_contaminated_documents_are_removed_and_the_test_sets_are_part_of_the_identity(source: Path, tmp_path: Path) -> None:
    kept = _prepare(source, tmp_path, TEST_TEXTS)
    removed = _prepare(source, tmp_path, TEST_TEXTS, contamination="remove")
    assert kept.folder != removed.folder
    assert (removed.summary["contaminated"], _kept(removed.summary)) == (8, _kept(kept.summary) - 8)
    assert (removed.folder / "contamination.json").read_json()["tasks"]["topics"]["removed"]
    corpus = CorpusConfig(source=str(source), validation_fraction=0.1, contamination="remove")
    assert find_prepared(corpus, TOKENIZER, LENGTHS, Location.at(tmp_path), test_texts=lambda: TEST_TEXTS) == removed.folder
    with pytest.raises(NotFoundError):
        find_prepared(corpus, TOKENIZER, LENGTHS, Location.at(tmp_path), test_texts=lambda: {"topics": ["other"]})


def test_every_switch_makes_another_corpus(source: Path, tmp_path: Path) -> None:
    switches: list[dict[str, Any]] = [
        {}, {"quality": QualityConfig(min_words=1, min_sentences=1)}, {"personal_data": ("ip",)}, {"personal_data": ("ip", "email")},
        {"near_duplicates": {}}, {"near_duplicates": {"threshold": 0.7}},
    ]  # fmt: skip
    assert len({_prepare(source, tmp_path, **switch).folder.name for switch in switches}) == len(switches)
    assert _prepare(source, tmp_path, personal_data=("email", "ip")).folder == _prepare(source, tmp_path, personal_data=("ip", "email")).folder
