"""All-reduces between the nodes under examination: in pairs first, so that it is known who is slow or cut off, then all together (asks the nodes)."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from launcher.assignments import pairings
from launcher.links import between_machines, slow_to_all, without_cuts
from launcher.measurements import AllReduce, KnownNode, Link, machines_of
from launcher.roster import Answer, Call, Roster

_LINK_S = 30.0
"""For an all-reduce to begin and to end; processes give up a little earlier, and say why."""
_ROUNDS = 3
"""Of pairs: each node meets two others or three, so that a slow partner can be told from a slow node."""


def exchange_data(roster: Roster) -> tuple[tuple[Link, ...], AllReduce | None]:
    """Every link that was tried, and the all-reduce of the nodes that none of them showed to be cut off; None where they are fewer than two."""
    nodes = _able(roster)
    if len(nodes) < 2:
        return (), None
    meeting_point = _MeetingPoint.open(next((each.node for each in roster.all() if each.node.is_here), nodes[0]), nodes)
    links: list[Link] = []
    for pairs in pairings([node.id for node in nodes], _ROUNDS):
        links += _try_links(roster, meeting_point, pairs)
    links = _try_again(roster, meeting_point, links)
    apart = without_cuts([link for link in links if link.bytes_per_s is None])
    return tuple(links), _all_together(roster, meeting_point, [node.id for node in _able(roster) if node.id not in apart])


def _able(roster: Roster) -> list[KnownNode]:
    """Those that train. What cannot even multiply fails here for no reason of the network, and what is in use is left alone."""
    return [node for node in roster.usable(training=True) if "matmul" not in roster[node.id].failed and not node.is_in_use]


def _all_together(roster: Roster, meeting_point: "_MeetingPoint", nodes: Sequence[str]) -> AllReduce | None:
    """None where a node was lost over it: that is said of the node, and says nothing of the others."""
    if len(nodes) < 2:
        return None
    answers = _meet(roster, meeting_point, [nodes]).values()
    if any(answer.lost for answer in answers):
        return None
    error = next((answer.error for answer in answers if answer.error), "")
    return AllReduce(len(nodes), None if error else min(answer.value for answer in answers), error)


def _try_again(roster: Roster, meeting_point: "_MeetingPoint", links: Sequence[Link]) -> list[Link]:
    """Something may have passed through a node just then: links of nodes that seem slow are tried once more, alone, and the better rate counts."""
    slow = slow_to_all(between_machines(links, machines_of(roster.all())))
    better = list(links)
    for nth, link in enumerate(links):
        if slow.keys() & link.nodes:
            again = _try_links(roster, meeting_point, [link.nodes])
            better[nth] = max([link, *again], key=lambda tried: tried.bytes_per_s or 0.0)
    return better


def _try_links(roster: Roster, meeting_point: "_MeetingPoint", pairs: Sequence[tuple[str, str]]) -> list[Link]:
    """The links of a round. One whose node was lost says nothing about the other."""
    there = [pair for pair in pairs if all(roster[node].answers for node in pair)]
    answers = _meet(roster, meeting_point, there)
    links: list[Link] = []
    for pair in there:
        both = [answers[node] for node in pair]
        error = next((answer.error for answer in both if answer.error), "")
        if not any(answer.lost for answer in both):
            links.append(Link(pair, None if error else min(answer.value for answer in both), error))
    return links


def _meet(roster: Roster, meeting_point: "_MeetingPoint", groups: Sequence[Sequence[str]]) -> Mapping[str, Answer]:
    """An exchange in each of these groups, at the same time."""
    calls = {node: call for group in groups for node, call in meeting_point.calls([roster[node].node for node in group]).items()}
    return roster.ask_all(calls, _LINK_S)


@dataclass(frozen=True)
class _MeetingPoint:
    """Where nodes find each other."""

    host: str
    store: Any
    backend: str

    @classmethod
    def open(cls, here: KnownNode, nodes: Sequence[KnownNode]) -> "_MeetingPoint":
        from launcher.node_rates import open_store

        return cls(here.address, open_store(here.address), "nccl" if all(node.num_gpus >= 1 for node in nodes) else "gloo")

    def calls(self, group: Sequence[KnownNode]) -> dict[str, Call]:
        """What each node of a group is to do for an exchange."""
        from launcher.node_rates import Meeting, exchange

        meeting = Meeting(self.host, self.store.port, uuid.uuid4().hex, len(group), self.backend, _LINK_S / 2)
        return {node.id: partial(exchange, meeting, rank, node.address) for rank, node in enumerate(group)}
