"""Configuration of the corpus, the tokenizer, the objective and the batch (pure)."""

import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A frozen section of run.yaml: unknown keys are errors, attribute docstrings become the JSON schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class CorpusConfig(Section):
    """Which text becomes the corpus. Every field is part of the corpus' identity: a changed one makes a new corpus."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
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

    @property
    def label(self) -> str:
        """`name`, or the last part of the first source without its endings: `articles` for `s3://text/articles.jsonl.gz`."""
        first = self.source if isinstance(self.source, str) else self.source[0]
        stem = re.sub(r"(\.(txt|jsonl|parquet|gz|zst))+$", "", first.rstrip("/").rsplit("/", 1)[-1])
        return self.name or re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "corpus"


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


class ObjectiveConfig(Section):
    """What the model learns to predict."""

    mask_rate: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of ordinary tokens chosen for prediction; 80 % become [MASK], 10 % a random token, 10 % stay."""
    sentence_objective: Literal["nsp", "none"] = "nsp"
    """`nsp`: next-sentence prediction on pairs with length-matched negatives. `none`: single segments."""


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


class PhaseConfig(Section):
    """From a step on, train with another sequence length or batch; what is null is taken from `batch`."""

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
    phases: tuple[PhaseConfig, ...] = ()
    """Later phases, in order of `from_step`. A new phase starts a new epoch."""
    loader_workers: int = Field(default=0, ge=0)
    """Background processes per rank that make micro-batches; 0 makes them in the training process."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        starts = [phase.from_step for phase in self.phases]
        if starts != sorted(set(starts)):
            raise ValueError(f"phases must have increasing from_step, found {starts}")
        shapes = [("batch", self.global_batch_size, self.micro_batch_size)]
        shapes += [(f"phase from step {p.from_step}", *self._shape(p)) for p in self.phases]
        for where, total, micro in shapes:
            if total % micro:
                below, above = total // micro * micro, (total // micro + 1) * micro
                near = f"{below} or {above}" if below else f"{above}"
                raise ValueError(f"{where}: global_batch_size {total} is not a multiple of micro_batch_size {micro}; nearest legal: {near}")
        return self

    def _shape(self, phase: PhaseConfig) -> tuple[int, int]:
        return phase.global_batch_size or self.global_batch_size, phase.micro_batch_size or self.micro_batch_size

    def phases_until(self, num_steps: int) -> tuple[Phase, ...]:
        """Resolve the phases of a run of `num_steps` optimizer steps. Phases that start later are left out."""
        first = PhaseConfig.model_construct(from_step=0, sequence_length=None, global_batch_size=None, micro_batch_size=None)
        planned = [first, *(phase for phase in self.phases if phase.from_step < num_steps)]
        ends = [phase.from_step for phase in planned[1:]] + [num_steps]
        resolved: list[Phase] = []
        first_micro_batch = 0
        for phase, end in zip(planned, ends, strict=True):
            total, micro = self._shape(phase)
            resolved.append(
                Phase(
                    first_step=phase.from_step,
                    num_steps=end - phase.from_step,
                    first_micro_batch=first_micro_batch,
                    sequence_length=phase.sequence_length or self.sequence_length,
                    micro_batch_size=micro,
                    num_micro_batches=total // micro,
                )
            )
            first_micro_batch += resolved[-1].num_steps * resolved[-1].num_micro_batches
        return tuple(resolved)

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Every sequence length of the run, ascending: `prepare` counts samples for each."""
        return tuple(sorted({self.sequence_length, *(p.sequence_length or self.sequence_length for p in self.phases)}))
