"""The kinds of faults of the schedule, and how the run must name each of them."""

import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.faults import NumericFault
from tests.support.ray_nodes import RayNode
from tests.support.rig import RECOVERED_AFTER, Event, Fault, Hit, MissedError, Rig, says, send

DRAIN_S = 120


def died(rank: int) -> Callable[[Event], bool]:
    """Whether the end of an attempt fits a dead rank: where a rank is said to have died, it is that one; another may have seen the peer go."""
    return lambda event: event["failure"] == "infrastructure" and (event["rank"] == rank or "died" not in event["cause"])


def kill_rank(rig: Rig) -> Hit:
    """SIGKILL."""
    rank, pid = rig.any_rank()
    send(pid, signal.SIGKILL)
    return Hit(f"rank {rank}", {"worker_failed": died(rank)})


def kill_during_save(rig: Rig) -> Hit:
    """SIGKILL while a checkpoint is being written."""
    rig.wait_for("a save", lambda: list((rig.run / "checkpoints").glob("step-*.partial-*")))
    return kill_rank(rig)


def stop_rank(rig: Rig) -> Hit:
    """SIGSTOP, for good."""
    rank, pid = rig.any_rank()
    send(pid, signal.SIGSTOP)
    stopped = {"rank_unhealthy": says(rank=rank, pid=pid, state="stopped"), "worker_failed": says(rank=rank, failure="infrastructure")}
    return Hit(f"rank {rank}", stopped)


def slow_down(pid: int, seconds: float, still_s: float, moving_s: float) -> None:
    """A process that is stopped most of the time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pause(pid, still_s)
        time.sleep(moving_s)


def pause(pid: int, seconds: float) -> None:
    """A process that is stopped for a while."""
    send(pid, signal.SIGSTOP)
    time.sleep(seconds)
    send(pid, signal.SIGCONT)


def slow_rank(rig: Rig) -> Hit:
    """A control: a rank that is stopped half of the time for some seconds is slow, not broken."""
    rank, pid = rig.any_rank()
    slow_down(pid, 6.0, still_s=0.3, moving_s=0.3)
    return Hit(f"rank {rank}")


def kill_driver(rig: Rig) -> Hit:
    """The command dies; somebody resumes the run."""
    rig.command.kill_driver()
    hit = Hit("the command", {"worker_failed": says(rank=None, failure="infrastructure")})
    rig.resume()
    return hit


def pause_driver(rig: Rig) -> Hit:
    """A control: the command stands still for less than what makes its lease stale."""
    pause(rig.command.process.pid, 5.0)
    return Hit("the command")


def _of_node(rig: Rig, node: RayNode) -> Callable[[Event], bool]:
    ranks = rig.ranks_of(node)
    if not ranks:
        raise MissedError("the node has no rank")
    fits = [died(rank) for rank in ranks]
    return lambda event: any(each(event) for each in fits)


def _replace(rig: Rig, node: RayNode) -> Callable[[], None]:
    """Another node comes once the run has gone on without this one, and the run grows."""

    def come() -> None:
        rig.wait_until_trained(RECOVERED_AFTER)
        if node in rig.cluster.nodes:
            rig.cluster.kill_node(node)
        rig.cluster.add_node()
        rig.wait_for("growth", lambda: rig.ranks().keys() == {0, 1})

    return come


def _any_node(rig: Rig) -> tuple[RayNode, str]:
    number = rig.chance.randrange(len(rig.cluster.nodes))
    node = rig.cluster.nodes[number]
    return node, f"node {number}, rank {', '.join(map(str, rig.ranks_of(node)))}"


def kill_node(rig: Rig) -> Hit:
    """A node is gone with all its processes."""
    node, name = _any_node(rig)
    expected = {"worker_failed": _of_node(rig, node)}
    at = time.time()
    rig.cluster.kill_node(node)
    return Hit(name, expected, _replace(rig, node), at)


def kill_raylet(rig: Rig) -> Hit:
    """SIGKILL to what Ray runs on a node, and to nothing else there."""
    node, name = _any_node(rig)
    expected = {"worker_failed": _of_node(rig, node)}
    send(node.raylet(), signal.SIGKILL)
    return Hit(name, expected, _replace(rig, node))


def stop_raylet(rig: Rig) -> Hit:
    """SIGSTOP to it, for good. Its rank goes on until Ray gives up the node, which takes a minute: a slow rank keeps the run short meanwhile."""
    node, name = _any_node(rig)
    expected = {"worker_failed": _of_node(rig, node)}
    begun, (_, pid) = time.time(), rig.any_rank()
    send(node.raylet(), signal.SIGSTOP)
    hit = Hit(name, expected, _replace(rig, node))
    while not rig.events("worker_failed", since=begun):
        try:
            slow_down(pid, 1.0, still_s=1.0, moving_s=0.1)
        except MissedError:
            break  # the attempt ends
    return hit


def pause_raylet(rig: Rig) -> Hit:
    """A control: a raylet that stands still for a moment."""
    node, name = _any_node(rig)
    pause(node.raylet(), 2.0)
    return Hit(name)


def drain_node(rig: Rig) -> Hit:
    """A node is taken back, as announced: all ranks save, and go on without it."""
    node, name = _any_node(rig)
    at = time.time()
    rig.cluster.drain(node, DRAIN_S)
    expected = {"preempted": lambda event: event["deadline"] < at + DRAIN_S + 30, "worker_failed": says(failure="preemption")}
    return Hit(name, expected, _replace(rig, node), at)


def spoil_gradient(rig: Rig) -> Hit:
    """A NaN in one gradient of one rank, once (see `armed_fault`)."""
    armed = armed_fault(rig.folder).armed
    assert armed is not None
    Path(armed).touch()
    rig.wait_for("a NaN", lambda: not Path(armed).exists())
    trouble = says(trouble="non_finite_gradients", response="rewind")
    return Hit("a gradient", {"numeric_trouble": trouble, "worker_failed": says(failure="numeric")})


def armed_fault(folder: Path) -> NumericFault:
    """What worker processes have in them that `spoil_gradient` sets off."""
    return NumericFault("gradient", armed=str(folder / "spoil-a-gradient"))


def fill_disk_of_a_rank(rig: Rig) -> Hit:
    """The second rank can write no file as large as its part of a checkpoint; the run says so and ends, and is resumed where there is room.

    (A limit of its process: the kernel refuses the write, as a full disk does, and what other ranks write is not concerned.)
    """
    rig.wait_for("a checkpoint", rig.checkpoints)
    own = max(file.stat().st_size for file in rig.checkpoints()[-1].rglob("*") if "rank_1_" in file.name)
    try:
        resource.prlimit(rig.ranks()[1], resource.RLIMIT_FSIZE, (own // 2, own // 2))
    except (KeyError, ProcessLookupError):
        raise MissedError("rank 1 has ended") from None
    at = time.time()
    assert rig.command.wait() == 7, rig.command.text()
    rig.resume()
    named = {"worker_failed": lambda event: event["failure"] == "known" and "rank 1 " in event["cause"], "failed": says(exit_code=7)}
    return Hit("rank 1", named, at=at)


Damage = Callable[[Rig, Path], None]


def _damage(how: Damage | None) -> Callable[[Rig], Hit]:
    """All ranks stand still while the newest checkpoint is damaged, so that no newer one is committed before one of them is killed."""

    def inject(rig: Rig) -> Hit:
        rig.wait_for("two checkpoints", lambda: len(rig.checkpoints()) >= 2)
        ranks = _hold_between_saves(rig)
        newest = rig.checkpoints()[-1]
        file = rig.chance.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        if how is not None:
            how(rig, file)
        rank = rig.chance.choice(sorted(ranks))
        send(ranks.pop(rank), signal.SIGKILL)
        hit = Hit(f"{file.relative_to(newest)}", {"worker_failed": died(rank)})
        for pid in ranks.values():
            send(pid, signal.SIGCONT)  # it cannot commit alone
        if how is None:
            return hit
        found = says(step=int(newest.name.removeprefix("step-")), file=str(file.relative_to(newest)))
        return Hit(hit.victim, {**hit.expected, "checkpoint_damaged": found}, at=hit.at)

    return inject


def _hold_between_saves(rig: Rig) -> dict[int, int]:
    """Stop all ranks at a moment when no checkpoint is being written; well before a stopped rank is named."""
    ranks = rig.ranks()
    while True:
        for pid in ranks.values():
            send(pid, signal.SIGSTOP)
        time.sleep(0.05)
        if not rig.is_saving():
            return ranks
        for pid in ranks.values():
            send(pid, signal.SIGCONT)
        time.sleep(0.05)


def _truncate(rig: Rig, file: Path) -> None:
    os.truncate(file, rig.chance.randrange(file.stat().st_size))


def _flip(rig: Rig, file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[rig.chance.randrange(len(data))] ^= 1 << rig.chance.randrange(8)
    file.write_bytes(data)


def _delete(rig: Rig, file: Path) -> None:
    del rig
    file.unlink()


FAULTS: Sequence[Fault] = (
    Fault("kill a rank", kill_rank, weight=4),
    Fault("kill a rank during a save", kill_during_save, weight=3),
    Fault("stop a rank", stop_rank),
    Fault("a slow rank (control)", slow_rank, weight=1),
    Fault("kill the driver", kill_driver),
    Fault("pause the driver (control)", pause_driver, weight=1),
    Fault("pause a raylet (control)", pause_raylet, weight=1),
    Fault("a NaN in a gradient", spoil_gradient),
    Fault("disk full on a rank", fill_disk_of_a_rank),
    Fault("truncate a checkpoint's file", _damage(_truncate)),
    Fault("flip a bit of a checkpoint", _damage(_flip)),
    Fault("delete a checkpoint's file", _damage(_delete)),
    Fault("kill, checkpoint intact (control)", _damage(None), weight=1),
    Fault("kill a node", kill_node, changes_world=True),
    Fault("kill a raylet", kill_raylet, changes_world=True),
    Fault("stop a raylet", stop_raylet, changes_world=True, takes_minutes=True, weight=1),
    Fault("drain a node", drain_node, changes_world=True),
)
