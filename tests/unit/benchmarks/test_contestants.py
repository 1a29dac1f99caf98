"""The contestants that run in our own environment measure what they say, on a small corpus: ours and stock webdataset."""

import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.children import Contestant, run_child
from benchmarks.contestants import batching, preparing, reading, resuming, scaling
from benchmarks.contestants.documents import TOKENIZER, Documents
from benchmarks.contestants.peers import load
from benchmarks.contestants.webdataset_peer import write_npy, write_raw
from benchmarks.corpora import write_neutral
from data_pipeline.index import CorpusIndex
from data_pipeline.prepare import Prepared
from data_pipeline.storage import Location
from tests.support.text import write_texts

LENGTH = 64
SECONDS = 0.05


@pytest.fixture(scope="module")
def corpus(tiny_corpus: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(our corpus, the neutral documents with webdataset's data sets beside them)."""
    documents = tmp_path_factory.mktemp("neutral") / "documents"
    write_neutral(CorpusIndex.open(tiny_corpus.folder), documents)
    write_npy(str(documents), str(documents / "npy"))
    write_raw(str(documents), str(documents / "raw"))
    return tiny_corpus.folder.url, str(documents)


def test_all_have_the_same_documents(corpus: tuple[str, str]) -> None:
    folder, documents = corpus
    index = CorpusIndex.open(Location.at(folder))
    source = Documents.open(documents)
    assert len(source) == index.blocks("train")["documents"].sum()
    num_sentences = sum(len(index.read_block(record).sentence_ends) for record in index.blocks("train"))
    assert sum(map(len, source)) == index.blocks("train")["tokens"].sum() + num_sentences
    for name in ("npy", "raw"):
        found = list(load(f"webdataset_peer:read_{name}")(f"{documents}/{name}"))
        assert [array.tolist() for array in found] == [array.tolist() for array in source]


def test_a_peer_continues_at_its_position(corpus: tuple[str, str]) -> None:
    documents = corpus[1]
    expected = [array.tolist() for array in Documents.open(documents)][37:]
    assert [array.tolist() for array in load("webdataset_peer:resume_raw")(f"{documents}/raw", 37)] == expected


def test_reading_counts_documents_and_bytes(corpus: tuple[str, str]) -> None:
    folder, documents = corpus
    for found in (reading.ours(folder, SECONDS), reading.peer("webdataset_peer:read_raw", f"{documents}/raw", SECONDS)):
        assert found["documents_per_s"] > 0
        assert found["bytes_per_s"] > 2 * found["documents_per_s"]


@pytest.mark.parametrize("packing", ["unpadded", "rows", "none"])
def test_batches_of_ours(corpus: tuple[str, str], packing: str) -> None:
    found = batching.ours(corpus[0], LENGTH, packing, SECONDS)
    assert 3 * found["samples_per_s"] < found["tokens_per_s"] <= LENGTH * found["samples_per_s"]


def test_batches_on_a_peers_reader(corpus: tuple[str, str]) -> None:
    documents = corpus[1]
    for contestant in (batching.hugging_face, batching.our_masking):
        found = contestant("webdataset_peer:read_raw", f"{documents}/raw", documents, LENGTH, SECONDS)
        assert found["counts"]["samples"] % batching.BATCH == 0
        assert 3 * found["samples_per_s"] < found["tokens_per_s"] <= LENGTH * found["samples_per_s"]


def test_first_batches_after_a_resume(corpus: tuple[str, str]) -> None:
    folder, documents = corpus
    peer = resuming.peer("webdataset_peer:resume_raw", f"{documents}/raw", documents, LENGTH, 0.5)
    for found in (resuming.ours(folder, LENGTH, 0.9), peer):
        assert found["counts"]["samples"] == batching.BATCH
        assert found["wall_s"] > 0


def test_a_rank_of_many_reads_its_part_of_a_step(corpus: tuple[str, str]) -> None:
    found = scaling.rank(corpus[0], rank=1, world_size=2, lanes_per_rank=2, share=0.5, sequence_length=LENGTH)
    assert 0 < found["first_bytes"] <= found["step_bytes"]
    assert found["num_samples"] == CorpusIndex.open(Location.at(corpus[0])).num_samples("train", LENGTH)


def test_preparing_tells_the_steps_and_encoding_covers_the_same_documents(corpus: tuple[str, str], tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", num_documents=60, seed=3)
    shutil.copytree(Path(corpus[1]) / TOKENIZER, tmp_path / TOKENIZER)
    whole = preparing.whole(str(tmp_path / "texts"), str(tmp_path / TOKENIZER))
    assert {"read", "clean", "sentences", "encode", "contamination"} <= set(whole["steps"])
    assert sum(whole["steps"].values()) <= whole["cpu_s"] * 1.01
    encoded = preparing.encode_batch(str(tmp_path / "texts"), str(tmp_path / TOKENIZER))
    assert encoded["kept_documents"] == whole["kept_documents"]
    assert preparing.encode_batch_fast(str(tmp_path / "texts"), str(tmp_path / TOKENIZER))["tokens"] == encoded["tokens"]


@pytest.mark.full
def test_a_save_beside_training_is_measured() -> None:
    arguments = {"repeats": 1, "layers": 1, "width": 64}
    found = run_child(Contestant("ours", sys.executable, "benchmarks.contestants.saving:stalls", arguments, is_ours=True), timeout_s=110)
    assert all(found[name] > 0 for name in ("stall_s", "first_stall_s", "synchronous_s", "deepspeed_s", "step_alone_s"))
    assert found["num_bytes"] > 14 * found["num_parameters"]
    assert found["counts"]["saves"] == 1
