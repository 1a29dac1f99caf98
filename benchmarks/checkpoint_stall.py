"""How long training stands still for a checkpoint of a BERT-base, against a synchronous commit of the same state and DeepSpeed's own save."""

from importlib.metadata import version

from benchmarks.children import Runs, measure, rank_contestant
from benchmarks.claims import Claim, Goal, make_claim, middle, number
from benchmarks.harness import Options, run_benchmark

NAME = "checkpoint_stall"
TITLE = "Checkpoints: seconds that training stands still for a save, from the second on"
_SIZES = {"layers": 12, "width": 768}
_REPEATS = 3
_OURS = "one rank, BERT-base, ZeRO 1"
_GOAL = Goal("ratio", "≤", 0.15)
_MEASURED = (
    ("stall_s", "training stands still for a save", "s", 1.0),
    ("first_stall_s", "for the first, which allocates its memory", "s", 1.0),
    ("synchronous_s", "our synchronous commit: write, sha256, fsync", "s", 1.0),
    ("deepspeed_s", "DeepSpeed's save_checkpoint: neither sha256 nor fsync", "s", 1.0),
    ("step_alone_s", "a step", "s", 1.0),
    ("step_beside_s", "a step while a save is written", "s", 1.0),
    ("num_bytes", "size of the checkpoint", "MB", 1e-6),
)


def main(options: Options) -> list[Claim]:
    """Everything in one process and by turns, a fresh one each round; the wall clock, because waiting for a disk counts."""
    arguments = {**_SIZES, "repeats": 1 if options.short else _REPEATS}
    contestant = rank_contestant(_OURS, "benchmarks.contestants.saving:stalls", arguments)
    runs = measure([contestant], options.rounds, options.progress)[_OURS]
    rows = [(title, unit, number(None if (value := middle(runs.values(key))) is None else value * scale)) for key, title, unit, scale in _MEASURED]
    found = runs.measurements[0]
    options.table(f"{_OURS}, {found['precision']}: {number(found['num_parameters'])} parameters", ("of a save", "unit", "median"), rows)
    return _claims(options, runs)


def _claims(options: Options, runs: Runs) -> list[Claim]:
    state = {key: runs.measurements[0][key] for key in ("num_parameters", "num_bytes", "precision")}
    environment = {**options.environment, **state, "cores_used": "all: the writer takes what training leaves"}
    stall = runs.values("stall_s")
    return [
        make_claim("training stands still for a checkpoint", "s", environment, stall, runs.values("synchronous_s"), "our synchronous commit", _GOAL),
        make_claim(
            "training stands still for a checkpoint, against DeepSpeed",
            "s",
            environment,
            stall,
            runs.values("deepspeed_s"),
            f"deepspeed {version('deepspeed')}",
        ),
        make_claim(
            "a step while a checkpoint is written", "s", environment, runs.values("step_beside_s"), runs.values("step_alone_s"), "a step alone"
        ),
    ]


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
