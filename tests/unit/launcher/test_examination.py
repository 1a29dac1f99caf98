"""The parts of an examination on threads of this process in place of nodes: real files, real exchanges, and nodes that fail in the middle."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import ExitCode, MaskwrightError
from data_pipeline.index import MANIFEST
from data_pipeline.prepare import Prepared
from data_pipeline.storage import Location
from launcher import examination, node_rates, node_storage
from launcher.doctor import diagnose
from launcher.examination import Subject, examine
from launcher.measurements import KnownNode, Measurements, Rate
from launcher.node_facts import look_around, read_clock
from launcher.node_rates import exchange, multiply
from launcher.node_storage import look_at_shards, shards_of, write_words
from launcher.roster import Answer, Call

NODES = tuple(KnownNode(name * 8, "127.0.0.1", f"host-{name}", is_here=name == "a") for name in "abc")
A, B, C = (node.id for node in NODES)

Plan = Callable[[Call], Any]


@dataclass
class ThreadProbes:
    """`Probes` on threads. `faults` say by node and function what happens there instead; a node that is `LOST` once stays so."""

    faults: dict[tuple[str, Any], Plan] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def ask(self, calls: Mapping[str, Call], within_s: float) -> Mapping[str, Answer]:
        assert not self.lost.intersection(calls), "a node that is lost is asked again"
        with ThreadPoolExecutor(max(1, len(calls))) as threads:
            return dict(zip(calls, threads.map(partial(self._call, within_s), calls, calls.values()), strict=True))

    def _call(self, within_s: float, node: str, call: Any) -> Answer:
        function = call.func if isinstance(call, partial) else call
        self.asked.append((node, function.__name__))
        try:
            return Answer(self.faults.get((node, function), lambda it: it())(call))
        except LostError as error:
            self.lost.add(node)
            return Answer(lost=str(error))
        except (MaskwrightError, RuntimeError) as error:
            return Answer(error=str(error).splitlines()[0])


class LostError(Exception):
    """The node gives no answer."""


def lose(call: Call) -> Any:
    raise LostError("no answer in 65 s")


def steady(call: Call) -> Any:
    """The real exchange, at a rate that no load can change."""
    call()
    return 1e9


STEADY: dict[tuple[str, Any], Plan] = {
    **{(node.id, multiply): lambda call: Rate("cpu", 1, 1e11) for node in NODES},
    **{(node.id, exchange): steady for node in NODES},
}


def on_machine(name: str) -> Plan:
    return lambda call: replace(call(), machine=name)


APART: dict[tuple[str, Any], Plan] = {(node.id, look_around): on_machine(node.host) for node in NODES}
"""Nodes that share no machine."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "_SHARED_S", 1.0)  # waited out only where storage is not shared
    monkeypatch.setattr(node_rates, "SECONDS", 0.05)
    monkeypatch.setattr(node_rates, "_BYTES", {"gloo": 1 << 16})


def examined(tmp_path: Path, corpus: Location | None = None, faults: dict[tuple[str, Any], Plan] | None = None) -> tuple[Measurements, ThreadProbes]:
    """Rates are given, so that the machine's load decides nothing."""
    probes = ThreadProbes(STEADY | (faults or {}))
    (tmp_path / "runs").mkdir()
    found = examine(Subject(NODES, Location.at(tmp_path / "runs"), corpus, shards_of(corpus) if corpus else ()), probes)
    assert not list((tmp_path / "runs").iterdir()), "something is left in the storage"
    return found, probes


def shard_names(corpus: Prepared) -> list[str]:
    return [shard["name"] for shard in (corpus.folder / MANIFEST).read_json()["shards"]]


def test_all_is_well_and_everything_was_measured(tmp_path: Path, tiny_corpus: Prepared) -> None:
    found, probes = examined(tmp_path, tiny_corpus.folder)
    assert not diagnose(found).faults
    assert found.all_reduce is not None
    assert found.all_reduce.num_nodes == 3
    assert found.all_reduce.bytes_per_s
    assert {frozenset(link.nodes) for link in found.links} == {frozenset((A, B)), frozenset((B, C)), frozenset((A, C))}
    assert all(link.bytes_per_s for link in found.links)
    assert found.corpus is not None
    assert found.corpus.num_checked == found.corpus.num_shards == len(shard_names(tiny_corpus))
    for each in found.nodes:
        assert each.facts
        assert each.facts.versions == found.versions_here
        assert each.clock
        assert abs(each.clock.offset_s) <= each.clock.error_s + 0.01
        assert each.read
        assert len(each.read.seen) == 2
    assert sum(each.written.won for each in found.nodes if each.written) == 1
    assert [node for node, what in probes.asked if what == "multiply"] == [A, B, C], "one after another: they share this machine"


@pytest.mark.parametrize("function", [look_around, read_clock, multiply, write_words, pytest.param(exchange, marks=pytest.mark.full)])
def test_a_node_that_is_lost_in_any_part_is_named_and_not_asked_again(function: Any, tmp_path: Path) -> None:
    found, _ = examined(tmp_path, faults={(B, function): lose})
    diagnosis = diagnose(found)
    assert (diagnosis.excluded, diagnosis.code) == ((B,), ExitCode.ENVIRONMENT)
    assert diagnosis.faults[0].what == "is dead or unreachable: no answer in 65 s"
    assert len(diagnosis.faults) == 1


@pytest.mark.parametrize(("change", "excluded"), [({"gone": "health check failed"}, (C,)), ({"is_leaving": True}, ())])
def test_a_node_that_is_gone_or_will_be_is_not_asked(change: dict[str, Any], excluded: tuple[str, ...], tmp_path: Path) -> None:
    nodes = (*NODES[:2], replace(NODES[2], **change))
    probes = ThreadProbes(dict(STEADY), lost={C})
    diagnosis = diagnose(examine(Subject(nodes, Location.at(tmp_path)), probes))
    assert [finding.node for finding in diagnosis.findings] == [C]
    assert diagnosis.excluded == excluded


def test_a_slow_node_is_measured_twice_before_it_is_named(tmp_path: Path) -> None:
    found, probes = examined(tmp_path, faults={(B, multiply): lambda call: Rate("cpu", 1, 2e10)})
    assert diagnose(found).excluded == (B,)
    assert [node for node, what in probes.asked if what == "multiply"] == [A, B, C, B]


def test_a_node_that_was_slow_for_a_moment_is_not_named(tmp_path: Path) -> None:
    rates = [Rate("cpu", 1, 9e10), Rate("cpu", 1, 2e10)]
    found, _ = examined(tmp_path, faults={(B, multiply): lambda call: rates.pop()})
    assert not diagnose(found).faults


def test_a_node_with_a_mount_of_its_own_is_named(tmp_path: Path) -> None:
    own = tmp_path / "own"

    def elsewhere(call: Any) -> Any:
        return call.func(str(own), *call.args[1:])

    functions = (write_words, node_storage.read_words, node_storage.remove_words)
    diagnosis = diagnose(examined(tmp_path, faults={(B, function): elsewhere for function in functions})[0])
    assert (diagnosis.excluded, diagnosis.code) == ((B,), ExitCode.STORAGE)


def test_a_node_without_the_mount_is_named_and_nothing_is_made_there(tmp_path: Path) -> None:
    def elsewhere(call: Any) -> Any:
        return call.func(str(tmp_path / "not" / "mounted" / ".doctor-0"), *call.args[1:])

    functions = (write_words, node_storage.read_words, node_storage.remove_words)
    diagnosis = diagnose(examined(tmp_path, faults={(B, function): elsewhere for function in functions})[0])
    assert (diagnosis.excluded, diagnosis.code) == ((B,), ExitCode.STORAGE)
    assert "there is no folder" in diagnosis.faults[0].what
    assert not (tmp_path / "not").exists()


def test_a_storage_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    probes = ThreadProbes(dict(STEADY))
    diagnosis = diagnose(examine(Subject(NODES, Location.at(tmp_path / "file")), probes))
    assert (diagnosis.excluded, diagnosis.code) == ((), ExitCode.STORAGE)


@pytest.mark.full
def test_a_node_whose_link_is_cut_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.exchanges._LINK_S", 12.0)  # its partners wait for half of it

    def cut(call: Any) -> Any:
        raise RuntimeError("connection refused")

    found, _ = examined(tmp_path, faults={(C, exchange): cut})
    diagnosis = diagnose(found)
    assert (diagnosis.excluded, diagnosis.code) == ((C,), ExitCode.ENVIRONMENT)
    assert "cannot exchange data with" in diagnosis.faults[0].what
    assert found.all_reduce is not None
    assert (found.all_reduce.num_nodes, found.all_reduce.error) == (2, "")


def test_a_slow_link_is_tried_twice_before_its_node_is_named(tmp_path: Path) -> None:
    def slow(call: Call) -> Any:
        call()
        return 1e7

    found, _ = examined(tmp_path, faults={**APART, (C, exchange): slow})
    assert diagnose(found).excluded == (C,)
    rates = [1e7, 1e7, 1e9, 1e9]  # of two links, and of the same again
    (tmp_path / "runs").rmdir()
    found, _ = examined(tmp_path, faults={**APART, (C, exchange): lambda call: (call(), rates.pop(0) if rates else 1e9)[1]})
    assert not diagnose(found).faults


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_node_whose_gpus_are_dead_is_named_for_that_alone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Ray gives 2 GPUs there, of which torch sees none"):
        multiply(1, 2)

    def dead(call: Any) -> Any:
        return multiply(1, 2)

    found, probes = examined(tmp_path, faults={(B, multiply): dead})
    assert [fault.what.partition(":")[0] for fault in diagnose(found).faults] == ["cannot multiply matrices"]
    assert diagnose(found).excluded == (B,)
    assert (B, "exchange") not in probes.asked


def test_gpus_that_others_use_are_left_alone(tmp_path: Path) -> None:
    probes = ThreadProbes(dict(STEADY))
    found = examine(Subject((*NODES[:2], replace(NODES[2], is_busy=True, num_gpus=8.0)), Location.at(tmp_path)), probes)
    assert not diagnose(found).faults
    assert {node for node, what in probes.asked if what in ("multiply", "exchange")} == {A, B}


def test_a_node_that_is_lost_in_the_common_all_reduce_is_named_once(tmp_path: Path) -> None:
    def lost_at_last(call: Any) -> Any:
        return lose(call) if call.args[0].size == 3 else steady(call)

    def short(call: Any) -> Any:
        if call.args[0].size == 3:
            raise RuntimeError("connection closed by peer")
        return steady(call)

    found, _ = examined(tmp_path, faults={(A, exchange): short, (B, exchange): lost_at_last, (C, exchange): short})
    diagnosis = diagnose(found)
    assert [fault.node for fault in diagnosis.faults] == [B]
    assert (diagnosis.excluded, diagnosis.code) == ((B,), ExitCode.ENVIRONMENT)


def test_what_an_exchange_measures() -> None:
    store = node_rates.open_store("127.0.0.1")
    meeting = node_rates.Meeting("127.0.0.1", store.port, "all", 3, "gloo", 20.0)
    with ThreadPoolExecutor(3) as threads:
        rates = list(threads.map(lambda rank: exchange(meeting, rank, "127.0.0.1"), range(3)))
    assert all(1e5 < rate < 1e12 for rate in rates)


def test_whom_nobody_meets_is_told_so_in_time() -> None:
    store = node_rates.open_store("127.0.0.1")
    started_at = time.monotonic()
    with pytest.raises(RuntimeError):
        exchange(node_rates.Meeting("127.0.0.1", store.port, "alone", 2, "gloo", 1.0), 0, "127.0.0.1")
    assert time.monotonic() - started_at < 20


def test_a_clock_that_is_wrong(tmp_path: Path) -> None:
    found, _ = examined(tmp_path, faults={(C, read_clock): lambda call: time.time() + 20})
    assert diagnose(found).excluded == (C,)


def copy_of(corpus: Prepared, tmp_path: Path) -> Location:
    shutil.copytree(corpus.folder.path, tmp_path / corpus.folder.name)
    return Location.at(tmp_path / corpus.folder.name)


def test_a_shard_that_is_cut_is_damage_whoever_looks(tmp_path: Path, tiny_corpus: Prepared) -> None:
    corpus = copy_of(tiny_corpus, tmp_path)
    shard = corpus.path / shard_names(tiny_corpus)[0]
    os.truncate(shard, shard.stat().st_size - 1)
    found, _ = examined(tmp_path, corpus)
    diagnosis = diagnose(found)
    assert (diagnosis.excluded, diagnosis.code) == ((), ExitCode.DATA_CORRUPT)
    assert "is shorter than the" in diagnosis.faults[0].what


def test_a_node_that_does_not_see_the_corpus_is_named(tmp_path: Path, tiny_corpus: Prepared) -> None:
    def elsewhere(call: Any) -> Any:
        return call.func(str(tmp_path / "nothing"), *call.args[1:])

    diagnosis = diagnose(examined(tmp_path, tiny_corpus.folder, faults={(B, look_at_shards): elsewhere})[0])
    assert (diagnosis.excluded, diagnosis.code) == ((B,), ExitCode.ENVIRONMENT)
    assert "is missing" in diagnosis.faults[0].what


def test_two_nodes_that_do_not_see_the_corpus_do_not_make_it_damaged(tmp_path: Path, tiny_corpus: Prepared) -> None:
    def elsewhere(call: Any) -> Any:
        return call.func(str(tmp_path / "nothing"), *call.args[1:])

    faults: dict[tuple[str, Any], Plan] = {(node, look_at_shards): elsewhere for node in (B, C)}
    diagnosis = diagnose(examined(tmp_path, tiny_corpus.folder, faults=faults)[0])
    assert (diagnosis.excluded, diagnosis.code) == ((B, C), ExitCode.ENVIRONMENT)


def test_where_the_second_look_is_lost_nobody_is_blamed_for_the_first(tmp_path: Path, tiny_corpus: Prepared) -> None:
    looked: list[Any] = []

    def once(call: Any) -> Any:
        looked.append(call)
        return call() if len(looked) == 1 else lose(call)

    def elsewhere(call: Any) -> Any:
        return call.func(str(tmp_path / "nothing"), *call.args[1:])

    found, _ = examined(tmp_path, tiny_corpus.folder, faults={(A, look_at_shards): once, (B, look_at_shards): elsewhere})
    diagnosis = diagnose(found)
    assert {fault.node for fault in diagnosis.faults} == {A, None}
    assert diagnosis.excluded == (A,)
