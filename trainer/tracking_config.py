"""Configuration of where the numbers of a run are shown besides its own folder (pure)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from data_pipeline.config import Section

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
"""Names as accelerate has them, which are those of the packages, too."""


class TrackingConfig(Section):
    """Where the numbers of pretraining are shown, besides `metrics.jsonl`, the report and Ray's Prometheus endpoint."""

    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """`tensorboard`: into the run's folder. Others by accelerate: `wandb` (`pip install "maskwright[trackers]"`), `mlflow`, `trackio`.
    Addresses and keys come from the environment of rank 0 (`WANDB_API_KEY`, `MLFLOW_TRACKING_URI`), never from here. One that fails is an event."""
    project: str = Field(default="maskwright", min_length=1)
    """Of the run, on trackers that have projects or experiments. All attempts are one run there, where the tracker can go on with one."""

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if len(set(self.trackers)) != len(self.trackers):
            raise ValueError(f"trackers must be unique, found {list(self.trackers)}")
        return self
