"""A rank whose memory is planned and measured, on a CPU by `plan_memory` and on a GPU by `gpu`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.claims import Goal
from benchmarks.training import Network, Shape

if TYPE_CHECKING:
    from trainer.config import RunConfig

GOAL = Goal("ours", "≤", 10.0)
"""Per cent that a plan may be off."""


@dataclass(frozen=True)
class Case:
    """One configuration."""

    network: Network
    shape: Shape
    stage: int
    accumulation: int = 1
    checkpointing: bool = False
    world_size: int = 1
    precision: str = "fp32"
    dropout: float = 0.1
    optimizer: str = "adamw"
    attention: str = "eager"

    @property
    def name(self) -> str:
        """What differs from others."""
        parts = [f"{self.network.architecture} {self.network.name}", f"ZeRO {self.stage}", f"{self.shape.samples} x {self.shape.length}"]
        parts += [f"accumulation {self.accumulation}"] if self.accumulation > 1 else []
        parts += ["checkpointing"] if self.checkpointing else []
        parts += [each for each, usual in ((self.optimizer, "adamw"), (self.attention, "eager")) if each != usual]
        return ", ".join([*parts, f"{self.world_size} ranks"] if self.world_size > 1 else parts)

    def run_config(self) -> "RunConfig":
        """As a run would have it."""
        from benchmarks.contestants.training import run_config

        model = {"activation_checkpointing": self.checkpointing, "attention": self.attention}
        config = run_config(
            self.network, self.shape, precision=self.precision, dropout=self.dropout, stage=self.stage, optimizer=self.optimizer, **model
        )
        batch = config.batch.model_copy(update={"global_batch_size": self.shape.samples * self.accumulation * self.world_size})
        return config.model_copy(update={"batch": batch})


@dataclass(frozen=True)
class Planned:
    """What the plan says."""

    peak_bytes: int
    parameters: int


def planned_bytes(case: Case, *, on_gpu: bool = False) -> Planned:
    """What `plan` prints as the peak of a rank at the case's stage, on a corpus of full rows."""
    from launcher.plan_memory import Shape as PlannedShape
    from launcher.plan_work import MeanSample
    from trainer.dimensions import Dimensions

    config, length = case.run_config(), case.shape.length
    network, samples = Dimensions.of(config.model, case.network.vocab_size), {length: MeanSample(float(length), is_bound=False)}
    shape = PlannedShape(config, network, case.precision, case.world_size, on_gpu=on_gpu, samples=samples, attention=case.attention)
    found = shape.peak(config.phases, case.stage, checkpointing=case.checkpointing)
    return Planned(found.peak_bytes, network.parameters)
