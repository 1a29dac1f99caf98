"""What `maskwright plan` says of a rank's memory, against the resident set of ranks of our trainer that take steps.

On a CPU: what is measured is what a process takes above that of one that has imported everything and trained a tiny network.
"""

import os
from dataclasses import asdict
from typing import Any

from benchmarks.children import Contestant, rank_contestant, run_child
from benchmarks.claims import Claim, make_claim, number
from benchmarks.harness import Options, run_benchmark
from benchmarks.planned import GOAL, Case, planned_bytes
from benchmarks.training import TINY, Network, Shape

NAME = "plan_memory"
TITLE = "Memory of a rank: planned against measured"
MIDDLE, MODERN, CAUSAL = Network(6, 512, 8), Network(6, 384, 6, architecture="modernbert"), Network(6, 384, 6, 16384, "gpt2")
_MEGA = 1e6
_TIMEOUT_S = 1500
"""Of a case, which takes half a minute of an idle machine; see `contestants.peaks`, which gives up before and says where it stood."""


CASES = (
    Case(MIDDLE, Shape(16, 128), 0),
    Case(MIDDLE, Shape(16, 128), 1, checkpointing=True),
    Case(MIDDLE, Shape(4, 512), 1),
    Case(MIDDLE, Shape(8, 128), 1, world_size=2),
    Case(MIDDLE, Shape(4, 128), 2, optimizer="lamb"),
    Case(MIDDLE, Shape(8, 128), 2, accumulation=2),
    Case(MIDDLE, Shape(8, 128), 2, world_size=2),
    Case(MIDDLE, Shape(16, 128), 3),
    Case(MIDDLE, Shape(8, 128), 3, world_size=2),
    Case(MODERN, Shape(16, 128), 1, dropout=0.0, attention="sdpa"),
    Case(CAUSAL, Shape(8, 128), 2),
)
"""Of 17 to 35 million parameters. Of networks with fewer what the C library's heap does differs by more than a tenth from one run to the next."""
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
        options.progress("  planned {1} MB, measured {2} MB: {3} % off".format(*rows[-1]))
        sizes = {"planned_bytes": planned.peak_bytes, **{f"measured_{name}": measured[name] for name in ("peak_bytes", "process_bytes")}}
        environment = {**options.environment, **sizes}
        claims.append(make_claim(f"plan's memory, {case.name}", "% off", environment, [off], goal=None if options.short else GOAL))
    options.table("Peak of a rank, in MB", ("configuration", "planned", "measured", "% off"), rows)
    return claims


def _contestant(case: Case) -> Contestant:
    given: dict[str, Any] = {**asdict(case), "cores": sorted(os.sched_getaffinity(0))}
    return rank_contestant(case.name, "benchmarks.contestants.peaks:peak", given)


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
