"""How near forward and backward come to the matrix products that they run: rate of a pass against the very same products run bare.

The products are recorded from a pass of our network (BERT-base, 16 rows of 128, no dropout), with shapes and layouts, and run again one after
the other on one core, by turns with the pass. A product inside a fused attention kernel counts as the kernel makes it.
"""

from benchmarks.children import measure, rank_contestant
from benchmarks.claims import Claim, Goal, make_claim
from benchmarks.harness import Options, run_benchmark
from benchmarks.training import BASE, TINY, Shape, arguments, our_precision, seconds_of

NAME = "train_gemm"
TITLE = "Forward and backward against their bare matrix products"
_GOAL = Goal("ratio", "≥", 0.58)
_GIGA = 1e-9


def main(options: Options) -> list[Claim]:
    """Both in one process, by turns, a fresh one each round."""
    network, shape = (TINY, Shape(4, 32, count=1)) if options.short else (BASE, Shape(16, 128, count=1))
    precision = our_precision()
    given = arguments(network, shape, precision=precision, seconds=seconds_of(network, options))
    contestant = rank_contestant(f"{network.name}, {precision}", "benchmarks.contestants.gemms:rates", given)
    runs = measure([contestant], options.rounds, options.progress, timeout_s=1800)[contestant.name]
    ours, bare = ([_GIGA * rate for rate in runs.values(key)] for key in ("ours_flops_per_s", "bare_flops_per_s"))
    environment = {**options.environment, "precision": precision, **runs.measurements[0]["counts"]}
    goal = None if options.short else _GOAL
    claim = f"forward and backward of {network.name}, {shape.samples} x {shape.length}, {precision}"
    return [make_claim(claim, "GFLOP/s", environment, ours, bare, "the same matrix products, bare", goal)]


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
