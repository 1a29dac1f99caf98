"""Which node or link of a cluster is slow or cut, judged from exchanges in pairs (pure)."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from statistics import median

from data_pipeline.errors import ExitCode
from launcher.measurements import Finding, Link, Measurements, best_rates, machines_of

SLOW_LINK = 0.5
"""Of the median of the others. Less strict than the rate of a node: neighbours on one switch are faster than nodes further apart."""

_REMEDY = "Look at its network: cable, switch, interface (`ip -s link`), firewall between the nodes."


def judge_links(found: Measurements) -> Iterator[Finding]:
    """Nodes without which no link is cut; nodes and links that are slow; all nodes together."""
    names = {each.node.id: each.node.name for each in found.nodes}
    cut = [link for link in found.links if link.bytes_per_s is None]
    if cut and len(cut) == len(found.links):  # a cause that is common to all, or of two nodes either
        one, other = (names[node] for node in cut[0].nodes)
        more = f", nor any of {len(cut) - 1} other pairs" if len(cut) > 1 else ""
        yield Finding(f"{one} and {other} cannot exchange data{more}: {cut[0].error}", _REMEDY, code=ExitCode.UNREACHABLE)
        return
    left_out = without_cuts(cut, {each.node.id for each in found.nodes if each.node.is_here})
    for node in left_out:
        partners = [names[other] for link in cut if node in link.nodes for other in link.nodes if other != node]
        cause = next(link.error for link in cut if node in link.nodes)
        yield Finding(f"cannot exchange data with {', '.join(partners)}: {cause}", _REMEDY, node)
    yield from _slow(found, left_out, names)
    if found.all_reduce is not None and found.all_reduce.error:
        what = f"the {found.all_reduce.num_nodes} nodes that can exchange data in pairs cannot all together: {found.all_reduce.error}"
        yield Finding(what, _REMEDY, code=ExitCode.UNREACHABLE)


def _slow(found: Measurements, left_out: Collection[str], names: Mapping[str, str]) -> Iterator[Finding]:
    """A node that is slow whoever its partner is; a slow link between two that are fast elsewhere."""
    links = between_machines(found.links, machines_of(found.nodes))
    slow, busy = slow_to_all(links), {each.node.id for each in found.nodes if each.node.is_busy}
    for node, share in slow.items():
        what = f"exchanges data at {share:.0%} of the median of the others, whoever its partner is"
        if node in busy:
            yield Finding(f"{what}; Ray has given some of it to others", "Look again when it is free.", node, ExitCode.OK)
        else:
            yield Finding(what, _REMEDY, node)
    for link, share in _slow_links(links):
        if not {*slow, *left_out}.intersection(link.nodes):
            one, other = (names[node] for node in link.nodes)
            yield Finding(f"the link between {one} and {other} has {share:.0%} of the rate of the median link", _REMEDY, code=ExitCode.OK)


def between_machines(links: Sequence[Link], machines: Mapping[str, str]) -> list[Link]:
    """Without links inside a machine: those pass no network, and would make every other node look slow."""
    return [link for link in links if machines.get(link.nodes[0], "") != machines.get(link.nodes[1], "")]


def without_cuts(cut: Sequence[Link], keep: Collection[str] = ()) -> list[str]:
    """Nodes without which no link is cut: again and again the one that most cut links lead to; where several are alike, none of `keep`."""
    left_out: list[str] = []
    while remaining := [link.nodes for link in cut if not set(left_out).intersection(link.nodes)]:
        nodes = [node for pair in remaining for node in pair]
        left_out.append(max(dict.fromkeys(nodes), key=lambda node: (nodes.count(node), node not in keep)))
    return left_out


def slow_to_all(links: Sequence[Link]) -> dict[str, float]:
    """Nodes whose fastest link is below SLOW_LINK, with its share of the median of the other nodes' fastest. Two nodes share their one link."""
    best = best_rates(links)
    if len(best) < 3:
        return {}
    shares = {node: rate / median(other for name, other in best.items() if name != node) for node, rate in best.items()}
    return {node: share for node, share in shares.items() if share < SLOW_LINK}


def _slow_links(links: Sequence[Link]) -> Iterator[tuple[Link, float]]:
    rates = [link.bytes_per_s for link in links if link.bytes_per_s is not None]
    for link in links:
        if link.bytes_per_s is not None and (share := link.bytes_per_s / median(rates)) < SLOW_LINK:
            yield link, share
