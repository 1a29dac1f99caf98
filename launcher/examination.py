"""The order in which doctor looks at a cluster: part by part, each bounded in time (asks the nodes)."""

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from data_pipeline.storage import Location
from launcher import node_facts, node_storage
from launcher.assignments import doubtful_first, others_in_ring, second_looker, shard_parts, turns
from launcher.doctor import slow_nodes
from launcher.exchanges import exchange_data
from launcher.measurements import Clock, CorpusLook, KnownNode, Measurements, ShardLook
from launcher.roster import Call, Probes, Roster

Say = Callable[[str], None]

START_S = 60.0
"""For a process to start on a node, import our code and say what it is: some seconds on a healthy one."""
_CLOCK_S = 5.0
_CLOCK_TRIES = 5
_MULTIPLY_S = 90.0
"""With the import of torch, which may come over a network file system."""
_STORAGE_S = 60.0
_SHARED_S = 30.0
"""How long a node looks for what others have written, as ranks do before a run (R11)."""
_REMOVE_S = 10.0
_SHARDS_S = 120.0
_OTHERS = 64
"""Most nodes whose words a node reads back."""
_SHARDS = 2000
"""Most shards that a node looks at; of larger corpora they are evenly spaced."""
_DOUBTFUL = 50
"""Most shards that are looked at by a second node."""


@dataclass(frozen=True)
class Subject:
    """What is looked at."""

    nodes: Sequence[KnownNode]
    storage: Location
    corpus: Location | None = None
    shards: Sequence[tuple[str, int]] = ()
    """Of the corpus, see `node_storage.shards_of`."""


def examine(subject: Subject, probes: Probes, say: Say = lambda _: None) -> Measurements:
    """Measure everything, as far as nodes answer. `say` is told what is done."""
    roster = Roster(subject.nodes, probes)
    say(f"starting a process on each of {len(subject.nodes)} nodes")
    _look_around(roster)
    _compare_clocks(roster)
    say("multiplying matrices")
    _multiply(roster)
    say(f"writing to {subject.storage} and reading from it")
    _try_storage(roster, subject.storage)
    corpus = None
    if subject.corpus:
        say(f"looking at the {len(subject.shards):,} shards of {subject.corpus}")
        corpus = _look_at_corpus(roster, subject.corpus, subject.shards)
    say("exchanging data")
    links, all_reduce = exchange_data(roster)
    return Measurements(roster.all(), node_facts.software(), subject.storage.url, links, all_reduce, corpus)


def _look_around(roster: Roster) -> None:
    alive = [each.node for each in roster.all() if each.answers]
    calls = {node.id: partial(node_facts.look_around, node.ports, node.address) for node in alive}
    roster.keep("facts", roster.ask("facts", calls, START_S))


def _compare_clocks(roster: Roster) -> None:
    """One node after another, so that no answer waits behind another's."""
    for node in roster.usable():
        tries: list[Clock] = []
        while len(tries) < _CLOCK_TRIES:
            asked_at, started_at = time.time(), time.perf_counter()
            answer = roster.ask("clock", {node.id: node_facts.read_clock}, _CLOCK_S)
            if node.id not in answer:
                break
            trip_s = time.perf_counter() - started_at
            tries.append(Clock(answer[node.id] - asked_at - trip_s / 2, trip_s / 2))
        if tries:
            roster.keep("clock", {node.id: min(tries, key=lambda clock: clock.error_s)})


def _multiply(roster: Roster) -> None:
    """Something may have passed through a machine just then: who seems slow is measured once more, and its better rate counts."""
    _multiply_on(roster, [node for node in roster.usable(training=True) if not node.is_in_use])
    rates = {each.node.id: each.rate for each in roster.all() if each.rate is not None}
    _multiply_on(roster, [roster[node].node for node in slow_nodes(rates)])


def _multiply_on(roster: Roster, nodes: Iterable[KnownNode]) -> None:
    from launcher.node_rates import multiply

    machines = {node.id: facts.machine for node in nodes if (facts := roster[node.id].facts) is not None}
    for turn in turns(machines):
        known = [roster[node].node for node in turn]
        calls = {node.id: partial(multiply, max(1, int(node.num_cpus)), int(node.num_gpus)) for node in known}
        for node, rate in roster.ask("matmul", calls, _MULTIPLY_S).items():
            before = roster[node].rate
            roster.keep("rate", {node: rate if before is None or rate.flops > before.flops else before})


def _try_storage(roster: Roster, storage: Location) -> None:
    folder = (storage / f"{node_storage.TRIAL}{uuid.uuid4().hex[:8]}").url
    first = sorted(roster.usable(), key=lambda node: not node.is_here)[:1]
    roster.ask_all({node.id: partial(node_storage.make_root, storage.url) for node in first}, _STORAGE_S)
    words = {node.id: uuid.uuid4().hex for node in roster.usable()}
    try:
        written = roster.ask("write", {node: partial(node_storage.write_words, folder, node, word) for node, word in words.items()}, _STORAGE_S)
        roster.keep("written", written)
        others = {node: {other: words[other] for other in others_in_ring(list(written), node, _OTHERS)} for node in written}
        reads: dict[str, Call] = {node: partial(node_storage.read_words, folder, wanted, _SHARED_S) for node, wanted in others.items()}
        roster.keep("read", roster.ask("read", reads, _SHARED_S + _STORAGE_S))
    finally:
        for remove in (node_storage.remove_words, node_storage.assert_removed):  # at the same time, so that some fail; then it must be gone
            roster.ask("remove", {node.id: partial(remove, folder) for node in roster.usable()}, _REMOVE_S)


def _look_at_corpus(roster: Roster, corpus: Location, shards: Sequence[tuple[str, int]]) -> CorpusLook:
    """Each shard is looked at by one node; what that one finds wrong, by another, of which this machine has at least read the manifest."""
    nodes = [node.id for node in roster.usable()]
    parts = dict(zip(nodes, shard_parts(len(shards), len(nodes), _SHARDS), strict=False))
    looks = _look(roster, corpus, {node: [shards[nth] for nth in part] for node, part in parts.items()})
    roster.keep("shards", looks)
    sizes, again = dict(shards), dict[str, list[tuple[str, int]]]()
    for node, name in doubtful_first(looks, _DOUBTFUL):
        again.setdefault(second_looker(node, roster.usable()), []).append((name, sizes[name]))
    second = _look(roster, corpus, again)
    damaged = {name: cause for found in second.values() for name, cause in found.failed.items()}
    sure = {name for node in second for name, _ in again[node]}
    unsure = {name: cause for found in looks.values() for name, cause in found.failed.items() if name not in sure}
    return CorpusLook(corpus.url, len(shards), len({nth for node in looks for nth in parts[node]}), damaged, unsure)


def _look(roster: Roster, corpus: Location, parts: "dict[str, list[tuple[str, int]]]") -> dict[str, ShardLook]:
    calls = {node: partial(node_storage.look_at_shards, corpus.parent.url, part) for node, part in parts.items()}
    return roster.ask("shards", calls, _SHARDS_S)
