"""Tells of dead ranks in our words; Ray's, a paragraph for each, go to the log (pure)."""

from collections.abc import Sequence

from launcher.attempts import driver_log
from launcher.group_watch import GroupWatch
from launcher.rank_log import is_kept_only_if_failed

_NODE_GONE = "node has died"
_KNOWN = {"low on memory": "Ray ended it because its node ran low on memory", _NODE_GONE: "its node is gone"}
"""What Ray can tell, by its words. Of a process that ended by itself or by a signal it knows no more than that the connection broke."""


def tell_deaths(ranks: Sequence[int], rays_words: str, watch: GroupWatch) -> str:
    """In a line: which ranks, where the first was and at what, as far as the watch has seen, how it ended, and where to read on."""
    first = ranks[0]
    member, pulse = watch.members.get(first), watch.health.pulses.get(first)
    where = f" on {member.host} (process {member.pid})" if member else ""
    doing = f" in {pulse.beat.phase} of step {pulse.beat.step}" if pulse else ""
    how = next((ours for theirs, ours in _KNOWN.items() if theirs in rays_words), "it was killed, or crashed")
    is_lost = _NODE_GONE in rays_words and is_kept_only_if_failed(first, watch.world_size)  # the log went with the node
    log = driver_log(watch.run) if is_lost else watch.run.rank_log(watch.attempt, first)
    return f"{name_ranks(ranks)} died{where}{doing}: {how}; see {log}"


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `rank 3, 7`, and of a whole node that was lost no more than the first few."""
    first, more = ", ".join(map(str, ranks[:8])), len(ranks) - 8
    return f"rank {first} and {more} more" if more > 0 else f"rank {first}"
