"""Who is measured when, with whom, and what of a corpus each node looks at (pure)."""

from collections.abc import Mapping, Sequence

from launcher.measurements import KnownNode, ShardLook


def turns(machines: Mapping[str, str]) -> list[list[str]]:
    """Nodes in groups that are measured one after another: of each machine one node at a time, all machines at once.

    `machines` names the machine of each node.
    """
    by_machine: dict[str, list[str]] = {}
    for node, machine in machines.items():
        by_machine.setdefault(machine, []).append(node)
    longest = max(map(len, by_machine.values()), default=0)
    return [[nodes[turn] for nodes in by_machine.values() if turn < len(nodes)] for turn in range(longest)]


def pairings(nodes: Sequence[str], most: int) -> list[list[tuple[str, str]]]:
    """Rounds of a tournament: in each a node meets at most one other, and no two ever meet twice.

    After `most` rounds each node has met that many others, or one fewer where it had to pause because their number is odd; of fewer nodes, all.
    """
    ring: list[str | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    rounds: list[list[tuple[str, str]]] = []
    for _ in range(min(most, len(ring) - 1) if len(nodes) > 1 else 0):
        half = len(ring) // 2
        met = zip(ring[:half], reversed(ring[half:]), strict=True)
        rounds.append([(one, other) for one, other in met if one is not None and other is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]  # the first stays, the others move on by a place
    return rounds


def shard_parts(num_shards: int, num_nodes: int, most: int) -> list[list[int]]:
    """Numbers of the shards that each node looks at: all of them once where `most` a node suffice, else evenly spaced ones.

    Where there are fewer shards than nodes, each node looks at one all the same.
    """
    parts: list[list[int]] = []
    for node in range(num_nodes if num_shards else 0):
        own = range(node, num_shards, num_nodes) or range(node % num_shards, node % num_shards + 1)
        count = min(most, len(own))
        parts.append([own[nth * len(own) // count] for nth in range(count)])
    return parts


def doubtful_first(looks: Mapping[str, ShardLook], most: int) -> list[tuple[str, str]]:
    """Nodes and shards that they found wrong, to be looked at again: of every node one before any has a second, so that none is believed untried."""
    doubtful = [(nth, node, name) for node, found in looks.items() for nth, name in enumerate(found.failed)]
    return [(node, name) for _, node, name in sorted(doubtful, key=lambda each: each[0])[:most]]


def second_looker(first: str, nodes: Sequence[KnownNode]) -> str:
    """Who looks again at what `first` found wrong: this machine where it can, else another; the same one where there is no other."""
    others = sorted((node for node in nodes if node.id != first), key=lambda node: not node.is_here)
    return others[0].id if others else first


def others_in_ring(nodes: Sequence[str], node: str, most: int) -> list[str]:
    """The nodes after `node`, going round: all others, or the next `most`. Whoever is apart has neighbours on both sides that notice."""
    at = nodes.index(node)
    return [*nodes[at + 1 :], *nodes[:at]][:most]
