"""The training contestants that need processes or a process group of their own measure what they say, on a tiny network."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train_scaling
from benchmarks.children import Contestant, run_child
from benchmarks.contestants import launching
from benchmarks.training import Network, Shape, arguments
from data_pipeline.prepare import Prepared

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]
NETWORK, SHAPE = Network(1, 32, 2, vocab_size=128), Shape(samples=4, length=32)


def outcome(function: str, shape: Shape = SHAPE, **given: Any) -> dict[str, Any]:
    contestant = Contestant("ours", sys.executable, f"benchmarks.contestants.{function}", arguments(NETWORK, shape, **given), is_ours=True)
    return run_child(contestant, timeout_s=280)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_our_steps_are_counted(accumulation: int) -> None:
    counts = outcome("training:ours", precision="fp32", seconds=0.1, accumulation=accumulation)["counts"]
    assert counts["tokens"] == counts["places"] == accumulation * 4 * 32 * counts["steps"] > 0


def test_packed_rows_have_fewer_places() -> None:
    counts = outcome("training:ours", replace(SHAPE, samples=16, fill=0.3, packing="rows"), precision="fp32", seconds=0.1)["counts"]
    assert counts["tokens"] > 0.7 * counts["places"]


def test_a_pass_and_its_bare_products_take_turns() -> None:
    found = outcome("gemms:rates", precision="fp32", seconds=0.1)
    assert found["counts"]["rounds"] >= 2
    # Six linear layers of the encoder, three products each, four of attention's six (two forward, four backward), and the heads.
    assert found["counts"]["products"] == 3 * 6 + 6 + 3 * 4
    assert found["bare_flops_per_s"] > found["ours_flops_per_s"] > 0


@pytest.mark.parametrize(("world_size", "loop"), [(1, "ours"), (2, "ours"), (2, "DDP")])
def test_ranks_take_steps_together(world_size: int, loop: str) -> None:
    cores = sorted(os.sched_getaffinity(0))
    found = outcome("ranks:ranks", cores=cores, world_size=world_size, precision="fp32", accumulation=2, seconds=0.1, loop=loop)
    assert found["tokens_per_s"] == pytest.approx(world_size * 2 * 4 * 32 * found["counts"]["steps"] / found["wall_s"], rel=0.05)


def test_ranks_that_are_apart_wait_for_no_other() -> None:
    cores = sorted(os.sched_getaffinity(0))
    found = outcome("ranks:ranks", cores=cores, world_size=2, precision="fp32", accumulation=2, seconds=0.1, apart=True)
    assert found["tokens_per_s"] > 1.2 * 2 * 4 * 32 * found["counts"]["steps"] / found["wall_s"], "both count"


def test_waiting_is_spread_over_whole_windows(tiny_corpus: Prepared) -> None:
    given = {"folders": [tiny_corpus.folder.url], "weights": [1.0], "micro_batches": 2, "precision": "fp32", "seconds": 0.1}
    found = outcome("waiting:wait", replace(SHAPE, length=64, packing="rows"), **given)
    assert 0 < found["share"] == pytest.approx(found["wait_s"] / (found["wait_s"] + found["step_s"]))
    assert found["counts"]["steps"] >= 2


@pytest.mark.parametrize("function", train_scaling.LAUNCHERS.values(), ids=train_scaling.LAUNCHERS)
def test_whole_runs_are_timed_between_their_steps(tmp_path: Path, function: str) -> None:
    config = train_scaling.run_config(tmp_path, NETWORK, SHAPE, "fp32", short=True)
    corpus = train_scaling.prepare_corpus(config, tmp_path)
    given = {"cores": sorted(os.sched_getaffinity(0)), "config": config, "corpus": corpus}
    found = run_child(Contestant("ours", sys.executable, function, given, is_ours=True), timeout_s=280)
    assert found["counts"]["steps"] == config["schedule"]["steps"]
    assert found["steps_per_s"] > 0 < found["step_s"]


@pytest.mark.timeout(10)
def test_a_run_s_rate_is_that_of_what_lies_between_two_ends(tmp_path: Path) -> None:
    ends = [0.0] * launching.WARM_UP_STEPS + [9.0, 9.5, 10.0, 13.0]
    lines = [{"time": end, "step_s": 0.25} for end in ends]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert launching.measured(tmp_path) == {"steps_per_s": 2.0, "step_s": 0.25, "counts": {"steps": len(lines)}}
