"""What doctor makes of measurements: whom it names, whom it does not, and with which exit code."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ExitCode
from launcher.doctor import SKEW_FAULT_S, SKEW_S, SLOW_RATE, diagnose, slow_nodes
from launcher.lease import STALE_AFTER_S
from launcher.links import SLOW_LINK, slow_to_all, without_cuts
from launcher.measurements import (
    AllReduce,
    Clock,
    CorpusLook,
    Diagnosis,
    Facts,
    KnownNode,
    Link,
    Measurements,
    NodeMeasurements,
    Rate,
    Read,
    ShardLook,
    Written,
)
from launcher.sharing import sharing_groups
from launcher.verbs_doctor import as_record, error_of

VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def well(name: str, others: Sequence[str] = ("a", "b", "c"), **changes: Any) -> NodeMeasurements:
    """A node with which all is well."""
    measured = NodeMeasurements(
        KnownNode(name, "10.0.0.1", f"host-{name}", object_store_bytes=1e9, is_here=name == "a"),
        facts=Facts(f"machine-{name}", VERSIONS, 2 << 30),
        rate=Rate("cpu", 4, 1e11),
        clock=Clock(0.001, 0.001),
        written=Written(0.01, won=name == "a"),
        read=Read(0.001, tuple(other for other in others if other != name)),
    )
    return replace(measured, **changes)


def links(rates: Mapping[str, float | None]) -> tuple[Link, ...]:
    """`{"ab": 1e9}`; None is a cut link."""
    return tuple(Link((pair[0], pair[1]), rate, "" if rate else "connection refused") for pair, rate in rates.items())


def cluster(**changes: Any) -> Measurements:
    """Three nodes, with which all is well but for what is changed: nodes by name, else of the whole."""
    nodes = tuple(changes.pop(name, None) or well(name) for name in ("a", "b", "c"))
    whole = Measurements(nodes, VERSIONS, "/shared", links({"ab": 1e9, "bc": 1e9, "ac": 1e9}), AllReduce(3, 1e9))
    return replace(whole, **changes)


def verdict(**changes: Any) -> Diagnosis:
    return diagnose(cluster(**changes))


def test_a_cluster_that_is_well() -> None:
    assert verdict() == Diagnosis((), (), ExitCode.OK)


GONE = replace(well("b").node, gone="health check failed")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (replace(well("b"), lost="no answer in 65 s", facts=None, rate=None, written=None, read=None), "is dead or unreachable: no answer in 65 s"),
        (NodeMeasurements(GONE), "is dead: health check failed"),
        (NodeMeasurements(GONE, failed={"facts": "x"}), "is dead: health check failed"),
        (well("b", rate=Rate("cpu", 4, 0.3e11)), "multiplies matrices at 30% of the median"),
        (well("b", facts=Facts("m", {**VERSIONS, "torch": "2.12"}, 2 << 30)), "has torch 2.12 (most have 2.13.0)"),
        (well("b", facts=Facts("m", {"python": "3.11.7"}, 2 << 30)), "has torch none"),
        (well("b", failed={"facts": "ModuleNotFoundError: No module named 'launcher'"}, facts=None), "cannot run our code: ModuleNotFound"),
        (well("b", failed={"matmul": "CUDA out of memory"}, rate=None), "cannot multiply matrices: CUDA out of memory"),
        (well("b", clock=Clock(-40.0, 0.1)), "a clock that is 40.0 s behind"),
        (well("b", shards=ShardLook(2, {"c/train-0.tar": "is missing"})), "does not see the corpus as another node does: c/train-0.tar is missing"),
    ],
)
def test_one_node_is_named_and_left_out(changed: NodeMeasurements, says: str) -> None:
    found = verdict(b=changed)
    assert [fault.node for fault in found.faults] == ["b"]
    assert says in found.faults[0].what
    assert (found.excluded, found.code) == (("b",), ExitCode.ENVIRONMENT)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (well("b", clock=Clock(2.0, 0.1)), "2.0 s ahead"),
        (well("b", facts=Facts("m", VERSIONS, 64 << 20)), "has 67 MB of /dev/shm"),
        (well("b", facts=Facts("m", VERSIONS, 2 << 30, ("the head's port 6379",))), "answers on the head's port 6379 to whoever reaches it"),
        (
            well("b", facts=Facts("m", VERSIONS, 2 << 30, (), ("the head's port 6379",))),
            "neither answered nor asked for a token on the head's port 6379",
        ),
        (well("b", failed={"remove": "permission denied"}), "could not remove what /shared was tried with: permission denied"),
        (well("b", written=Written(3.0, won=False)), "takes 3.0 s to write"),
        (well("b", node=replace(well("b").node, is_leaving=True)), "about to be taken away"),
        (well("b", node=replace(well("b").node, is_busy=True), rate=Rate("cpu", 4, 1e10)), "Ray has given some of it to others"),
    ],
)
def test_a_warning_leaves_nobody_out(changed: NodeMeasurements, says: str) -> None:
    found = verdict(b=changed)
    assert says in found.findings[0].what
    assert (len(found.findings), found.findings[0].node, found.excluded, found.code) == (1, "b", (), ExitCode.OK)


def test_a_clock_is_only_as_wrong_as_the_round_trip_allows() -> None:
    assert SKEW_S < SKEW_FAULT_S < STALE_AFTER_S
    assert not verdict(b=well("b", clock=Clock(20.0, 19.5))).findings
    here_is_wrong = {name: well(name, clock=Clock(30.0, 0.01)) for name in ("b", "c")} | {"a": well("a", clock=Clock(0.0, 0.01))}
    assert [fault.node for fault in verdict(**here_is_wrong).faults] == ["a"]


def with_clocks(*offsets_s: float) -> Measurements:
    """The command runs on the first."""
    names = "abcd"[: len(offsets_s)]
    nodes = tuple(well(name, names, clock=Clock(offset_s, 0.01)) for name, offset_s in zip(names, offsets_s, strict=True))
    return Measurements(nodes, VERSIONS, "/shared")


@pytest.mark.parametrize("offsets_s", [(0.0, 40.0), (0.0, 0.0, 40.0, 40.0), (0.0, 40.0, 80.0)])
def test_where_most_clocks_agree_on_no_time_nobody_is_blamed(offsets_s: tuple[float, ...]) -> None:
    found = diagnose(with_clocks(*offsets_s))
    assert [(fault.node, "apart, and most agree on none" in fault.what) for fault in found.faults] == [(None, True)]
    assert found.excluded == ()
    assert [finding.is_fault for finding in diagnose(with_clocks(0.0, 3.0)).findings] == [False]


def test_a_clock_here_that_is_no_nodes_counts_as_one() -> None:
    nodes = tuple(replace(each, node=replace(each.node, is_here=False)) for each in with_clocks(40.0, 40.0).nodes)
    found = diagnose(Measurements(nodes, VERSIONS, "/shared"))
    assert [(fault.node, fault.what) for fault in found.faults] == [(None, "this machine, where the command runs, has a clock that is 40.0 s behind")]


OLD = {**VERSIONS, "torch": "2.11"}


def with_versions(*versions: Mapping[str, str]) -> Measurements:
    """The command runs on the first."""
    names = "abcd"[: len(versions)]
    nodes = tuple(well(name, names, facts=Facts(name, has, 2 << 30)) for name, has in zip(names, versions, strict=True))
    return Measurements(nodes, versions[0], "/shared")


def test_a_head_that_was_forgotten_at_an_upgrade_is_named_and_not_its_two_workers() -> None:
    found = diagnose(with_versions(OLD, VERSIONS, VERSIONS))
    assert {fault.node for fault in found.faults} == {None, "a"}
    assert (found.excluded, found.code) == (("a",), ExitCode.ENVIRONMENT)
    assert found.faults[0].what == "this machine, where the command runs, has torch 2.11 (most have 2.13.0)"


@pytest.mark.parametrize("versions", [(OLD, VERSIONS), (OLD, OLD, VERSIONS, VERSIONS), (OLD, VERSIONS, {**VERSIONS, "torch": "2.12"})])
def test_where_as_many_have_one_version_as_another_nobody_is_blamed(versions: tuple[Mapping[str, str], ...]) -> None:
    found = diagnose(with_versions(*versions))
    assert [fault.node for fault in found.faults] == [None]
    assert found.faults[0].what.startswith("machines differ, and no torch is what most have: 2.11 on ")
    assert (found.excluded, found.code) == ((), ExitCode.ENVIRONMENT)


def test_where_this_machine_differs_from_most_nodes_it_is_said_of_it() -> None:
    found = verdict(versions_here=OLD)
    assert found.faults[0].what == "this machine, where the command runs, has torch 2.11 (most have 2.13.0)"
    assert (found.excluded, found.code) == ((), ExitCode.ENVIRONMENT)


def test_nobody_answers() -> None:
    lost = {name: NodeMeasurements(well(name).node, lost="no answer") for name in ("a", "b", "c")}
    assert verdict(**lost, links=(), all_reduce=None).code is ExitCode.UNREACHABLE
    workers = {name: NodeMeasurements(well(name).node, lost="no answer") for name in ("b", "c")}
    driver = well("a", node=replace(well("a").node, num_cpus=0.0), rate=None)
    assert verdict(a=driver, **workers, links=(), all_reduce=None).code is ExitCode.UNREACHABLE


def test_a_cluster_all_of_which_is_taken_away_is_not_well() -> None:
    leaving = {name: NodeMeasurements(replace(well(name).node, is_leaving=True)) for name in ("a", "b", "c")}
    measured = cluster(**leaving, links=(), all_reduce=None)
    found = diagnose(measured)
    assert (found.excluded, found.code) == ((), ExitCode.UNREACHABLE)
    assert [(fault.node, fault.what.partition(":")[0]) for fault in found.faults] == [(None, "no node can be used")]
    record = as_record("ray", measured, found)
    assert (record["healthy"], record["exit_code"]) == (False, 4)


def test_of_busy_gpus_it_is_said_that_they_were_not_measured() -> None:
    busy = replace(well("b").node, is_busy=True, num_gpus=8.0)
    found = verdict(b=well("b", node=busy, rate=None), links=links({"ac": 1e9}), all_reduce=AllReduce(2, 1e9))
    assert [(it.node, it.is_fault, "was not measured" in it.what) for it in found.findings] == [("b", False, True)]


rates = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(1e9, 1e13), max_size=8)


@given(rates)
def test_the_fastest_is_never_slow_and_a_far_slower_one_always_is(flops: dict[str, float]) -> None:
    alike = {node: Rate("cpu", 1, rate) for node, rate in flops.items()}
    slow = slow_nodes(alike)
    assert all(flops[node] < SLOW_RATE * max(flops.values()) for node in slow)
    if len(flops) > 1:
        slowest = min(flops, key=lambda node: flops[node])
        others = [rate for node, rate in flops.items() if node != slowest]
        if flops[slowest] < SLOW_RATE * min(others):
            assert slowest in slow


def test_other_devices_are_not_compared() -> None:
    assert not slow_nodes({"a": Rate("H100", 0, 7e14), "b": Rate("cpu", 8, 1e11), "c": Rate("cpu", 4, 5e10)})
    assert slow_nodes({"a": Rate("H100", 0, 7e14), "b": Rate("H100", 0, 3e14)}) == {"b": pytest.approx(3 / 7)}


cuts = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda pair: pair[0] < pair[1]), unique=True).map(
    lambda pairs: [Link((str(one), str(other)), None, "cut") for one, other in pairs]
)


@given(cuts)
def test_without_those_that_are_left_out_no_link_is_cut(cut: list[Link]) -> None:
    left_out = without_cuts(cut)
    assert all(set(left_out).intersection(link.nodes) for link in cut)
    assert set(left_out) <= {node for link in cut for node in link.nodes}
    assert len(left_out) < max(2, len({node for link in cut for node in link.nodes}))


def test_a_node_that_is_slow_to_all_is_named_and_a_slow_link_is_a_warning() -> None:
    slow_b = {"ab": 1e8, "bc": 1e8, "ac": 1e9}
    assert slow_to_all(links(slow_b)) == {"b": pytest.approx(1e8 / 1e9)}
    assert verdict(links=links(slow_b)).excluded == ("b",)
    slow_link = verdict(links=links({"ab": 1e8, "bc": 1e9, "ac": 1e9}))
    assert (slow_link.excluded, slow_link.code) == ((), ExitCode.OK)
    assert "the link between host-a (10.0.0.1, a) and host-b (10.0.0.1, b) has 10%" in slow_link.findings[0].what
    assert not slow_to_all(links({"ab": 1e3}))


def test_nodes_that_share_a_machine_do_not_make_the_others_slow() -> None:
    """Two on one machine exchange by way of its memory."""
    names, rates = "abcd", {"ab": 1e10, "ac": 1.2e9, "ad": 1.2e9, "bc": 1.2e9, "bd": 1.2e9, "cd": 1.2e9}
    together = {"a": "one", "b": "one", "c": "two", "d": "three"}
    nodes = tuple(well(name, names, facts=Facts(together[name], VERSIONS, 2 << 30)) for name in names)
    found = Measurements(nodes, VERSIONS, "/shared", links(rates), AllReduce(4, 1e9))
    assert not diagnose(found).findings
    assert [node["bytes_per_s"] for node in as_record("ray", found, diagnose(found))["nodes"]] == [1.2e9] * 4
    slow_c = links(rates | {"ac": 1e8, "bc": 1e8, "cd": 1e8})
    assert diagnose(replace(found, links=slow_c)).excluded == ("c",)


def test_a_busy_node_with_slow_links_is_not_left_out() -> None:
    busy = well("b", node=replace(well("b").node, is_busy=True))
    found = verdict(b=busy, links=links({"ab": 1e8, "bc": 1e8, "ac": 1e9}))
    assert [(it.node, it.is_fault, "Ray has given some of it to others" in it.what) for it in found.findings] == [("b", False, True)]


def test_where_no_two_nodes_can_exchange_nobody_is_blamed() -> None:
    found = verdict(links=links({"ab": None, "bc": None, "ac": None}), all_reduce=None)
    assert [(fault.node, fault.code) for fault in found.faults] == [(None, ExitCode.UNREACHABLE)]
    assert "nor any of 2 other pairs: connection refused" in found.faults[0].what
    assert not found.excluded


@given(st.floats(1e6, 1e12), st.floats(SLOW_LINK, 1.0))
def test_links_of_one_rate_blame_nobody(rate: float, other: float) -> None:
    assert not verdict(links=links({"ab": rate, "bc": rate * other, "ac": rate})).findings


def test_a_node_that_cannot_exchange_is_named() -> None:
    found = verdict(links=links({"ab": None, "bc": None, "ac": 1e9}), all_reduce=AllReduce(2, 1e9))
    assert found.excluded == ("b",)
    assert "cannot exchange data with host-a (10.0.0.1, a), host-c (10.0.0.1, c): connection refused" in found.faults[0].what
    here_first = verdict(links=links({"ab": None, "bc": 1e9, "ac": 1e9}), all_reduce=AllReduce(2, 1e9))
    assert here_first.excluded == ("b",), "of two alike it is not the one where the command runs"


def test_two_nodes_that_cannot_exchange_blame_neither() -> None:
    found = diagnose(Measurements((well("a", ("a", "b")), well("b", ("a", "b"))), VERSIONS, "/shared", links({"ab": None})))
    assert (found.excluded, found.code, len(found.faults)) == ((), ExitCode.UNREACHABLE, 1)


def test_an_all_reduce_that_fails_though_pairs_do_not() -> None:
    found = verdict(all_reduce=AllReduce(3, None, "time-out"))
    assert (found.excluded, found.code) == ((), ExitCode.UNREACHABLE)
    assert "3 nodes that can exchange data in pairs cannot all together: time-out" in found.faults[0].what


def read(seen: str, unseen: str) -> Read:
    return Read(0.01, tuple(seen), tuple(unseen))


def test_a_node_with_a_storage_of_its_own_is_named() -> None:
    found = verdict(
        a=well("a", read=read("c", "b")), b=well("b", read=read("", "ac"), written=Written(0.01, won=True)), c=well("c", read=read("a", "b"))
    )
    assert [(fault.node, "not shared" in fault.what) for fault in found.faults] == [("b", True)]
    assert (found.excluded, found.code) == (("b",), ExitCode.STORAGE)


def test_a_storage_that_nobody_shares_blames_nobody() -> None:
    apart = {name: well(name, read=read("", "abc".replace(name, "")), written=Written(0.01, won=True)) for name in ("a", "b", "c")}
    found = verdict(**apart)
    assert [(fault.node, fault.code) for fault in found.faults] == [(None, ExitCode.STORAGE)]
    assert not found.excluded


def test_of_two_halves_the_one_with_the_command_counts() -> None:
    here = sharing_groups({"b": read("", "a"), "a": read("", "b")}, prefer={"a"})
    assert here == [["a"], ["b"]]


def test_a_storage_that_cannot_be_written() -> None:
    failed = {name: well(name, failed={"write": "no space left"}, written=None, read=None) for name in ("a", "b", "c")}
    found = verdict(**failed)
    assert [(fault.node, fault.what) for fault in found.faults] == [(None, "storage /shared cannot be used from any node: no space left")]
    not_asked = {**failed, "c": replace(failed["c"], facts=None, failed={"facts": "no such module"})}
    found = verdict(**not_asked)
    assert [fault.what for fault in found.faults if fault.node is None] == ["storage /shared cannot be used from any node: no space left"]
    one = verdict(b=failed["b"])
    assert (one.excluded, one.code) == (("b",), ExitCode.STORAGE)


def test_what_one_may_create_was_created_twice() -> None:
    found = verdict(b=well("b", written=Written(0.01, won=True)))
    assert (found.excluded, found.code) == ((), ExitCode.STORAGE)
    assert "2 of 3 nodes created the file that exactly one may create" in found.faults[0].what


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_node_may_be_lost_after_it_has_created_what_one_may_create(name: str) -> None:
    found = verdict(**{name: well(name, lost="no answer in 65 s")})
    assert [fault.node for fault in found.faults] == [name]


def test_a_node_that_reads_old_contents() -> None:
    found = verdict(b=well("b", read=read("a", "c")))
    assert (found.excluded, found.code) == (("b",), ExitCode.STORAGE)
    assert "has not seen in time what 1 other nodes wrote last" in found.faults[0].what


@given(st.permutations(["a", "b", "c", "d"]), st.integers(0, 2))
def test_groups_are_a_partition_and_whoever_sees_somebody_is_with_them(order: list[str], num_apart: int) -> None:
    apart = order[:num_apart]
    reads = {node: Read(0.0, () if node in apart else tuple(order[num_apart:])) for node in order}
    groups = sharing_groups(reads, prefer=set())
    assert sorted(node for group in groups for node in group) == sorted(order)
    assert set(groups[0]) == set(order[num_apart:])
    assert len(groups) == num_apart + 1


def test_a_shard_that_two_nodes_miss_is_the_corpus_fault() -> None:
    missing = {"c/train-0.tar": "is missing"}
    found = verdict(b=well("b", shards=ShardLook(2, missing)), corpus=CorpusLook("/c", 6, 6, missing))
    assert (found.excluded, found.code) == ((), ExitCode.DATA_CORRUPT)


def test_shards_that_only_one_node_has_looked_at_name_nobody() -> None:
    missing = {"c/train-0.tar": "is missing", "c/train-1.tar": "is missing"}
    found = verdict(b=well("b", shards=ShardLook(2, missing)), corpus=CorpusLook("/c", 6, 6, {}, missing))
    assert [(fault.node, fault.code) for fault in found.faults] == [(None, ExitCode.ENVIRONMENT)]
    assert "c/train-0.tar is missing (and 1 more), as one node sees it; no other has looked" in found.faults[0].what
    one_is_sure = CorpusLook("/c", 6, 6, {}, {"c/train-1.tar": "is missing"})
    found = verdict(b=well("b", shards=ShardLook(2, missing)), corpus=one_is_sure)
    assert [(fault.node, "does not see the corpus" in fault.what) for fault in found.faults] == [("b", True)]


def test_of_several_faults_the_storage_decides_the_code_and_every_node_is_named() -> None:
    apart = well("c", read=read("", "ab"), written=Written(0.01, won=True))
    a, b = well("a", read=read("b", "c")), well("b", read=read("a", "c"), rate=Rate("cpu", 4, 1e10))
    measured = cluster(a=a, b=b, c=apart)
    found = diagnose(measured)
    assert (found.excluded, found.code) == (("b", "c"), ExitCode.STORAGE)
    error = error_of(measured, found, "maskwright doctor")
    assert error.exit_code is ExitCode.STORAGE
    assert "leave out host-b (10.0.0.1, b): multiplies" in error.cause
    assert "host-c (10.0.0.1, c): sees in /shared nothing" in error.cause
    assert "ray drain-node --node-id b" in error.remedy
    assert error.remedy.endswith("maskwright doctor")
    assert "\n" not in error.cause + error.remedy
    record = as_record("ray", measured, found)
    assert (record["healthy"], record["exclude"], record["exit_code"]) == (False, ["b", "c"], 7)
    assert [node["exclude"] for node in record["nodes"]] == [False, True, True]
