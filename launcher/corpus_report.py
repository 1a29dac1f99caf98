"""The report of a corpus: what was kept, how long things are, how full rows will be; as tables and as one self-contained HTML page."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.contamination import reported_tasks
from data_pipeline.corpus_statistics import CorpusStatistics, Distribution, RowStatistics, corpus_statistics
from data_pipeline.index import CorpusIndex
from data_pipeline.mixture import MIXTURE
from data_pipeline.storage import Location
from launcher.preparation_table import contamination_rows, split_rows, too_little_text
from launcher.report_figures import bars_figure, histogram_figure

REPORT = "report.html"
_TEMPLATE = "corpus_report_template.html.j2"
_DROPPED = {
    "empty": "empty",
    "low_quality": "failed the quality rules",
    "duplicates": "exact duplicates",
    "near_duplicates": "near-duplicates",
    "contaminated": "removed for their overlap with test sets",
}


@dataclass(frozen=True)
class Table:
    """One table of the report, on the console and on the page."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


@dataclass(frozen=True)
class Page:
    """What the page shows; strings are plain text, the template escapes them."""

    name: str
    folder: str
    verdicts: list[str]
    tables: list[Table]
    pictures: list[tuple[str, str]]
    """(what it shows, data URI)."""
    sample: str
    identity: list[tuple[str, str]]
    written: str


@dataclass(frozen=True)
class CorpusReport:
    """A corpus and its statistics."""

    folder: Location
    statistics: CorpusStatistics
    tasks: dict[str, Any]
    """How the corpus overlaps with test sets, by task; empty where it was not compared with any."""

    @classmethod
    def of(cls, folder: Location) -> "CorpusReport":
        """Read the index and a sample of the blocks. Errors as `CorpusIndex.open` and `read_block` have them."""
        return cls(folder, corpus_statistics(CorpusIndex.open(folder)), dict(reported_tasks(folder)))

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {"corpus": self.folder.url, **self.statistics.to_json(), "contamination": self.tasks}

    def tables(self) -> list[Table]:
        """The report's tables, in order."""
        found = self.statistics
        tables = [
            Table("Preparation", ("documents", "number", "share", "of which"), list(_preparation_rows(found.counts))),
            Table("Splits", ("split", "documents", "sentences", "tokens"), list(split_rows(found.counts))),
            Table("Lengths in tokens", ("of a", "mean", "5 %", "median", "95 %", "99 %", "longest"), list(self._length_rows()), self._sample()),
            Table("Samples", ("sequence length", "training", "validation", "without a pair"), [_sample_row(row) for row in found.rows]),
            Table(
                "Expected fill of rows",
                ("sequence length", "samples per micro-batch", "padded", "packed"),
                [cells for row in found.rows for cells in _fill_rows(row)],
                "Share of places that hold a token. Padded: a row a sample, as long as the micro-batch's longest; packed: batch.packing: rows.",
            ),
        ]
        if self.tasks:
            columns = ("task", "documents that share 13 words with its test set", "test texts found", "of")
            tables.insert(2, Table("Overlap with test sets", columns, list(contamination_rows(self.tasks))))
        return tables

    def write(self, target: Location) -> Location:
        """Write the page."""
        target.write_bytes(self.render().encode())
        return target

    def render(self) -> str:
        """The page."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        loader = PackageLoader("launcher", ".")
        environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        return environment.get_template(_TEMPLATE).render(page=self.page())

    def page(self) -> Page:
        """What the page shows."""
        found = self.statistics
        identity = [("fingerprint", found.fingerprint), ("sources", ", ".join(found.sources)), ("shards", f"{found.shards:,}")]
        identity += [("vocabulary", f"{found.vocabulary_size:,} tokens"), ("unigram entropy", f"{found.unigram_entropy:.3f} nats")]
        return Page(
            name=found.name,
            folder=self.folder.url,
            verdicts=self.verdicts(),
            tables=self.tables(),
            pictures=list(self._pictures()),
            sample=self._sample(),
            identity=identity,
            written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        )

    def verdicts(self) -> list[str]:
        """What matters, in sentences."""
        counts, rows = self.statistics.counts, self.statistics.rows
        notice = too_little_text(self.statistics.vocabulary_size, self.statistics.vocabulary_asked)
        documents = counts["train_documents"] + counts["validation_documents"]
        tokens = counts["train_tokens"] + counts["validation_tokens"]
        said = [f"{documents:,} of {counts['documents']:,} documents were kept: {tokens:,} tokens."]
        for row in rows:
            most = max(row.fill_packed)
            gain = row.fill_packed[most] / row.fill_padded[most]
            said.append(
                f"Rows of {row.sequence_length}: {row.fill_padded[most]:.0%} full when padded, {row.fill_packed[most]:.0%} when packed "
                f"({gain:.2f} times the tokens per place); {row.share_without_pair:.1%} of the samples are a single sentence and form no pair."
            )
        return [*said, *([notice] if notice else [])]

    def _sample(self) -> str:
        found = self.statistics
        total = found.counts["train_blocks"]
        which = "all" if found.sampled_blocks == total else f"{found.sampled_blocks} of {total:,}"
        return (
            f"Lengths and fill come from {which} training blocks ({found.sampled_documents:,} documents), chosen by a hash of their number; "
            "a document longer than a block is several there. Counts are of the whole corpus."
        )

    def _length_rows(self) -> Iterator[tuple[str, ...]]:
        found = self.statistics
        yield _length_row("document", found.document_tokens)
        yield _length_row("sentence", found.sentence_tokens)
        for row in found.rows:
            yield _length_row(f"row of at most {row.sequence_length}", row.row_tokens)

    def _pictures(self) -> Iterator[tuple[str, str]]:
        found = self.statistics
        for name, lengths in (("Documents", found.document_tokens), ("Sentences", found.sentence_tokens)):
            yield f"{name} by their tokens", histogram_figure(f"{name} by their tokens", "tokens", lengths.edges, lengths.counts, logarithmic=True)
        for row in found.rows:
            title = f"Rows of at most {row.sequence_length} tokens by their tokens"
            yield title, histogram_figure(title, "tokens", row.row_tokens.edges, row.row_tokens.counts, logarithmic=False)
        groups = [str(row.sequence_length) for row in found.rows]
        series: dict[str, Sequence[float]] = {"padded": [row.fill_padded[max(row.fill_padded)] for row in found.rows]}
        series |= {f"packed, {samples} samples": [row.fill_packed[samples] for row in found.rows] for samples in (16, 64)}
        yield "Expected fill of rows", bars_figure("Expected fill of rows", "sequence length", groups, series)


def find_corpus(name: str, storage: Location) -> Location | None:
    """The corpus of a folder, a URL, or a name below `corpora/` of a storage; None when it is none."""
    candidates = [Location.at(name), *([] if "/" in name else [storage / "corpora" / name])]
    return next((candidate for candidate in candidates if (candidate / "corpus.json").exists()), None)


def find_mixture(name: str, storage: Location) -> Location | None:
    """The mixture of a folder, a URL, or a name below `corpora/` of a storage; None when it is none."""
    candidates = [Location.at(name), *([] if "/" in name else [storage / "corpora" / name])]
    return next((candidate for candidate in candidates if (candidate / MIXTURE).exists()), None)


def _preparation_rows(counts: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """What became of the documents that were read; zeros are told, too."""
    total = counts["documents"]
    fates = {"read": total} | {text: counts.get(name, 0) for name, text in _DROPPED.items()}
    fates["kept"] = counts["train_documents"] + counts["validation_documents"]
    details = {"failed the quality rules": counts.get("quality", {}), "kept": counts.get("personal_data", {})}
    for fate, number in fates.items():
        said = ", ".join(f"{name} {count:,}" for name, count in sorted(details.get(fate, {}).items(), key=lambda item: (-item[1], item[0])))
        of_which = f"personal data replaced: {said}" if said and fate == "kept" else said
        yield fate, f"{number:,}", f"{number / max(total, 1):.2%}", of_which


def _length_row(name: str, lengths: Distribution) -> tuple[str, ...]:
    middle = (f"{value:,.0f}" for value in (lengths.p5, lengths.median, lengths.p95, lengths.p99))
    return (name, f"{lengths.mean:,.1f}", *middle, f"{lengths.longest:,}")


def _sample_row(row: RowStatistics) -> tuple[str, ...]:
    return str(row.sequence_length), f"{row.train_samples:,}", f"{row.validation_samples:,}", f"{row.share_without_pair:.2%}"


def _fill_rows(row: RowStatistics) -> Iterator[tuple[str, ...]]:
    for samples, padded in row.fill_padded.items():
        yield str(row.sequence_length), str(samples), f"{padded:.3f}", f"{row.fill_packed[samples]:.3f}"
