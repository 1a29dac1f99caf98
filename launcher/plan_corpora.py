"""Finds the prepared corpora that a plan counts, by their settings (reads local files)."""

import json
from collections.abc import Iterator
from typing import Any

from data_pipeline.config import CorpusConfig
from data_pipeline.errors import MaskwrightError, NotFoundError
from data_pipeline.index import MANIFEST, CorpusIndex
from data_pipeline.mixture import Mixture
from data_pipeline.sources import PYTHON_DOCS, list_files, source_names
from data_pipeline.storage import Location
from trainer.config import RunConfig


def find_mixture(config: RunConfig) -> tuple[Mixture | None, tuple[str, ...], str]:
    """The prepared corpora of a configuration and their names, and how they were found; or None, no names, and why not.

    They are found by their settings: text is not read again to see whether it has changed."""
    if not Location.at(config.corpora_storage).is_local:
        return None, (), "the storage of the corpora is not on this machine"
    try:
        folders = [_find_corpus(config, part) for part in _corpora(config)]
        mixture = Mixture.join([CorpusIndex.open(folder, config.data) for folder in folders], [part.weight for part in config.mixture] or [1.0])
    except MaskwrightError as error:
        return None, (), error.cause
    return mixture, tuple(folder.name for folder in folders), "found by its settings; sources are not compared"


def source_errors(config: RunConfig) -> Iterator[MaskwrightError]:
    """What preparation would refuse of text on this machine; text in stores is not looked up."""
    for corpus in _corpora(config):
        for source in source_names(corpus):
            if source != PYTHON_DOCS and Location.at(source).is_local:
                try:
                    list_files(source)
                except MaskwrightError as error:
                    yield error


def _corpora(config: RunConfig) -> list[CorpusConfig]:
    return [part.corpus for part in config.mixture] or [config.corpus]


def _find_corpus(config: RunConfig, corpus: CorpusConfig) -> Location:
    """The newest corpus with these settings.

    Raises:
        NotFoundError: there is none.
    """
    folder = Location.at(config.corpora_storage) / "corpora"
    found = [folder / name for name in folder.children() if name.startswith(f"{corpus.label}-") and _fits(folder / name / MANIFEST, config, corpus)]
    if not found:
        raise NotFoundError(f"corpus {corpus.label} is not prepared in {folder.parent}", "Run `maskwright prepare CONFIG`.")
    return max(found, key=lambda each: (each / MANIFEST).path.stat().st_mtime)


def _fits(manifest: Location, config: RunConfig, corpus: CorpusConfig) -> bool:
    try:
        stored: dict[str, Any] = json.loads(manifest.read_bytes())
        settings, names = dict(stored["config"]["corpus"]), [source["name"] for source in stored["sources"]]
        settings.pop("removed_test_texts", None)  # older manifests have none
    except (NotFoundError, ValueError, KeyError, TypeError):
        return False
    wanted = {**corpus.model_dump(mode="json", exclude={"source", "name", "contamination"}), "personal_data": sorted(set(corpus.personal_data))}
    tokenizer = stored["config"]["tokenizer"]
    trains = config.tokenizer.path is None and not (config.mixture and corpus != config.mixture[0].corpus)
    return (
        settings == wanted
        and names == [Location.at(name).name if name != "python-docs" else name for name in source_names(corpus)]
        and stored["sequence_lengths"] == list(config.batch.sequence_lengths)
        and (tokenizer == config.tokenizer.model_dump(exclude={"path"}) if trains else "digest" in tokenizer)
    )
