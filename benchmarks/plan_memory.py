"""What `maskwright plan` says of a rank's memory, against the resident set of ranks of our trainer that take steps.

On a CPU: what is measured is what a process takes above that of one that has imported everything and trained a tiny network.
"""

import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.children import Contestant, run_child
from benchmarks.claims import Claim, Goal, make_claim, number
from benchmarks.harness import Options, run_benchmark
from benchmarks.training import SMALL, TINY, Network, Shape

NAME = "plan_memory"
TITLE = "Memory of a rank: planned against measured"
GOAL = Goal("ours", "≤", 10.0)
"""Per cent that a plan may be off."""
MIDDLE = Network(6, 512, 8)
_MEGA = 1e6
_TIMEOUT_S = 2400


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

    @property
    def name(self) -> str:
        """What differs from others."""
        parts = [self.network.name, f"ZeRO {self.stage}", f"{self.shape.samples} x {self.shape.length}"]
        parts += [f"accumulation {self.accumulation}"] if self.accumulation > 1 else []
        parts += ["checkpointing"] if self.checkpointing else []
        return ", ".join([*parts, f"{self.world_size} ranks"] if self.world_size > 1 else parts)


CASES = (
    Case(SMALL, Shape(8, 128), 0),
    Case(SMALL, Shape(8, 128), 1, world_size=2),
    Case(SMALL, Shape(16, 128), 2, accumulation=2),
    Case(MIDDLE, Shape(16, 128), 0),
    Case(MIDDLE, Shape(16, 128), 1, checkpointing=True),
    Case(MIDDLE, Shape(8, 256), 2, accumulation=2),
    Case(MIDDLE, Shape(16, 128), 2, world_size=2),
    Case(MIDDLE, Shape(16, 128), 3),
    Case(MIDDLE, Shape(4, 512), 1),
)
SHORT = (Case(TINY, Shape(4, 32), 1),)


def main(options: Options) -> list[Claim]:
    """All cases, one after the other: memory does not depend on what else the machine does."""
    claims: list[Claim] = []
    rows: list[tuple[str, ...]] = []
    for case in SHORT if options.short else CASES:
        options.progress(case.name)
        measured = run_child(_contestant(case), _TIMEOUT_S)
        planned = planned_bytes(case)
        assert measured["parameters"] == planned.parameters, f"{case.name}: a plan counts other parameters than the network has"
        off = 100 * abs(planned.peak_bytes / measured["peak_bytes"] - 1)
        rows.append((case.name, *(number(each / _MEGA) for each in (planned.peak_bytes, measured["peak_bytes"])), number(off)))
        environment = {**options.environment, "planned_bytes": planned.peak_bytes, "measured_bytes": measured["peak_bytes"]}
        claims.append(make_claim(f"plan's memory, {case.name}", "% off", environment, [off], goal=None if options.short else GOAL))
    options.table("Peak of a rank, in MB", ("configuration", "planned", "measured", "% off"), rows)
    return claims


@dataclass(frozen=True)
class Planned:
    """What the plan says."""

    peak_bytes: int
    parameters: int


def planned_bytes(case: Case) -> Planned:
    """What `plan` prints as the peak of a rank at the case's stage, on a corpus of full rows."""
    from benchmarks.contestants.training import run_config
    from launcher.plan_memory import Shape as PlannedShape
    from launcher.plan_work import MeanSample
    from trainer.dimensions import Dimensions

    config = run_config(case.network, case.shape, precision=case.precision, dropout=case.dropout, stage=case.stage)
    micro_batches = case.accumulation * case.world_size
    batch = config.batch.model_copy(update={"global_batch_size": case.shape.samples * micro_batches})
    config = config.model_copy(update={"batch": batch})
    network = Dimensions.of(config.model, case.network.vocab_size)
    samples = {case.shape.length: MeanSample(float(case.shape.length), is_bound=False)}
    shape = PlannedShape(config, network, case.precision, case.world_size, on_gpu=False, samples=samples, attention="eager")
    found = shape.peak(config.phases, case.stage, checkpointing=case.checkpointing)
    return Planned(found.peak_bytes, network.parameters)


def _contestant(case: Case) -> Contestant:
    given: dict[str, Any] = {**asdict(case), "cores": sorted(os.sched_getaffinity(0))}
    return Contestant(case.name, sys.executable, "benchmarks.contestants.peaks:peak", given, is_ours=True)


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
