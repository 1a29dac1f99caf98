"""What a fault costs: from the fault to the next optimizer step, ours beside plain Ray Train + DeepSpeed as their documentation has it."""

import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.claims import Claim, Goal, make_claim
from benchmarks.harness import Options, run_benchmark
from benchmarks.machine import installed_version
from benchmarks.trainees import EVERY_STEPS, Ours, Peer, Trainee
from tests.support.ray_nodes import RayCluster, cluster_of

NAME = "recovery"
TITLE = "Faults: seconds until the next optimizer step, beyond the start-up of a group of workers"
_LIMIT_S, _SHORT_LIMIT_S = 180.0, 60.0
_START_LIMIT_S = 180.0
_SETTLE_STEPS = 2 * EVERY_STEPS + EVERY_STEPS // 2
"""Steps after which the fault comes: two checkpoints are committed, and some steps since."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    name: str
    inject: Callable[[Trainee, RayCluster], None]
    elastic: bool = False
    goal_s: float | None = None
    """What it may cost at most beyond the start-up of a group."""


@dataclass
class Outcome:
    """How a contestant took a fault."""

    start_up_s: float
    recovery_s: float | None
    """None: it was not training again within the limit, or never."""
    steps_repeated: int = 0
    text: str = ""


def kill_rank(trainee: Trainee, cluster: RayCluster) -> None:
    """SIGKILL, as the kernel's out-of-memory killer sends it."""
    del cluster
    trainee.signal_rank(1, signal.SIGKILL)


def stop_rank(trainee: Trainee, cluster: RayCluster) -> None:
    """SIGSTOP: the process is there and does nothing, as with a hung driver or file system."""
    del cluster
    trainee.signal_rank(1, signal.SIGSTOP)


def kill_node(trainee: Trainee, cluster: RayCluster) -> None:
    """The node of rank 1 goes."""
    pid = trainee.pid(1)
    cluster.kill_node(next(node for node in cluster.nodes if pid in node.processes()))


def damage_checkpoint(trainee: Trainee, cluster: RayCluster) -> None:
    """Half of the optimizer's newest file is lost, and a rank dies."""
    checkpoint = trainee.newest_checkpoint()
    assert checkpoint is not None
    file = max((path for path in checkpoint.rglob("*optim_states.pt")), key=lambda path: path.name)
    os.truncate(file, file.stat().st_size // 2)
    kill_rank(trainee, cluster)


FAULTS = (
    Fault("a rank is killed (SIGKILL)", kill_rank, goal_s=10.0),
    Fault("a node is lost, 2 workers to 1", kill_node, elastic=True, goal_s=20.0),
    Fault("a rank is stopped (SIGSTOP)", stop_rank, goal_s=60.0),
    Fault("a file of the newest checkpoint is cut, and a rank killed", damage_checkpoint, goal_s=10.0),
)


def main(options: Options) -> list[Claim]:
    """Every fault into a job of each contestant, round by round."""
    limit_s = _SHORT_LIMIT_S if options.short else _LIMIT_S
    found: dict[tuple[str, str], list[Outcome]] = {}
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        _measure(Ours, FAULTS[0], Path(folder) / "ours", limit_s)  # prepares the corpus, compiles, warms the page cache
        for number in range(options.rounds):
            for fault in FAULTS:
                for kind in (Ours, Peer) if number % 2 == 0 else (Peer, Ours):
                    options.progress(f"round {number + 1} of {options.rounds}: {fault.name}: {kind.__name__.lower()}")
                    where = Path(folder) / ("ours" if kind is Ours else f"peer-{len(found)}-{number}")
                    outcome = _measure(kind, fault, where, limit_s)
                    found.setdefault((fault.name, kind.__name__), []).append(outcome)
                    options.progress(f"  {outcome}")
    options.table(TITLE, ("fault", "ours", "Ray Train + DeepSpeed"), [_row(fault, found) for fault in FAULTS])
    return [_claim(fault, found, options) for fault in FAULTS]


def _measure(kind: type[Trainee], fault: Fault, folder: Path, limit_s: float) -> Outcome:
    """One fault into one job on a cluster of its own: what a job leaves behind on a cluster must not slow the next."""
    with cluster_of(folder / "nodes", 2) as cluster:
        trainee = kind(folder, cluster, min_workers=1 if fault.elastic else 2, num_workers=2).start()
        try:
            if not trainee.wait_for(lambda: len(trainee.steps) > _SETTLE_STEPS, _START_LIMIT_S):
                raise RuntimeError(f"{kind.__name__} did not train:\n{trainee.command.text()[-2000:]}")
            return _strike(trainee, fault, cluster, limit_s)
        finally:
            trainee.end()


def _strike(trainee: Trainee, fault: Fault, cluster: RayCluster, limit_s: float) -> Outcome:
    group, begun = trainee.steps[-1].group, time.time()
    fault.inject(trainee, cluster)
    step = trainee.wait_for_step_after(group, limit_s)
    start_up_s = trainee.start_up_s()
    if step is None:
        ended = trainee.command.process.poll()
        text = f"not training again after {limit_s:.0f} s" if ended is None else f"the job failed after {time.time() - begun:.0f} s"
        return Outcome(start_up_s, None, text=text)
    reached = max(step.number for step in trainee.steps if step.group == group)
    return Outcome(start_up_s, step.seen_at - begun, max(0, reached + 1 - step.number))


def _row(fault: Fault, found: dict[tuple[str, str], list[Outcome]]) -> list[str]:
    return [fault.name, *(_cell(found[fault.name, kind]) for kind in ("Ours", "Peer"))]


def _cell(outcomes: list[Outcome]) -> str:
    done = sorted((outcome for outcome in outcomes if outcome.recovery_s is not None), key=lambda outcome: outcome.recovery_s or 0.0)
    if not done:
        return outcomes[-1].text
    middle = done[len(done) // 2]
    return f"{middle.recovery_s:.1f} s (start-up {middle.start_up_s:.1f} s), {middle.steps_repeated} steps done again"


def _claim(fault: Fault, found: dict[tuple[str, str], list[Outcome]], options: Options) -> Claim:
    """Seconds beyond the contestant's own start-up. A contestant that did not come back has none, and says so in place of its version."""
    ours, peer = (_beyond(found[fault.name, kind]) for kind in ("Ours", "Peer"))
    version = f"ray {installed_version('ray')} + deepspeed {installed_version('deepspeed')}"
    note = version if peer else f"{version}: {found[fault.name, 'Peer'][-1].text}"
    goal = None if fault.goal_s is None else Goal("ours", "≤", fault.goal_s)
    return make_claim(f"{fault.name}: until the next step, beyond start-up", "s", options.environment, ours, peer, note, goal)


def _beyond(outcomes: list[Outcome]) -> list[float]:
    return [max(0.0, outcome.recovery_s - outcome.start_up_s) for outcome in outcomes if outcome.recovery_s is not None]


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
