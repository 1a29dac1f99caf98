"""Configuration of where the numbers of a run are shown besides its own folder (pure, but for the look whether packages are installed)."""

import importlib.util
from typing import Literal, Self

from pydantic import Field, model_validator

from data_pipeline.config import Section
from data_pipeline.errors import ConfigError

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


def require_installed(tracking: TrackingConfig) -> None:
    """Refuse trackers whose packages the machine of rank 0, which asks, lacks (imports none of them).

    Raises:
        ConfigError: names them, and what to install.
    """
    missing = [name for name in tracking.trackers if importlib.util.find_spec(name) is None]
    if missing:
        wanted = " ".join('"maskwright[trackers]"' if name == "wandb" else name for name in missing)
        remedy = f"Install what is missing there (`pip install {wanted}`), or leave it out of tracking.trackers."
        raise ConfigError(f"tracking.trackers: {', '.join(missing)} not installed on the machine of rank 0", remedy)
