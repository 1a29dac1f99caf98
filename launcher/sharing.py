"""Whether a storage is shared by all nodes, and does what runs rely on, judged from what nodes wrote and read (pure)."""

from collections.abc import Iterator, Mapping, Sequence

from data_pipeline.errors import ExitCode
from launcher.measurements import Finding, Measurements, NodeMeasurements, Read

SLOW_WRITE_S = 1.0
"""Of a small file until it is durable. A checkpoint is committed by some dozens of such writes, one after another."""

_SHARE = "Mount the same storage at the same path there, or give a URL as --storage."


def judge_storage(found: Measurements) -> Iterator[Finding]:
    """Nodes that cannot write or read, nodes that are apart from the others, and a storage that is not what runs need."""
    nodes = [each for each in found.answering() if each.facts is not None]
    yield from _failed(found.storage, nodes)
    yield from _left(found.storage, nodes)
    tried = [each for each in nodes if each.written is not None and each.read is not None]
    here = {each.node.id for each in tried if each.node.is_here}
    groups = sharing_groups({each.node.id: each.read for each in tried if each.read is not None}, prefer=here)
    if len(groups) > 1 and len(groups[0]) == 1:
        yield Finding(f"storage {found.storage} is not shared: each node sees only what it has written itself", _SHARE, code=ExitCode.STORAGE)
    else:
        yield from _apart(found.storage, groups)
        yield from _late(found.storage, tried, groups[0] if groups else [])
        yield from _not_exclusive(found.storage, found.nodes, groups[0] if groups else [])
    for each in tried:
        if each.written is not None and each.written.seconds > SLOW_WRITE_S:
            what = f"takes {each.written.seconds:.1f} s to write a small file to {found.storage}"
            yield Finding(what, "Look at the storage's load and at the way to it; saves will take long.", each.node.id, ExitCode.OK)


def sharing_groups(reads: Mapping[str, Read], prefer: set[str]) -> list[list[str]]:
    """Nodes that see what others of their group write, directly or by way of others; the largest group first, of equal ones that of `prefer`."""
    group_of = {node: {node} for node in reads}
    for reader, read in reads.items():
        for writer in read.seen:
            if writer in group_of and group_of[writer] is not group_of[reader]:
                joined = group_of[writer] | group_of[reader]
                group_of.update(dict.fromkeys(joined, joined))
    groups = {id(group): sorted(group, key=list(reads).index) for group in group_of.values()}
    return sorted(groups.values(), key=lambda group: (-len(group), prefer.isdisjoint(group)))


def _failed(storage: str, nodes: Sequence[NodeMeasurements]) -> Iterator[Finding]:
    failed = [(each, each.failed.get("write") or each.failed["read"]) for each in nodes if {"write", "read"}.intersection(each.failed)]
    if failed and len(failed) == len(nodes):
        yield Finding(f"storage {storage} cannot be used from any node: {failed[0][1]}", "Choose another --storage.", code=ExitCode.STORAGE)
        return
    for each, cause in failed:
        yield Finding(f"cannot use storage {storage}: {cause}", _SHARE, each.node.id, ExitCode.STORAGE)


def _left(storage: str, nodes: Sequence[NodeMeasurements]) -> Iterator[Finding]:
    for each in nodes:
        if "remove" in each.failed:
            what = f"could not remove what {storage} was tried with: {each.failed['remove']}"
            yield Finding(what, f"Remove the folder {storage}/.doctor-…; `maskwright clean` lists it.", each.node.id, ExitCode.OK)


def _apart(storage: str, groups: Sequence[Sequence[str]]) -> Iterator[Finding]:
    for group in groups[1:]:
        for node in group:
            what = f"sees in {storage} nothing of what most nodes write there, nor they of what it writes: the storage is not shared"
            yield Finding(what, _SHARE, node, ExitCode.STORAGE)


def _late(storage: str, tried: Sequence[NodeMeasurements], group: Sequence[str]) -> Iterator[Finding]:
    """Nodes that do not see some of what nodes of their own group have written."""
    for each in tried:
        unseen = [node for node in (each.read.unseen if each.read else ()) if node in group]
        if each.node.id in group and unseen:
            what = f"has not seen in time what {len(unseen)} other nodes wrote last to {storage}"
            yield Finding(what, "Mount it with caching of attributes for some seconds at most (NFS: actimeo=3).", each.node.id, ExitCode.STORAGE)


def _not_exclusive(storage: str, nodes: Sequence[NodeMeasurements], group: Sequence[str]) -> Iterator[Finding]:
    """Leases and attempts are numbers that exactly one of several may claim (R10). Whoever was lost may have been that one."""
    winners = sum(each.written.won for each in nodes if each.written is not None and each.node.id in group)
    lost_winner = any(each.lost and each.written is not None and each.written.won for each in nodes)
    is_known = not lost_winner and all(each.read is not None for each in nodes if not each.node.gone)
    if winners > 1 or (winners == 0 and group and is_known):
        what = f"in {storage} {winners} of {len(group)} nodes created the file that exactly one may create: two commands could drive one run"
        remedy = "Choose a storage with exclusive creation: a POSIX file system, NFS 3 or later, or a store with conditional puts."
        yield Finding(what, remedy, code=ExitCode.STORAGE)
