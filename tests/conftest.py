"""Fixtures shared by all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.executor import InProcessExecutor
from data_pipeline.prepare import Prepared, prepare
from data_pipeline.storage import Location
from tests.support.text import write_texts

TINY_LENGTHS = (32, 64)

settings.register_profile("no deadline", deadline=None)  # by the wall clock, which a busy machine lets run
settings.load_profile("no deadline")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave nothing in the user's cache and find nothing there."""
    folder = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.block_cache.default_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A prepared corpus of a few hundred generated documents, vocabulary 500, sequence lengths 32 and 64. Do not change its files."""
    folder: Path = tmp_path_factory.mktemp("tiny-corpus")
    write_texts(folder / "texts", num_documents=600, seed=1)
    return prepare(
        CorpusConfig(name="tiny", source=str(folder / "texts"), validation_fraction=0.1),
        TokenizerConfig(vocab_size=500),
        TINY_LENGTHS,
        Location.at(folder / "storage"),
        InProcessExecutor(),
        progress=lambda message: None,
    )
