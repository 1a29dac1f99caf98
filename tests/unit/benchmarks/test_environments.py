"""Peers that cannot be had say so, and meet no goal."""

import sys
from pathlib import Path

import pytest

from benchmarks import environments
from benchmarks.children import Runs
from benchmarks.claims import Goal, make_claim
from benchmarks.corpora import BenchCorpus
from benchmarks.environments import PEERS, WEBDATASET, Peer, PeerUnavailableError, python_of
from benchmarks.variants import Variant, make_ready


def _silent(message: str) -> None:
    del message


def test_every_peer_is_pinned() -> None:
    for peer in PEERS:
        assert peer.label == f"{peer.distribution} {peer.version}"
        assert peer.version[0].isdigit()


def test_a_peer_without_pins_lives_in_our_environment() -> None:
    assert python_of(WEBDATASET, _silent) == sys.executable


def test_another_release_than_the_pinned_one_is_refused() -> None:
    with pytest.raises(PeerUnavailableError, match=r"webdataset 0\.0\.1 is not installed, found \d"):
        python_of(Peer("webdataset", "webdataset", "0.0.1"), _silent)


def test_a_peer_that_cannot_be_had_is_a_row_that_meets_no_goal(tmp_path: Path) -> None:
    variant = Variant(Peer("webdataset", "webdataset", "0.0.1"), "raw", "read_raw", "an old webdataset")
    ready = make_ready([variant], BenchCorpus(str(tmp_path), str(tmp_path), {}), _silent)[0]
    assert ready.problem is not None
    found = Runs(failure=ready.problem)
    claim = make_claim("read", "documents/s", {}, [1.0], found.values("documents_per_s"), found.failure, Goal("ratio", "≥", 1))
    assert claim.met is False
    assert "not installed" in str(claim.peer_version)


@pytest.mark.full
def test_an_environment_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    peer = Peer("absent", "maskwright-absent-peer", "1.0", ("maskwright-absent-pin==1.0",))
    with pytest.raises(PeerUnavailableError, match=r"maskwright-absent-peer 1\.0 cannot be installed here: .*No matching distribution"):
        python_of(peer, _silent)
    assert not (tmp_path / "peers" / "absent-1.0" / ".installed").exists()
