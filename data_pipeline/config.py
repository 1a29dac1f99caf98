"""Configuration of the corpus, the tokenizer, the objective and the batch (pure)."""

import re
from itertools import groupby
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Of what becomes a folder."""


class Section(BaseModel):
    """A frozen section of run.yaml: unknown keys are errors, attribute docstrings become the JSON schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


PersonalData = Literal["email", "phone", "ip", "card", "key"]


class QualityConfig(Section):
    """Documents to drop, by rules of Gopher (Rae et al. 2021, table A1) and C4 (Raffel et al. 2020); null turns a rule off.

    Words are what stands between white space: the rules are made for languages that write spaces, and `min_stop_words` for English.
    """

    min_words: int | None = Field(default=50, ge=0)
    """Fewest words of a document (Gopher)."""
    max_words: int | None = Field(default=100_000, ge=1)
    """Most words of a document (Gopher)."""
    min_characters: int | None = Field(default=None, ge=0)
    """Fewest characters of a document."""
    max_characters: int | None = Field(default=None, ge=1)
    """Most characters of a document."""
    min_mean_word_length: float | None = Field(default=3.0, ge=0.0)
    """Least mean length of words, in characters (Gopher)."""
    max_mean_word_length: float | None = Field(default=10.0, gt=0.0)
    """Greatest mean length of words, in characters (Gopher)."""
    max_symbol_word_ratio: float | None = Field(default=0.1, ge=0.0)
    """Most hash signs and ellipses, per word (Gopher)."""
    min_alphabetic_words: float | None = Field(default=0.8, ge=0.0, le=1.0)
    """Least share of words that hold a letter (Gopher)."""
    min_stop_words: int | None = Field(default=2, ge=0, le=1000)
    """Fewest occurrences of the, be, to, of, and, that, have, with (Gopher); null for text that is not English."""
    max_bullet_lines: float | None = Field(default=0.9, ge=0.0, le=1.0)
    """Greatest share of lines that begin with a bullet (Gopher)."""
    max_ellipsis_lines: float | None = Field(default=0.3, ge=0.0, le=1.0)
    """Greatest share of lines that end with an ellipsis (Gopher)."""
    max_repeated_lines: float | None = Field(default=0.3, ge=0.0, le=1.0)
    """Greatest share of lines that occurred before in the document (Gopher)."""
    max_repeated_line_characters: float | None = Field(default=0.2, ge=0.0, le=1.0)
    """Greatest share of characters in such lines (Gopher)."""
    max_repeated_paragraphs: float | None = Field(default=0.3, ge=0.0, le=1.0)
    """Greatest share of paragraphs that occurred before in the document (Gopher)."""
    max_repeated_paragraph_characters: float | None = Field(default=0.2, ge=0.0, le=1.0)
    """Greatest share of characters in such paragraphs (Gopher)."""
    max_top_2gram: float | None = Field(default=0.2, ge=0.0, le=1.0)
    """Greatest share of characters in the most frequent pair of words (Gopher)."""
    max_top_3gram: float | None = Field(default=0.18, ge=0.0, le=1.0)
    """The same for three words (Gopher)."""
    max_top_4gram: float | None = Field(default=0.16, ge=0.0, le=1.0)
    """The same for four words (Gopher)."""
    min_sentences: int | None = Field(default=3, ge=0)
    """Fewest sentences of a document (C4)."""
    banned_phrases: tuple[str, ...] = ("lorem ipsum",)
    """Drop documents that hold one of these, in any case (C4, which also bans `{`)."""


class NearDuplicatesConfig(Section):
    """Documents that resemble another one to drop: MinHash signatures in bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3)."""

    threshold: float = Field(default=0.8, gt=0.0, lt=1.0)
    """Jaccard similarity, estimated from the signatures, from which two documents count as one."""
    num_permutations: int = Field(default=128, ge=16, le=1024)
    """Length of a signature: the estimate's standard error is sqrt(threshold * (1 - threshold) / num_permutations)."""
    shingle_words: int = Field(default=5, ge=1, le=32)
    """Words in a row that make an element of the compared sets."""


class CorpusConfig(Section):
    """Which text becomes the corpus. Every field is part of the corpus' identity: a changed one makes a new corpus."""

    name: str | None = Field(default=None, pattern=NAME)
    """Readable part of the corpus folder's name, `<name>-<digest12>`; null takes it from the source."""
    source: str | tuple[str, ...] = "python-docs"
    """A file, folder or fsspec URL, or several: .txt, .jsonl, .parquet (.gz, .zst). `python-docs` is the documentation already on this machine."""
    text_key: str = "text"
    """Column of .jsonl and .parquet sources that holds the text."""
    max_documents: int | None = Field(default=None, ge=1)
    """Keep at most this many documents of the source, before de-duplication; null keeps all."""
    validation_fraction: float = Field(default=0.01, gt=0.0, lt=0.5)
    """Share of documents, chosen by a hash of their text, held out for validation."""
    seed: int = Field(default=0, ge=0)
    """Seed of the global shuffle."""
    quality: QualityConfig | None = None
    """Drop documents by quality rules; `{}` takes the published thresholds, null keeps everything."""
    personal_data: tuple[PersonalData, ...] = ()
    """Replace these by placeholders such as `<EMAIL>`: e-mail addresses, telephone numbers, global IP addresses, cards, keys (credentials)."""
    near_duplicates: NearDuplicatesConfig | None = None
    """Drop near-duplicates, all but one of a group; `{}` takes the defaults, null drops exact duplicates only."""
    contamination: Literal["report", "remove"] = "report"
    """Training documents that share 13 words in a row with the test set of a fine-tune task: count them, or drop them."""

    @property
    def label(self) -> str:
        """`name`, or the last part of the first source without its endings: `articles` for `s3://text/articles.jsonl.gz`."""
        first = self.source if isinstance(self.source, str) else self.source[0]
        stem = re.sub(r"(\.(txt|jsonl|parquet|gz|zst))+$", "", first.rstrip("/").rsplit("/", 1)[-1])
        return self.name or re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "corpus"


class MixturePart(Section):
    """One of several corpora and how much of it is read."""

    weight: float = Field(default=1.0, gt=0.0)
    """Share of the samples relative to the other parts, exact over 1,000 samples of a lane."""
    corpus: CorpusConfig
    """The text."""


class TokenizerConfig(Section):
    """A tokenizer to load, or how to train one (WordPiece, Devlin et al. 2018)."""

    path: str | None = None
    """Folder or hub id of a Hugging Face tokenizer to load; null trains one on the corpus."""
    vocab_size: int = Field(default=30522, ge=128)
    """Size of the vocabulary to train, special tokens included. Ignored when `path` is set."""
    lowercase: bool = True
    """Lower-case and strip accents when training. Ignored when `path` is set."""
    sample_documents: int = Field(default=200_000, ge=1)
    """Train on at most this many documents."""


class DataConfig(Section):
    """How a prepared corpus is read: what happens at damage and, where it does not lie on a local disk, time-outs, retries, reading ahead, and each
    node's copy of its blocks.

    Nothing here is part of the corpus' identity; all of it may change when a run is continued.
    """

    storage: str | None = None
    """Folder or fsspec URL in whose `corpora` folder prepared corpora lie, for example a bucket; null: the run's `storage`."""
    on_damage: Literal["fail", "skip"] = "fail"
    """At a block that is damaged or missing: `fail` ends the run with exit code 14; `skip` trains on without its samples and records an event."""
    skip_budget: int = Field(default=8, ge=0)
    """Different blocks that a run may skip; at the next one it ends with exit code 14."""

    read_timeout_s: float = Field(default=30.0, gt=0.0)
    """A read that has not answered after this long is given up and tried again."""
    total_timeout_s: float = Field(default=120.0, gt=0.0)
    """Seconds after which a block that could not be read, with all retries, is an error."""
    max_attempts: int = Field(default=12, ge=1)
    """Attempts at a read that fails with a server error, a time-out or a broken connection; pauses between them double, with jitter, up to 10 s."""
    concurrent_reads: int = Field(default=8, ge=1)
    """Reads under way at once, per process."""
    read_ahead_bytes: int = Field(default=256 << 20, ge=0)
    """Memory of a process for blocks that are read ahead of use; 0 reads nothing ahead."""
    cache_dir: str | None = None
    """Folder on a local disk where all processes of a node keep blocks that they have read; null: `maskwright` in `$XDG_CACHE_HOME` or `~/.cache`."""
    cache_bytes: int = Field(default=10 << 30, ge=0)
    """Size of that folder; the blocks not used for longest go first. 0 keeps nothing."""


def _or_a_word(schema: dict[str, Any]) -> None:
    """Let the JSON schema of a section admit its `kind` alone."""
    whole = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string", "enum": whole["properties"]["kind"]["enum"]}, whole]


class ObjectiveConfig(Section):
    """What the model learns to predict. `objective: clm` stands for `objective: {kind: clm}`."""

    model_config = ConfigDict(json_schema_extra=_or_a_word)

    kind: Literal["mlm", "clm"] = "mlm"
    """`mlm`: masked tokens (Devlin et al. 2019), each from all others of its sample. `clm`: every next token, from those before it."""
    mask_rate: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of ordinary tokens chosen for prediction, whatever the unit; 80 % become [MASK], 10 % a random token, 10 % stay."""
    mask_unit: Literal["token", "whole_word", "span"] = "token"
    """What is chosen at once. `token`: Devlin et al. 2019. `whole_word`: all tokens of a word. `span`: some words, 3.8 on average (SpanBERT, Joshi
    et al. 2020)."""
    sentence_objective: Literal["nsp", "sop", "none"] = "nsp"
    """`nsp`: does the second segment follow the first; negatives of equal length come from other documents. `sop`: are the two in order (ALBERT, Lan
    et al. 2020). `none`: single segments."""

    @model_validator(mode="before")
    @classmethod
    def _from_a_word(cls, value: Any) -> Any:
        given: Any = {"kind": value} if isinstance(value, str) else value
        if isinstance(given, dict) and given.get("kind") == "clm":
            return {"sentence_objective": "none", **cast(dict[str, Any], given)}
        return given

    @model_validator(mode="after")
    def _masks_nothing(self) -> Self:
        if self.kind == "clm" and (self.mask_rate, self.mask_unit) != (0.15, "token"):
            raise ValueError("objective clm masks nothing; remove mask_rate and mask_unit")
        if self.kind == "clm" and self.sentence_objective != "none":
            raise ValueError(f"objective clm has no sentence pairs; remove sentence_objective {self.sentence_objective}")
        return self

    @property
    def losses(self) -> dict[str, str]:
        """Names of the losses that there are, by their keys in metrics.jsonl, which are the same for every objective."""
        return {"mlm_loss": self.kind, **({"nsp_loss": self.sentence_objective} if self.sentence_objective != "none" else {})}


class Phase(Section):
    """A stretch of steps with one sequence length and one batch shape (derived; see `BatchConfig.phases_until`)."""

    first_step: int
    """First optimizer step of the phase, counted from 0."""
    num_steps: int
    """Optimizer steps in the phase."""
    first_micro_batch: int
    """Number, within the run, of the phase's first micro-batch."""
    sequence_length: int
    """Longest row, in tokens, special tokens included."""
    micro_batch_size: int
    """Samples in a micro-batch."""
    num_micro_batches: int
    """Micro-batches in a global batch (M)."""
    series: int
    """Number of the series: phases in a row with one sequence length and micro-batch size share their epochs, the next series starts anew."""
    series_first_micro_batch: int
    """Number, within the run, of the series' first micro-batch."""
    num_lanes: int
    """Lanes of the series (K), its largest M."""


class PhaseConfig(Section):
    """From a step on, train with another sequence length or batch; what is null is taken from `batch`.

    Several phases that change only `global_batch_size` are a batch-size warm-up.
    """

    from_step: int = Field(ge=1)
    """First optimizer step (counted from 0) that this phase governs."""
    sequence_length: int | None = Field(default=None, ge=16)
    """Longest row, in tokens."""
    global_batch_size: int | None = Field(default=None, ge=1)
    """Samples per optimizer step."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples per micro-batch."""


class BatchConfig(Section):
    """How many samples make a step and how they are cut into micro-batches; independent of the number of ranks."""

    global_batch_size: int = Field(default=256, ge=1)
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int = Field(default=32, ge=1)
    """Samples per micro-batch, the unit of everything: of the data order, of gradient accumulation and of dropout."""
    sequence_length: int = Field(default=128, ge=16)
    """Longest row, in tokens, special tokens included."""
    split: int = Field(default=1, ge=1)
    """Compute a micro-batch in this many parts when memory is short; the batch and its normalisation stay the same."""
    packing: Literal["none", "rows", "unpadded"] = "none"
    """How samples share rows. `none`: a row each, padded to the longest. `rows`: several to a row of `sequence_length`, each attending to itself.
    `unpadded`: all in one row, end to end. Samples, masks and losses are the same."""
    phases: tuple[PhaseConfig, ...] = ()
    """Later phases, in order of `from_step`. Another sequence length or micro-batch size starts a new epoch, another global batch size does not."""
    loader_workers: int = Field(default=0, ge=0)
    """Background processes per rank that make micro-batches; 0 makes them in the training process. Choose a divisor of the micro-batches that a
    rank computes in a step: otherwise several of them read the same blocks."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        starts = [phase.from_step for phase in self.phases]
        if starts != sorted(set(starts)):
            raise ValueError(f"phases must have increasing from_step, found {starts}")
        shapes = [("", self.global_batch_size, self.micro_batch_size)]
        shapes += [(f"phase from step {p.from_step}: ", *self._shape(p)) for p in self.phases]
        for where, total, micro in shapes:
            if total % micro:
                below, above = total // micro * micro, (total // micro + 1) * micro
                near = f"{below} or {above}" if below else f"{above}"
                raise ValueError(f"{where}global_batch_size {total} is not a multiple of micro_batch_size {micro}; nearest legal: {near}")
        return self

    def _shape(self, phase: PhaseConfig) -> tuple[int, int]:
        return phase.global_batch_size or self.global_batch_size, phase.micro_batch_size or self.micro_batch_size

    def phases_until(self, num_steps: int) -> tuple[Phase, ...]:
        """Resolve the phases of a run of `num_steps` optimizer steps. Phases that start later are left out, but their batches count towards the
        lanes of their series: a run that is given more steps keeps the order of its data."""
        first = PhaseConfig.model_construct(from_step=0, sequence_length=None, global_batch_size=None, micro_batch_size=None)
        planned = [first, *self.phases]
        ends = [min(phase.from_step, num_steps) for phase in planned[1:]] + [num_steps]
        resolved: list[Phase] = []
        first_micro_batch = 0
        for series_number, shapes in enumerate(self._series(planned)):
            series_first, num_lanes = first_micro_batch, max(total // micro for _, _, total, micro in shapes)
            for phase, length, total, micro in shapes:
                if phase.from_step >= num_steps:
                    return tuple(resolved)
                num_phase_steps, num_micro_batches = ends[len(resolved)] - phase.from_step, total // micro
                resolved.append(
                    Phase(
                        first_step=phase.from_step,
                        num_steps=num_phase_steps,
                        first_micro_batch=first_micro_batch,
                        sequence_length=length,
                        micro_batch_size=micro,
                        num_micro_batches=num_micro_batches,
                        series=series_number,
                        series_first_micro_batch=series_first,
                        num_lanes=num_lanes,
                    )
                )
                first_micro_batch += num_phase_steps * num_micro_batches
        return tuple(resolved)

    def _series(self, planned: list[PhaseConfig]) -> list[list[tuple[PhaseConfig, int, int, int]]]:
        """Phases with their (sequence length, global batch size, micro-batch size), in groups that share the first and the last."""
        shaped = [(phase, phase.sequence_length or self.sequence_length, *self._shape(phase)) for phase in planned]
        return [list(group) for _, group in groupby(shaped, key=lambda each: (each[1], each[3]))]

    @property
    def row_packing(self) -> Literal["none", "rows"]:
        """How the trainer lays out rows. Unpadded micro-batches are computed in padded rows, with the same losses: no attention kernel for sequences
        of variable length is used yet."""
        return "rows" if self.packing == "rows" else "none"

    @property
    def largest_micro_batches(self) -> dict[int, int]:
        """By sequence length of the run, the samples of the largest micro-batch of rows so long."""
        sizes = {self.sequence_length: self.micro_batch_size}
        for phase in self.phases:
            length = phase.sequence_length or self.sequence_length
            sizes[length] = max(sizes.get(length, 0), self._shape(phase)[1])
        return sizes

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Every sequence length of the run, ascending: `prepare` counts samples for each."""
        return tuple(sorted(self.largest_micro_batches))
