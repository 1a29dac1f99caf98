"""Makes what the contestants read, once per text, in the cache folder: our corpus, the neutral documents, each peer's data set."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.children import Contestant, run_child
from benchmarks.contestants.documents import ABOUT, TOKENIZER, with_separators, write_documents
from benchmarks.environments import CACHE, Peer, python_of
from benchmarks.harness import Options
from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.executor import InProcessExecutor
from data_pipeline.index import CorpusIndex
from data_pipeline.prepare import prepare
from data_pipeline.storage import Location

SEQUENCE_LENGTHS = (128, 512)
_SHORT_DOCUMENTS = 4000


@dataclass(frozen=True)
class BenchCorpus:
    """The same documents in our form and in the neutral one."""

    folder: str
    """Our corpus."""
    documents: str
    """Folder of the neutral form; the peers' data sets lie beside it."""
    description: dict[str, Any]
    """Goes into the claims' environment: name, documents, tokens, and a digest of the corpus."""


def corpus_config(options: Options) -> CorpusConfig:
    """The text of a benchmark as a corpus; with --short a part of it."""
    return CorpusConfig(source=options.corpus, max_documents=_SHORT_DOCUMENTS if options.short else None)


def make_corpus(options: Options) -> BenchCorpus:
    """Prepare the text and write its documents in the neutral form; both are kept and found again."""
    options.progress(f"corpus of {Path(options.corpus).name}")
    prepared = prepare(
        corpus_config(options),
        TokenizerConfig(),
        SEQUENCE_LENGTHS,
        Location.at(CACHE),
        InProcessExecutor(),
        progress=lambda message: options.progress(f"  {message}"),
    )
    index = CorpusIndex.open(prepared.folder)
    folder = CACHE / "documents" / prepared.folder.name
    if not (folder / ABOUT).exists():
        options.progress("documents for the peers")
        write_neutral(index, folder)
    counts = prepared.summary
    description = {
        "name": Path(options.corpus).name,
        "documents": counts["train_documents"],
        "tokens": counts["train_tokens"],
        "block_tokens": index.manifest["block_tokens"],
        "digest": hashlib.sha256(index.fingerprint.encode()).hexdigest()[:12],
    }
    return BenchCorpus(prepared.folder.url, str(folder), description)


def write_neutral(index: CorpusIndex, folder: Path) -> None:
    """Write the training documents of a corpus, its vocabulary and its tokenizer in the neutral form."""
    rmtree(folder, ignore_errors=True)
    copytree(index.tokenizer_folder, folder / TOKENIZER)
    write_documents(folder, _documents(index), asdict(index.vocabulary))


def peer_data(peer: Peer, variant: str, corpus: BenchCorpus, progress: Callable[[str], None]) -> str:
    """The peer's data set, written in the peer's environment where it is missing; `variant` names a function of the peer's module.

    Raises:
        PeerUnavailableError, ContestantError: it cannot be made.
    """
    folder = Path(corpus.documents) / f"{peer.name}-{peer.version}-{variant}"
    done = folder / ".complete"
    if not done.exists():
        progress(f"data set of {peer.label} ({variant})")
        rmtree(folder, ignore_errors=True)
        arguments = {"documents": corpus.documents, "folder": str(folder)}
        run_child(
            Contestant(f"writer of {peer.label}", python_of(peer, progress), f"benchmarks.contestants.{peer.name}_peer:write_{variant}", arguments)
        )
        done.touch()
    return str(folder)


def _documents(index: CorpusIndex) -> Iterator[NDArray[np.integer]]:
    for record in index.blocks("train"):
        block = index.read_block(record)
        yield from with_separators(block.ids, block.sentence_ends, block.document_ends, index.vocabulary.sep)
