"""What a fault costs: from the fault to the next optimizer step, ours beside plain Ray Train + DeepSpeed as their documentation has it.

Beside each figure stands the start-up of the same job's first group of workers, on a warm machine: from `attempt_started` (the peer: the call
of `fit`) to its first optimizer step.
"""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.claims import Claim, Goal, make_claim, middle, rounded
from benchmarks.harness import Options, run_benchmark
from benchmarks.machine import installed_version
from benchmarks.table import FAULT_COLUMNS, fault_cells
from benchmarks.trainees import EVERY_STEPS, WORK, Ours, Peer, Trainee
from tests.support.ray_nodes import RayCluster, cluster_of

NAME = "recovery"
TITLE = "Faults: seconds until the next optimizer step"
_LIMIT_S = 120.0
_START_LIMIT_S = 180.0
_SETTLE_STEPS = 2 * EVERY_STEPS + EVERY_STEPS // 2
"""Steps after which the fault comes: two checkpoints are committed, and half of the steps to the next are taken."""
_NAMED_GOAL = Goal("ours", "≤", 30.0)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    key: str
    """In one word."""
    name: str
    inject: Callable[[Trainee, RayCluster], None]
    event: str
    """What our run must have recorded of it: a fault that missed does not count."""
    elastic: bool = False
    goal_s: float | None = None
    """What it may cost at most on top of the start-up of a group."""
    is_named: bool = False
    """Whether it counts how soon the event comes."""


@dataclass(frozen=True)
class Outcome:
    """How a contestant took a fault."""

    start_up_s: float
    recovery_s: float | None
    """None: it is not training again; `text` says how that showed."""
    steps_again: int = 0
    named_s: float | None = None
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


def kill_driver(trainee: Trainee, cluster: RayCluster) -> None:
    """The command is killed, and the one that goes on is started at once."""
    del cluster
    trainee.restart()


def damage_checkpoint(trainee: Trainee, cluster: RayCluster) -> None:
    """Half of the optimizer's last file is lost, and a rank dies."""
    checkpoint = trainee.newest_checkpoint()
    assert checkpoint is not None
    file = max(checkpoint.rglob("*optim_states.pt"), key=lambda path: path.name)
    os.truncate(file, file.stat().st_size // 2)
    kill_rank(trainee, cluster)


FAULTS = (
    Fault("rank", "a rank is killed (SIGKILL)", kill_rank, "worker_failed", goal_s=10.0),
    Fault("node", "a node is lost: elastic, 2 ranks to 1", kill_node, "resized", elastic=True, goal_s=20.0),
    Fault("stop", "a rank is stopped (SIGSTOP)", stop_rank, "rank_unhealthy", goal_s=60.0, is_named=True),
    Fault("driver", "the driver is killed, and started again", kill_driver, "resumed"),
    Fault("checkpoint", "the newest checkpoint is damaged, and a rank killed", damage_checkpoint, "checkpoint_damaged"),
)

Found = dict[tuple[str, str], list[Outcome]]
"""By fault and contestant (`ours`, `peer`), round by round."""


def main(options: Options) -> list[Claim]:
    """Every fault into a job of each contestant, round by round. A peer that did not come back is not tried again: that is its result."""
    faults = [fault for fault in FAULTS if fault.key in options.parts]
    found: Found = {}
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        contestants = _warm_up(Path(folder), options.progress)
        for position in range(options.rounds):
            for fault in faults:
                for contestant in sorted(contestants, reverse=position % 2 == 1):
                    outcomes = found.setdefault((fault.key, contestant), [])
                    if contestant == "peer" and has_failed(outcomes):
                        continue
                    options.progress(f"round {position + 1} of {options.rounds}: {fault.name}: {contestant}")
                    outcomes.append(_measure(contestants[contestant], fault, f"{fault.key}-{position + 1}"))
                    options.progress(f"  {outcomes[-1]}")
    claims = [claim for fault in faults for claim in claims_of(fault, found, options.environment)]
    options.table(TITLE, FAULT_COLUMNS, [fault_cells(claim.record()) for claim in claims])
    return claims


Contestant = Callable[..., Trainee]


def _warm_up(folder: Path, progress: Callable[[str], None]) -> dict[str, Contestant]:
    """Both contestants, after a job of each: the corpus is prepared, what is compiled is compiled, the page cache is warm.

    The peer gets the network of ours.
    """
    progress("warming up")
    ours = partial(Ours, folder / "ours")
    with _settled(ours, "warm-up", elastic=False) as (trainee, _):
        network = trainee.network()
    peer = partial(Peer, folder / "peer", network=network)
    with _settled(peer, "warm-up", elastic=False):
        return {"ours": ours, "peer": peer}


@contextmanager
def _settled(contestant: Contestant, name: str, *, elastic: bool) -> Generator[tuple[Any, RayCluster]]:
    """A job under way, on a cluster of its own: what a job leaves behind on a cluster must not slow the next."""
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as nodes, cluster_of(Path(nodes), WORK["ranks"]) as cluster:
        trainee = contestant(name, cluster, min_workers=1 if elastic else WORK["ranks"])
        try:
            trainee.start()
            if not trainee.wait_for(lambda: len(trainee.steps) > _SETTLE_STEPS, _START_LIMIT_S):
                raise RuntimeError(f"{type(trainee).__name__} did not train:\n{trainee.text()[-2000:]}")
            yield trainee, cluster
        finally:
            trainee.end()


def _measure(contestant: Contestant, fault: Fault, name: str) -> Outcome:
    with _settled(contestant, name, elastic=fault.elastic) as (trainee, cluster):
        start_up_s, group, begun = trainee.start_up_s(), trainee.steps[-1].group, time.time()
        fault.inject(trainee, cluster)
        step = trainee.wait_for_step_after(group, _LIMIT_S)
        named_s = _named_at(trainee, fault) - begun if isinstance(trainee, Ours) else None
        if step is None:
            ended = trainee.command.process.poll()
            text = f"did not come back in {_LIMIT_S:.0f} s" if ended is None else f"gave up after {time.time() - begun:.0f} s"
            return Outcome(start_up_s, None, named_s=named_s, text=text)
        reached = max(step.number for step in trainee.steps if step.group == group)
        return Outcome(start_up_s, step.seen_at - begun, max(0, reached + 1 - step.number), named_s)


def _named_at(trainee: Ours, fault: Fault) -> float:
    events = trainee.events(fault.event)
    if not events:
        raise RuntimeError(f"{fault.name}: the run recorded no {fault.event}, so the fault missed:\n{trainee.text()[-2000:]}")
    return events[0]["time"]


def has_failed(outcomes: Sequence[Outcome]) -> bool:
    """Whether a contestant did not come back in some round; pure."""
    return any(outcome.recovery_s is None for outcome in outcomes)


def claims_of(fault: Fault, found: Found, environment: dict[str, Any]) -> list[Claim]:
    """What was found of a fault: the seconds until the next step and, where that counts, until the rank is named; pure.

    A contestant that failed in a round has no figure: its text says what happened.
    """
    ours, peer = found[fault.key, "ours"], found[fault.key, "peer"]
    described = {**environment, "work": WORK, "peer": _peer_version()}
    outcomes = {"ours": _describe(ours), "peer": _describe(peer)}
    start_up_s = middle([outcome.start_up_s for outcome in ours]) or 0.0
    goal = None if fault.goal_s is None else Goal("ours", "≤", fault.goal_s, ("start-up", start_up_s))
    note = outcomes["peer"]["text"] or _peer_version()
    claims = [make_claim(fault.name, "s", {**described, "outcomes": outcomes}, _recoveries(ours), _recoveries(peer), note, goal)]
    if fault.is_named:
        named = [outcome.named_s for outcome in ours if outcome.named_s is not None]
        claims.append(make_claim(f"{fault.name}: until it is named", "s", described, named, (), "names no rank", _NAMED_GOAL))
    return claims


def _describe(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "start_up_s": rounded(middle([outcome.start_up_s for outcome in outcomes])),
        "steps_again": rounded(middle([outcome.steps_again for outcome in outcomes])),
        "text": next((outcome.text for outcome in outcomes if outcome.text), ""),
    }


def _recoveries(outcomes: Sequence[Outcome]) -> list[float]:
    return [] if has_failed(outcomes) else [outcome.recovery_s for outcome in outcomes if outcome.recovery_s is not None]


def _peer_version() -> str:
    return f"ray {installed_version('ray')} + deepspeed {installed_version('deepspeed')}"


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main, parts=[fault.key for fault in FAULTS])
