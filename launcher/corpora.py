"""The corpora of a run: prepares one or several, and finds them again (Ray starts only if there is something to do in parallel)."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from data_pipeline.config import CorpusConfig, DataConfig, TokenizerConfig
from data_pipeline.errors import NotFoundError
from data_pipeline.storage import Location
from trainer.config import RunConfig
from trainer.finetune_config import TaskConfig

if TYPE_CHECKING:
    from data_pipeline.index import CorpusIndex
    from data_pipeline.mixture import Mixture
    from data_pipeline.prepare import Prepared

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class PreparedCorpora:
    """What a run trains on."""

    folder: Location
    """Of the corpus, or of the mixture that names several."""
    parts: "tuple[Prepared, ...]"

    @property
    def created(self) -> bool:
        """False when everything was there already."""
        return any(part.created for part in self.parts)


def prepare_corpora(config: RunConfig, start_ray: Callable[[], object], say: Callable[[str], None]) -> PreparedCorpora:
    """Prepare the corpus of a configuration, or every part of its mixture, and compare it with the test sets of its tasks.

    Raises:
        ConfigError: two parts of the mixture are the same corpus. See `data_pipeline.prepare.prepare` for more.
    """
    from data_pipeline.index import CorpusIndex
    from data_pipeline.mixture import Mixture
    from data_pipeline.prepare import prepare

    parts: list[Prepared] = []

    def prepared(corpus: CorpusConfig, tokenizer: TokenizerConfig) -> CorpusIndex:
        if config.mixture:
            say(f"  {corpus.label}")
        parts.append(
            prepare(
                corpus,
                tokenizer,
                config.batch.sequence_lengths,
                Location.at(config.corpora_storage),
                ExecutorOnDemand(start_ray),
                lambda text: say(f"  {text}"),
                test_texts=lambda: held_out_texts(config),
            )
        )
        return CorpusIndex.open(parts[-1].folder, config.data)

    indexes = _each_part(config, prepared)
    if not config.mixture:
        return PreparedCorpora(parts[0].folder, tuple(parts))
    folder = Mixture.join(indexes, [part.weight for part in config.mixture]).save(Location.at(config.corpora_storage))
    return PreparedCorpora(folder, tuple(parts))


def open_corpora(config: RunConfig) -> "Mixture":
    """The prepared corpora of a configuration.

    Raises:
        NotFoundError: one has not been prepared, or a source is missing.
    """
    from data_pipeline.index import CorpusIndex
    from data_pipeline.mixture import Mixture
    from data_pipeline.prepare import find_prepared

    def found(corpus: CorpusConfig, tokenizer: TokenizerConfig) -> CorpusIndex:
        arguments = (corpus, tokenizer, config.batch.sequence_lengths, Location.at(config.corpora_storage))
        return CorpusIndex.open(find_prepared(*arguments, test_texts=lambda: held_out_texts(config)), config.data)

    return Mixture.join(_each_part(config, found), [part.weight for part in config.mixture] or [1.0])


def _each_part(config: RunConfig, corpus_of: "Callable[[CorpusConfig, TokenizerConfig], CorpusIndex]") -> "list[CorpusIndex]":
    """The corpora in order; a tokenizer that is trained is trained on the first and given to the others."""
    first, *others = [part.corpus for part in config.mixture] or [config.corpus]
    indexes = [corpus_of(first, config.tokenizer)]
    for corpus in others:
        indexes.append(corpus_of(corpus, TokenizerConfig(path=config.tokenizer.path or indexes[0].tokenizer_folder)))
    return indexes


def is_prepared(folder: Location, settings: DataConfig | None = None) -> bool:
    """Whether a corpus, or a mixture and all its corpora, are there.

    Raises:
        DataCorruptError: one is damaged, in a way that `settings` do not pass over.
    """
    from data_pipeline.mixture import Mixture

    try:
        Mixture.open(folder, settings)
    except NotFoundError:
        return False
    return True


def held_out_texts(config: RunConfig) -> dict[str, list[str]]:
    """The texts of the test sets of a run's tasks, by the names of the tasks, all of whose files are checked.

    Raises: see `trainer.tasks.load_task`.
    """
    from data_pipeline.python_docs import fingerprint
    from trainer.tasks import PYTHON_DOCS, read_test_texts, require_tasks

    require_tasks(config.finetune.tasks)

    def texts_of(task: TaskConfig, scratch: str) -> list[str]:
        storage = Location.at(config.corpora_storage)
        if task.path != PYTHON_DOCS or not storage.is_local:
            return read_test_texts(task, scratch)
        return read_test_texts(task, (storage / "corpora" / ".cache" / f"python-docs-task-{fingerprint()[:12]}").path)

    with tempfile.TemporaryDirectory() as scratch:
        return {task.name: texts_of(task, scratch) for task in config.finetune.tasks}


@dataclass(frozen=True)
class ExecutorOnDemand:
    """`data_pipeline.executor.Executor` on Ray, which is started for the first work of more than one item."""

    start_ray: Callable[[], object]

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """See `Executor.map`. A single item would wait for Ray longer than it takes."""
        if len(items) <= 1:
            return map(function, items)
        self.start_ray()
        from launcher.ray_data import RayExecutor

        return RayExecutor(os.getcwd()).map(function, items)
