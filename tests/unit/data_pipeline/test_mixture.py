"""Several corpora as one: exact shares, each corpus once an epoch, one tokenizer, a folder that names them."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.config import BatchConfig, CorpusConfig, ObjectiveConfig, Phase, TokenizerConfig
from data_pipeline.errors import ConfigError, DataCorruptError, NotFoundError
from data_pipeline.executor import InProcessExecutor
from data_pipeline.index import CorpusIndex
from data_pipeline.mixture import MIXTURE, Mixture
from data_pipeline.order import micro_batches_of_step
from data_pipeline.prepare import Prepared, prepare
from data_pipeline.storage import Location
from data_pipeline.stream import MicroBatchStream
from tests.support.text import write_texts


@pytest.fixture(scope="module")
def other(tiny_corpus: Prepared, tmp_path_factory: pytest.TempPathFactory) -> CorpusIndex:
    """Another corpus with the tokenizer of the tiny one, beside it."""
    folder = tmp_path_factory.mktemp("other")
    write_texts(folder / "texts", num_documents=60, seed=2)
    corpus = CorpusConfig(name="other", source=str(folder / "texts"), validation_fraction=0.2)
    tokenizer = TokenizerConfig(path=f"{tiny_corpus.folder}/tokenizer")
    storage = tiny_corpus.folder.parent.parent
    return CorpusIndex.open(prepare(corpus, tokenizer, (32, 64), storage, InProcessExecutor(), lambda _: None).folder)


@pytest.fixture(scope="module")
def mixture(tiny_corpus: Prepared, other: CorpusIndex) -> Mixture:
    return Mixture((CorpusIndex.open(tiny_corpus.folder), other), (3.0, 1.0))


def _phases(lanes: int = 2, micro_batch: int = 4, steps: int = 500) -> tuple[Phase, ...]:
    return BatchConfig(global_batch_size=lanes * micro_batch, micro_batch_size=micro_batch, sequence_length=64).phases_until(steps)


def _contents(stream: MicroBatchStream, numbers: range) -> list[tuple[int, ...]]:
    """The tokens of each sample, masks undone."""
    found: list[tuple[int, ...]] = []
    for number in numbers:
        samples = stream[number].samples
        ids = samples.token_ids.copy()
        ids[samples.mlm_positions] = samples.mlm_labels
        stops = samples.lengths.cumsum()
        found += [tuple(ids[stop - length : stop].tolist()) for stop, length in zip(stops, samples.lengths, strict=True)]
    return found


def test_shares_are_exact_and_every_corpus_is_read_once_an_epoch(mixture: Mixture) -> None:
    objective = ObjectiveConfig(sentence_objective="none")
    small = mixture.indexes[1].num_samples("train", 64)
    lane = [_contents(MicroBatchStream(mixture, objective, _phases(1, 4, steps=2000), 5), range(1000))]
    alone = [
        Counter(_contents(MicroBatchStream(index, objective, _phases(1, 1, steps=20_000), 5), range(index.num_samples("train", 64))))
        for index in mixture.indexes
    ]
    from_small = [sample for sample in lane[0] if sample in alone[1]]
    assert len(lane[0]) == 4000
    assert abs(len(from_small) - 1000) <= 8  # a chunk or two of few words occurs in both
    assert not [sample for sample in lane[0] if sample not in alone[0] and sample not in alone[1]]
    assert Counter(from_small[:small]).keys() <= alone[1].keys()
    assert len(Counter(from_small[:small])) > 0.97 * len(alone[1])


@pytest.mark.parametrize("weights", [(9.0, 1.0), (0.97, 0.03)])
def test_a_step_holds_every_corpus_by_weight(mixture: Mixture, weights: tuple[float, float]) -> None:
    """Not only a lane: lanes that all took a rare corpus at the same depth would give it to one step in many."""
    stream = MicroBatchStream(replace(mixture, weights=weights), ObjectiveConfig(sentence_objective="none"), _phases(8, 4), 5)
    rare = MicroBatchStream(mixture.indexes[1], stream.objective, _phases(1, 1, steps=20_000), 5)
    known = set(_contents(rare, range(mixture.indexes[1].num_samples("train", 64))))
    share = weights[1] / sum(weights) * 32
    for step in range(12):
        found = sum(sample in known for sample in _contents(stream, micro_batches_of_step(stream.phases, step)))
        assert abs(found - share) <= 2  # a chunk or two of few words occurs in both


def test_a_mixture_is_pure(mixture: Mixture) -> None:
    steady = MicroBatchStream(mixture, ObjectiveConfig(), _phases(), 7)
    expected = {number: steady[number].digest for number in range(600, 660)}
    for number in (659, 600, 631):
        assert MicroBatchStream(mixture, ObjectiveConfig(), _phases(), 7)[number].digest == expected[number]


def test_a_single_corpus_is_its_own_mixture(tiny_corpus: Prepared) -> None:
    index, mixture = CorpusIndex.open(tiny_corpus.folder), Mixture.open(tiny_corpus.folder)
    assert (mixture.fingerprint, mixture.unigram_entropy) == (index.fingerprint, index.unigram_entropy)
    one, two = (MicroBatchStream(each, ObjectiveConfig(), _phases(), 7) for each in (index, mixture))
    assert [one[number].digest for number in range(20)] == [two[number].digest for number in range(20)]


def test_validation_covers_every_corpus_in_proportion(mixture: Mixture) -> None:
    stream = MicroBatchStream(mixture, ObjectiveConfig(), _phases(), 7, split="validation")
    assert sum(stream[number].num_samples for number in range(len(stream))) == mixture.num_samples("validation", 64)
    sizes = [-(-index.num_samples("validation", 64) // 4) for index in mixture.indexes]
    half = Counter(int(corpus) for corpus, _ in stream._validation_order[: len(stream) // 2])
    assert all(abs(half[corpus] - size / 2) <= 1 for corpus, size in enumerate(sizes))


def test_a_saved_mixture_is_opened_and_checked(mixture: Mixture, tmp_path: Path) -> None:
    storage = Location.at(tmp_path)
    for index in mixture.indexes:
        shutil.copytree(index.folder.url, f"{storage}/corpora/{index.folder.name}")
    folder = mixture.save(storage)
    assert folder.name == f"mixture-{mixture.fingerprint[:12]}"
    opened = Mixture.open(folder)
    assert (opened.fingerprint, opened.weights, opened.tokenizer_digest) == (mixture.fingerprint, (3.0, 1.0), mixture.tokenizer_digest)
    assert replace(mixture, weights=(1.0, 1.0)).fingerprint != mixture.fingerprint
    manifest = (folder / MIXTURE).read_json()
    manifest["corpora"][1]["fingerprint"] = "0" * 64
    (folder / MIXTURE).write_json(manifest)
    with pytest.raises(DataCorruptError, match=f"{mixture.indexes[1].folder.name} is not the corpus"):
        Mixture.open(folder)
    (folder / MIXTURE).write_bytes(b"{}")
    with pytest.raises(DataCorruptError, match="not a mixture"):
        Mixture.open(folder)
    with pytest.raises(NotFoundError):
        Mixture.open(storage / "corpora" / "nothing")


def test_corpora_with_different_tokenizers_do_not_mix(mixture: Mixture, tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", num_documents=60, seed=9)
    corpus = CorpusConfig(name="own", source=str(tmp_path / "texts"))
    own = prepare(corpus, TokenizerConfig(vocab_size=300), (64,), Location.at(tmp_path), InProcessExecutor(), lambda _: None).folder
    shutil.copytree(mixture.indexes[0].folder.url, f"{tmp_path}/corpora/{mixture.indexes[0].folder.name}")
    folder = Mixture((mixture.indexes[0], CorpusIndex.open(own)), (1.0, 1.0)).save(Location.at(tmp_path))
    with pytest.raises(ConfigError, match="different tokenizers"):
        Mixture.open(folder)
