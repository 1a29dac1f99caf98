"""Large synthetic corpora open and read like any other, and small ones hold the documents that they are made of."""

from pathlib import Path

import numpy as np

from benchmarks import synthetic
from benchmarks.synthetic import build, join, shard_entry
from data_pipeline.config import BatchConfig, ObjectiveConfig
from data_pipeline.index import CorpusIndex
from data_pipeline.prepare import Prepared
from data_pipeline.storage import Location
from data_pipeline.stream import MicroBatchStream


def _silent(message: str) -> None:
    del message


def test_joined_blocks_hold_all_documents(tiny_corpus: Prepared) -> None:
    index = CorpusIndex.open(tiny_corpus.folder)
    blocks = [index.read_block(record) for record in index.blocks("train")[:3]]
    joined = join(blocks)
    assert joined.ids.tolist() == [token for block in blocks for token in block.ids.tolist()]
    assert len(joined.document_ends) == sum(len(block.document_ends) for block in blocks)
    assert int(joined.sentence_ends[-1]) == len(joined.ids)
    assert int(joined.document_ends[-1]) == len(joined.sentence_ends)


def test_a_large_corpus_of_a_few_blocks_streams(tiny_corpus: Prepared, tmp_path: Path) -> None:
    real = CorpusIndex.open(tiny_corpus.folder)
    blocks = [real.read_block(record) for record in real.blocks("train")[:3]]
    made = build(real, blocks, tmp_path / "large", num_blocks=10_000, progress=_silent)
    index = CorpusIndex.open(Location.at(made.folder))
    assert len(index.blocks("train")) == made.num_blocks == 10_000
    assert made.num_tokens == int(index.blocks("train")["tokens"].sum(dtype=np.int64))
    assert made.num_documents == int(index.blocks("train")["documents"].sum(dtype=np.int64))
    assert made.index_bytes == (Path(made.folder) / "index.bin").stat().st_size
    shape = BatchConfig(global_batch_size=64, micro_batch_size=16, sequence_length=64)
    stream = MicroBatchStream(index, ObjectiveConfig(), shape.phases_until(1000), seed=0)
    assert stream[3999].num_samples == 16


def test_large_blocks_use_the_documents_again_when_they_are_too_few(tiny_corpus: Prepared) -> None:
    index = CorpusIndex.open(tiny_corpus.folder)
    blocks = synthetic.large_blocks(index)
    assert len(blocks) == 4
    assert all(synthetic.BLOCK_TOKENS <= len(block.ids) < 2 * synthetic.BLOCK_TOKENS for block in blocks)


def test_larger_blocks_hold_the_same_documents(tiny_corpus: Prepared, tmp_path: Path) -> None:
    real = CorpusIndex.open(tiny_corpus.folder)
    larger = CorpusIndex.open(Location.at(synthetic.with_larger_blocks(real, tmp_path / "larger", 20_000)))
    assert len(larger.blocks("train")) < len(real.blocks("train"))
    ids = [np.concatenate([index.read_block(record).ids for record in index.blocks("train")]) for index in (real, larger)]
    assert (ids[0] == ids[1]).all()
    assert larger.blocks("train")["documents"].sum() == real.blocks("train")["documents"].sum()


def test_a_listed_shard_has_what_the_manifest_says_of_any() -> None:
    assert set(shard_entry("train-000000.tar", 5)) == {"name", "bytes", "sha256", "blocks"}
