"""How doctor tells what it has found."""

import os
from pathlib import Path

import pytest

from data_pipeline.errors import EnvironmentMismatchError, ExitCode, NotFoundError, StorageUnreachableError
from data_pipeline.index import MANIFEST
from data_pipeline.storage import Location
from launcher import cli, verbs_doctor
from launcher.measurements import Measurements, NodeMeasurements, Rate
from launcher.verbs_doctor import shards_within
from tests.support.answers import require_documented
from tests.unit.launcher.test_doctor import VERSIONS, cluster, well


def doctor_says(found: Measurements, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(verbs_doctor, "_measure", lambda *_, **__: found)
    return cli.run(["doctor", *options], debug=False)


def test_a_table_findings_and_the_next_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_says(cluster(), monkeypatch) == 0
    out = capsys.readouterr().out
    assert out.count("100 GFLOP/s") == 3
    assert "all-reduce over 3 nodes: 1,000 MB/s" in out
    assert "all 3 nodes are well" in out
    assert "next: maskwright run CONFIG" in out
    assert "leave out" not in out


def test_the_verdict_names_the_dead_and_the_slow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    dead, slow = NodeMeasurements(well("b").node, lost="no answer in 65 s"), well("c", rate=Rate("cpu", 4, 2e10))
    assert doctor_says(cluster(b=dead, c=slow, links=(), all_reduce=None), monkeypatch) == ExitCode.ENVIRONMENT
    printed = capsys.readouterr()
    rows = [line for line in printed.out.splitlines() if line.startswith("host-")]
    assert [line.endswith("leave out") for line in rows] == [False, True, True]
    cause, remedy = printed.err.splitlines()
    assert cause.startswith("error: leave out host-b (10.0.0.1, b): is dead or unreachable: no answer in 65 s; host-c (10.0.0.1, c): multiplies")
    assert remedy.endswith("Then: maskwright doctor")


def test_json_has_the_same_and_is_alone_on_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    slow = well("c", rate=Rate("cpu", 4, 2e10))
    assert doctor_says(cluster(c=slow), monkeypatch, "--json") == ExitCode.ENVIRONMENT
    (record,) = require_documented("doctor", capsys.readouterr().out)
    assert (record["healthy"], record["exit_code"], record["exclude"]) == (False, 6, ["c"])
    assert [node["versions"] for node in record["nodes"]] == [VERSIONS] * 3
    assert [(finding["node"], finding["severity"]) for finding in record["findings"]] == [("c", "fault")]
    assert record["nodes"][2]["share_of_others"] == pytest.approx(0.2)
    assert record["all_reduce"] == {"nodes": 3, "bytes_per_s": 1e9, "error": None}


def test_a_corpus_that_is_not_there_or_hangs_is_told_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="holds no prepared corpus"):
        shards_within(Location.at(tmp_path), 20.0)
    os.mkfifo(tmp_path / MANIFEST)  # whose reader waits for a writer, as one of a dead mount does for its server
    with pytest.raises(StorageUnreachableError, match=r"cannot be read here: no answer within 0\.2 s"):
        shards_within(Location.at(tmp_path), 0.2)
    monkeypatch.setattr("launcher.clusters.opening.open_cluster", lambda *_: pytest.fail("a cluster was opened"))
    assert cli.run(["doctor", "--corpus", str(tmp_path / "nothing")], debug=False) == ExitCode.NOT_FOUND


def test_a_fault_of_no_node_is_told_without_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_says(cluster(versions_here={**VERSIONS, "torch": "2.11"}), monkeypatch) == EnvironmentMismatchError.exit_code
    cause, remedy = capsys.readouterr().err.splitlines()
    assert cause == "error: this machine, where the command runs, has torch 2.11 (most have 2.13.0)"
    assert "leave" not in remedy
