"""Configuration of labelled tasks and of fine-tuning on them (pure)."""

from typing import Self

from pydantic import Field, model_validator

from data_pipeline.config import NAME, Section


class TaskConfig(Section):
    """A labelled classification task: a folder with train, dev and test files (.jsonl or .csv)."""

    name: str = Field(pattern=NAME)
    """Folder name of the results."""
    path: str
    """Folder with train/dev/test.jsonl (or .csv), or `python-docs`: which package does a docstring belong to."""
    text: str = "text"
    """Column of the text."""
    text_pair: str | None = None
    """Column of a second text, for pair tasks."""
    label: str = "label"
    """Column of the label: an integer or a name."""


class FinetuneConfig(Section):
    """What pretraining bought: each task is fine-tuned with every seed, pretrained and from scratch."""

    tasks: tuple[TaskConfig, ...] = ()
    """Tasks to fine-tune on; none skips the stage."""
    num_seeds: int = Field(default=3, ge=1)
    """Seeds 0 .. num_seeds-1; scores are mean and standard deviation over them."""
    epochs: int = Field(default=3, ge=1)
    """Passes over the training file."""
    batch_size: int = Field(default=32, ge=1)
    """Samples per step, over all workers."""
    lr: float = Field(default=5e-5, gt=0.0)
    """Peak learning rate; linear warm-up over a tenth of the steps, then linear decay."""
    scratch_lr: float | None = Field(default=None, gt=0.0)
    """Peak learning rate of the network from scratch; null uses `lr`."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay."""
    max_length: int = Field(default=128, ge=8)
    """Longest row, in tokens; longer texts are cut."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"task names must be unique, found {names}")
        return self
