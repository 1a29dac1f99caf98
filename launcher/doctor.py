"""What is wrong with a cluster, judged from what was measured on its nodes, and which of them to leave out (pure)."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median, median_low

from data_pipeline.errors import ExitCode
from launcher.links import judge_links
from launcher.measurements import Clock, Diagnosis, Finding, Measurements, Rate
from launcher.sharing import judge_storage

SLOW_RATE = 0.7
"""Of the median of the other nodes with the same device and threads. A step waits for its slowest rank, so such a node costs all others 30 %;
healthy machines of one kind differ by some per cent, virtual ones by ten to twenty."""

SKEW_S = 1.0
"""Events, metrics and logs of several machines are put in order by their time, and read wrongly from here on."""

SKEW_FAULT_S = 15.0
"""Half of what makes a lease stale (`lease.STALE_AFTER_S`), which one machine writes and another judges."""

SHM_SPARE_BYTES = 256 << 20
"""Shared memory beside Ray's object store: for batches on their way from loader workers, and NCCL's buffers. Docker gives 64 MB in all."""

_ORDER = (ExitCode.STORAGE, ExitCode.UNREACHABLE, ExitCode.DATA_CORRUPT, ExitCode.ENVIRONMENT)
"""Of several faults, the first of these is what the command ends with: without storage no run can begin, whatever else there is."""


def diagnose(found: Measurements) -> Diagnosis:
    """Every finding, the nodes to leave out, and the exit code that follows."""
    findings = [finding for rule in _RULES for finding in rule(found)]
    faults = [finding for finding in findings if finding.is_fault]
    named = {fault.node for fault in faults}
    excluded = tuple(each.node.id for each in found.nodes if each.node.id in named)
    code = next((code for code in _ORDER if any(fault.code is code for fault in faults)), ExitCode.OK)
    return Diagnosis((*faults, *(finding for finding in findings if not finding.is_fault)), excluded, code)


def slow_nodes(rates: Mapping[str, Rate]) -> dict[str, float]:
    """Nodes below SLOW_RATE, each with its share of the median of the others."""
    shares = {node: share_of_others(node, rates) for node in rates}
    return {node: share for node, share in shares.items() if share is not None and share < SLOW_RATE}


def share_of_others(node: str, rates: Mapping[str, Rate]) -> float | None:
    """A node's rate over the median of the other nodes with the same device and threads; None where it is the only one of its kind."""
    own = rates[node]
    others = [rate.flops for other, rate in rates.items() if other != node and (rate.device, rate.threads) == (own.device, own.threads)]
    return own.flops / median(others) if others else None


def rates_of(found: Measurements) -> dict[str, Rate]:
    """By node, those that were measured."""
    return {each.node.id: each.rate for each in found.nodes if each.rate is not None}


def _lost(found: Measurements) -> Iterator[Finding]:
    for each in found.nodes:
        if each.node.gone:
            yield Finding(f"is dead: {each.node.gone}", "Start Ray there again, or go on without it.", each.node.id)
        elif each.lost:
            yield Finding(f"is dead or unreachable: {each.lost}", "End Ray there (`ray stop`) and start it again.", each.node.id)
        elif each.node.is_leaving:
            yield Finding(
                "is about to be taken away (drained)", "Nothing: runs leave it in time, and it was not looked at.", each.node.id, ExitCode.OK
            )


def _nobody(found: Measurements) -> Iterator[Finding]:
    trains = [each for each in found.nodes if each.node.trains]
    if not found.answering() or (trains and not any(each.answers for each in trains)):
        what = "no node can be used: those that ranks may be placed on are dead, or about to be taken away"
        yield Finding(what, "Wait for new nodes, or start Ray on some.", code=ExitCode.UNREACHABLE)


def _in_use(found: Measurements) -> Iterator[Finding]:
    for each in found.answering():
        if each.node.is_in_use:
            what = "was not measured, neither matrix products nor exchanges: it is busy, and a run on its GPUs could end for want of memory"
            yield Finding(what, "Look again when it is free.", each.node.id, ExitCode.OK)


_FAILED = {
    "facts": ("cannot run our code", "Install the same Python and the same packages there as here."),
    "matmul": ("cannot multiply matrices", "Look who uses its memory or GPU, and at its driver."),
    "shards": ("cannot look at the corpus", "Mount the corpus there, or give the node access to its store."),
}
"""Parts whose failure is the node's fault, by what it then cannot do. What storage and links came to has rules of its own."""


def _failed(found: Measurements) -> Iterator[Finding]:
    for each in found.answering():
        for part, (what, remedy) in _FAILED.items():
            if part in each.failed:
                yield Finding(f"{what}: {each.failed[part]}", remedy, each.node.id)


_KEEP_TIME = "Let machines keep time (chrony or systemd-timesyncd)."


def _versions(found: Measurements) -> Iterator[Finding]:
    """A machine is measured by what most have. This one counts once, and where as many have one thing as another, nobody is blamed."""
    everywhere = [each.facts.versions for each in found.nodes if each.facts]
    if not any(each.facts and each.node.is_here for each in found.nodes):
        everywhere.append(found.versions_here)
    remedy = "Install the same Python and the same packages on every machine."
    usual: dict[str, str] = {}
    for name in found.versions_here:
        first, *others = Counter(versions.get(name, "none") for versions in everywhere).most_common()
        if others and others[0][1] == first[1]:
            counted = ", ".join(f"{version} on {count}" for version, count in (first, *others))
            yield Finding(f"machines differ, and no {name} is what most have: {counted}", remedy)
        else:
            usual[name] = first[0]
    if other := _differences(found.versions_here, usual):
        yield Finding(f"this machine, where the command runs, has {other}", remedy)
    for each in found.nodes:
        if each.facts and (other := _differences(each.facts.versions, usual)):
            yield Finding(f"has {other}", remedy, each.node.id)


def _differences(versions: Mapping[str, str], usual: Mapping[str, str]) -> str:
    different = [name for name, version in usual.items() if versions.get(name, "none") != version]
    return ", ".join(f"{name} {versions.get(name, 'none')} (most have {usual[name]})" for name in different)


def _speed(found: Measurements) -> Iterator[Finding]:
    nodes = {each.node.id: each.node for each in found.nodes}
    for node, share in slow_nodes(rates_of(found)).items():
        what = f"multiplies matrices at {share:.0%} of the median of the others like it, and every step would wait for it"
        if nodes[node].is_busy:
            yield Finding(f"{what}; Ray has given some of it to others", "Look again when it is free.", node, ExitCode.OK)
        else:
            yield Finding(what, "Look there for other processes (`top`), a hot or throttled processor, or fewer CPUs than Ray was told.", node)


def _clocks(found: Measurements) -> Iterator[Finding]:
    """Measured by the clock that most have, this machine's counted once. Where most agree on none, as two that differ do, nobody is blamed."""
    clocks: dict[str | None, Clock] = {each.node.id: each.clock for each in found.nodes if each.clock is not None}
    if clocks and not any(each.clock and each.node.is_here for each in found.nodes):
        clocks[None] = Clock(0.0, 0.0)
    usual_s = median_low([clock.offset_s for clock in clocks.values()] or [0.0])
    off = {node: abs(clock.offset_s - usual_s) - clock.error_s for node, clock in clocks.items()}
    if clocks and 2 * sum(sure_s < SKEW_S for sure_s in off.values()) <= len(clocks):
        yield from _clocks_apart(list(clocks.values()))
        return
    for node, sure_s in off.items():
        if sure_s >= SKEW_S:
            off_s = clocks[node].offset_s - usual_s
            who = "" if node else "this machine, where the command runs, "
            what = f"{who}has a clock that is {abs(off_s):.1f} s {'ahead' if off_s > 0 else 'behind'}"
            yield Finding(what, _KEEP_TIME, node, ExitCode.ENVIRONMENT if sure_s >= SKEW_FAULT_S else ExitCode.OK)


def _clocks_apart(clocks: Sequence[Clock]) -> Iterator[Finding]:
    first_s, last_s = min(clock.offset_s + clock.error_s for clock in clocks), max(clock.offset_s - clock.error_s for clock in clocks)
    if (apart_s := last_s - first_s) >= SKEW_S:
        what = f"the clocks of {len(clocks)} machines are up to {apart_s:.1f} s apart, and most agree on none"
        yield Finding(what, _KEEP_TIME, code=ExitCode.ENVIRONMENT if apart_s >= SKEW_FAULT_S else ExitCode.OK)


def _memory(found: Measurements) -> Iterator[Finding]:
    for each in found.answering():
        need = each.node.object_store_bytes + SHM_SPARE_BYTES
        if each.facts and each.facts.shm_bytes < need:
            what = f"has {each.facts.shm_bytes / 1e6:,.0f} MB of /dev/shm; Ray's object store and loader workers want {need / 1e6:,.0f} MB"
            yield Finding(what, f"Start its container with --shm-size={need / 2**30:.1f}g, or mount /dev/shm anew.", each.node.id, ExitCode.OK)


def _ports(found: Measurements) -> Iterator[Finding]:
    for each in found.answering():
        if each.facts and each.facts.open_ports:
            what = f"answers on {', '.join(each.facts.open_ports)} to whoever reaches it, without a token: anybody there can run code on the cluster"
            remedy = "Start every node with RAY_AUTH_MODE=token and one token (`ray get-auth-token --generate`)."
            yield Finding(what, remedy, each.node.id, ExitCode.OK)


def _unsure_ports(found: Measurements) -> Iterator[Finding]:
    for each in found.answering():
        if each.facts and each.facts.unsure_ports:
            what = (
                f"has neither answered nor asked for a token on {', '.join(each.facts.unsure_ports)}: whether others can run code there is not known"
            )
            yield Finding(what, "Look again; `ray status` and the node's logs say whether Ray is well there.", each.node.id, ExitCode.OK)


def _shards(found: Measurements) -> Iterator[Finding]:
    damaged, unsure = (found.corpus.damaged, found.corpus.unsure) if found.corpus else ({}, {})
    for name, cause in damaged.items():
        remedy = "Restore the corpus from a copy or prepare it again; `maskwright verify` says what else is damaged."
        yield Finding(f"shard {name} of the corpus {cause}", remedy, code=ExitCode.DATA_CORRUPT)
    unnamed = dict[str, str]()
    for each in found.answering():
        failed = each.shards.failed if each.shards else {}
        own = {name: cause for name, cause in failed.items() if name not in damaged and name not in unsure}
        if own:
            yield Finding(f"does not see the corpus as another node does: {_first_of(own)}", _FAILED["shards"][1], each.node.id)
        else:
            unnamed |= {name: cause for name, cause in failed.items() if name in unsure}
    if unnamed:
        remedy = "Look again; `maskwright verify` says what of the corpus is damaged."
        yield Finding(f"of the corpus {_first_of(unnamed)}, as one node sees it; no other has looked", remedy)


def _first_of(shards: Mapping[str, str]) -> str:
    name, cause = next(iter(shards.items()))
    return f"{name} {cause}{f' (and {len(shards) - 1} more)' if len(shards) > 1 else ''}"


_RULES: tuple[Callable[[Measurements], Iterator[Finding]], ...] = (
    _nobody,
    _lost,
    _in_use,
    _failed,
    _versions,
    _speed,
    judge_links,
    judge_storage,
    _clocks,
    _memory,
    _ports,
    _unsure_ports,
    _shards,
)
