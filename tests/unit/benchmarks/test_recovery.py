"""What was found of faults becomes claims and rows; the two contestants do the same work, and no two jobs share a name or a folder."""

import json
from pathlib import Path

import pytest

from benchmarks.contestants.ray_deepspeed import deepspeed_config
from benchmarks.recovery import FAULTS, Fault, Found, Outcome, claims_of
from benchmarks.table import FAULTS as TABLE
from benchmarks.table import fault_cells, render
from benchmarks.trainees import EVERY_STEPS, WORK, Ours, Peer, run_config
from launcher.config import load_run_config
from tests.support.ray_nodes import RayCluster
from trainer.config import RunConfig
from trainer.deepspeed_config import derive_deepspeed_config

_ENVIRONMENT = {"command": "python -m benchmarks.recovery", "cpu": "C", "cores": 2, "memory_gb": 8, "versions": {"python": "3.11", "torch": "2.13"}}


def _fault(key: str) -> Fault:
    return next(fault for fault in FAULTS if fault.key == key)


def _found(key: str, ours: list[Outcome], peer: list[Outcome]) -> Found:
    return {(key, "ours"): ours, (key, "peer"): peer}


def test_a_fault_may_cost_its_goal_on_top_of_the_start_up_of_the_same_jobs() -> None:
    ours = [Outcome(12.0, recovery_s, 25) for recovery_s in (20.0, 21.0, 90.0)]
    (claim,) = claims_of(_fault("rank"), _found("rank", ours, [Outcome(11.0, 30.0, 20)]), _ENVIRONMENT)
    assert (claim.ours, claim.peer, claim.goal, claim.met) == (21.0, 30.0, "≤ start-up + 10", True)
    assert claim.runs == {"ours": [20.0, 21.0, 90.0], "peer": [30.0]}
    cells = ["21 s (start-up 12 s), 25 steps again", "30 s (start-up 11 s), 20 steps again", "≤ start-up + 10 s", "yes"]
    assert fault_cells(claim.record())[1:] == cells
    slow = [Outcome(12.0, 22.1, 25)]
    assert claims_of(_fault("rank"), _found("rank", slow, slow), _ENVIRONMENT)[0].met is False


def test_a_peer_that_never_came_back_has_its_words_in_place_of_a_figure() -> None:
    ours, peer = [Outcome(12.0, 20.0, 25)], [Outcome(11.0, None, text="did not come back in 120 s")]
    (claim,) = claims_of(_fault("node"), _found("node", ours, peer), _ENVIRONMENT)
    assert (claim.peer, claim.peer_version, claim.met) == (None, "did not come back in 120 s", True)
    assert "| 20 s (start-up 12 s), 25 steps again | did not come back in 120 s | ≤ start-up + 20 s | yes |" in render({TABLE: [claim.record()]})


def test_ours_has_no_figure_where_one_round_failed() -> None:
    ours = [Outcome(12.0, 20.0, 25), Outcome(12.0, None, text="gave up after 9 s")]
    (claim,) = claims_of(_fault("rank"), _found("rank", ours, ours), _ENVIRONMENT)
    assert (claim.ours, claim.met) == (None, False)
    assert fault_cells(claim.record())[1:3] == ["gave up after 9 s", "gave up after 9 s"]


def test_a_stopped_rank_also_counts_until_it_is_named() -> None:
    ours, peer = [Outcome(12.0, 40.0, 25, named_s=11.5)], [Outcome(11.0, None, text="did not come back in 120 s")]
    until_step, until_named = claims_of(_fault("stop"), _found("stop", ours, peer), _ENVIRONMENT)
    assert (until_step.ours, until_step.met) == (40.0, True)
    assert (until_named.ours, until_named.goal, until_named.met) == (11.5, "≤ 30", True)
    assert fault_cells(until_named.record())[1:] == ["11.5 s", "names no rank", "≤ 30 s", "yes"]


def test_faults_without_a_goal_are_in_the_table_and_nowhere_else() -> None:
    ours = [Outcome(12.0, 20.0, 25)]
    (claim,) = claims_of(_fault("driver"), _found("driver", ours, ours), _ENVIRONMENT)
    table = render({TABLE: [claim.record()]})
    assert (claim.goal, claim.met) == (None, None)
    assert table.count(claim.claim) == 1
    assert "on 2 ranks, global batch 32" in table


@pytest.mark.parametrize("world_size", [1, 2])
def test_both_contestants_do_the_same_work(world_size: int, tmp_path: Path) -> None:
    config = RunConfig.model_validate(run_config("x"))
    ours, peer = derive_deepspeed_config(config, world_size), deepspeed_config(WORK, world_size)
    assert config.batch.global_batch_size == peer["train_batch_size"]
    assert config.batch.micro_batch_size == peer["train_micro_batch_size_per_gpu"]
    assert peer["train_batch_size"] == peer["train_micro_batch_size_per_gpu"] * peer["gradient_accumulation_steps"] * world_size
    assert ours["zero_optimization"]["stage"] == peer["zero_optimization"]["stage"]
    assert ("bf16" in ours) == peer["bf16"]["enabled"]
    assert (config.checkpoint.every_steps, config.precision) == (EVERY_STEPS, WORK["precision"])


def test_no_two_jobs_share_a_name_or_a_folder_and_ours_share_their_corpus(tmp_path: Path) -> None:
    cluster = RayCluster(tmp_path)
    cluster.port = 6379
    jobs = [Ours(tmp_path / "ours", name, cluster, min_workers) for name, min_workers in (("rank-1", 2), ("rank-2", 1))]
    for job in jobs:
        job.write()
        config = load_run_config(job.folder / f"{job.name}.yaml", (), None)
        assert (config.name, config.storage, config.corpus.name) == (job.name, "storage", "tiny")
    assert len({job.run for job in jobs}) == 2
    assert ["min_workers" in (job.folder / f"{job.name}-cluster.yaml").read_text() for job in jobs] == [False, True]
    peers = [Peer(tmp_path / "peer", name, cluster, 2) for name in ("rank-1", "rank-2")]
    for peer in peers:
        peer.write()
    assert len({peer.own for peer in peers}) == len({peer.log for peer in peers}) == 2
    with pytest.raises(FileExistsError):
        peers[0].write()


def test_the_peer_s_newest_checkpoint_is_the_one_that_ray_would_load(tmp_path: Path) -> None:
    peer = Peer(tmp_path, "job", RayCluster(tmp_path), 2)
    run = peer.own / "ray" / "job"
    for name in ("checkpoint_1", "checkpoint_2"):
        (run / name).mkdir(parents=True)
    assert peer.newest_checkpoint() is None
    (run / "checkpoint_manager_snapshot.json").write_text(json.dumps({"latest_checkpoint_result": {"checkpoint_dir_name": "checkpoint_1"}}))
    assert peer.newest_checkpoint() == run / "checkpoint_1"
