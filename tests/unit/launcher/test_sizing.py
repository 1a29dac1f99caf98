"""Sizes of attempts as nodes come and go; what a cluster file that cannot be honoured says."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from data_pipeline.errors import ConfigError, InterruptedRunError, UnreachableError
from launcher.cluster_config import LocalCluster, RayCluster
from launcher.clusters import sizing
from launcher.clusters.existing import live_nodes
from launcher.clusters.local import RAY_ENVIRONMENT, Machine, Workers
from launcher.clusters.opening import workers_of
from launcher.clusters.sizing import Sizing, TooFewWorkersError
from launcher.elastic import Node, Pace, Work
from launcher.health import FIRST_S, SILENCE_S

WORK = [Work(100, 8)]
PACE = Pace(age_s=92.0, first_step=0, step=10, start_up_s=2.0, paced_from=1)
"""Of an attempt whose steps take ten seconds: whatever makes them shorter pays."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_LOOK_S", 0.01)
    monkeypatch.setattr(sizing, "_SETTLE_S", 0.2)


def node(cpus: float = 1, free: float | None = None, gpus: float = 0) -> Node:
    return Node("10.0.0.1", cpus, gpus, cpus if free is None else free, gpus)


def never() -> bool:
    return False


def sizing_of(nodes: Callable[[bool], Sequence[Node]], stopped: Callable[[], bool] = never, **config: object) -> Sizing:
    settings = RayCluster.model_validate({"kind": "ray", "threads_per_worker": 1, "wait_s": 0.3, **config})
    return Sizing(settings, nodes, lambda: WORK, stopped)


class Cluster:
    """Nodes that come and go."""

    def __init__(self, *nodes: Node) -> None:
        self.nodes = nodes
        self.just_died: tuple[Node, ...] = ()

    def __call__(self, sure: bool) -> Sequence[Node]:
        return self.nodes if sure else (*self.nodes, *self.just_died)


def test_a_lost_node_shrinks_the_run_and_a_returned_one_grows_it() -> None:
    cluster = Cluster(node(), node())
    sizes = sizing_of(cluster, num_workers=2, min_workers=1)
    two, one = Workers(2, 1, False), Workers(1, 1, False)
    assert sizes.workers_now() == two
    cluster.nodes = (node(free=0), node(free=0))  # at work
    assert sizes.larger_workers(two, PACE) is None
    cluster.nodes = (node(),)
    assert sizes.workers_now() == one
    cluster.nodes = (node(free=0),)
    assert sizes.larger_workers(one, PACE) is None
    cluster.just_died = (node(),)  # Ray has not noticed yet
    assert sizes.larger_workers(one, PACE) is None
    cluster.nodes = (node(free=0), node())
    assert sizes.larger_workers(one, PACE) == two
    cluster.nodes = (node(free=0), node(), node())
    assert sizes.larger_workers(one, PACE) == two  # num_workers is the most


def test_a_group_that_is_not_placed_yet_is_not_counted_twice() -> None:
    sizes = sizing_of(Cluster(node(), node()), min_workers=1)
    assert sizes.larger_workers(sizes.workers_now(), PACE) is None


def test_growth_only_where_it_pays() -> None:
    cluster = Cluster(*[node()] * 4)
    sizes = sizing_of(cluster, min_workers=1)
    assert sizes.workers_now() == Workers(4, 1, False)
    cluster.nodes = (*[node(free=0)] * 4, node(), node(), node())
    assert sizes.larger_workers(Workers(4, 1, False), PACE) is None  # 5, 6 or 7 ranks take the two rounds that 4 take
    cluster.nodes = (*cluster.nodes, node())
    assert sizes.larger_workers(Workers(4, 1, False), PACE) == Workers(8, 1, False)


def test_growth_waits_until_an_attempt_has_worked() -> None:
    """A node that comes and goes may not keep the run in start-ups."""
    sizes = sizing_of(Cluster(node()), min_workers=1)
    one = sizes.workers_now()
    sizes.nodes = Cluster(node(free=0), node())
    assert sizes.larger_workers(one, replace(PACE, age_s=2.0 + 1.9)) is None
    assert sizes.larger_workers(one, replace(PACE, age_s=2.0 + 2.1)) == Workers(2, 1, False)


def test_a_node_that_is_left_out_is_neither_used_nor_grown_to() -> None:
    good, bad, late = (Node(f"10.0.0.{number}", 1, 0, 1, 0, name) for number, name in enumerate(("good", "bad", "late")))
    sizes = sizing_of(Cluster(good, bad), min_workers=1)
    sizes.keep_to({"good"})
    one = sizes.workers_now()
    assert one == Workers(1, 1, False, ("bad",))
    sizes.nodes = Cluster(replace(good, free_cpus=0), bad)
    assert sizes.larger_workers(one, PACE) is None
    sizes.nodes = Cluster(replace(good, free_cpus=0), bad, late)
    assert sizes.larger_workers(one, PACE) == replace(one, num_workers=2)


def test_no_growth_for_the_last_steps() -> None:
    sizes = sizing_of(Cluster(node()), min_workers=1)
    one = sizes.workers_now()
    sizes.nodes = Cluster(node(free=0), node())
    assert sizes.larger_workers(one, replace(PACE, step=90, paced_from=81)) == Workers(2, 1, False)
    assert sizes.larger_workers(one, replace(PACE, step=98, start_up_s=30.0, age_s=30.0 + 97.0)) is None
    assert sizes.larger_workers(one, Pace()) is None, "nothing is known of an attempt in set-up"


def test_without_a_minimum_the_number_stays() -> None:
    cluster = Cluster(node(), node())
    sizes = sizing_of(cluster)
    assert sizes.workers_now() == Workers(2, 1, False)
    cluster.nodes = (node(free=0), node(free=0), node(), node())
    assert sizes.larger_workers(Workers(2, 1, False), PACE) is None
    cluster.nodes = (node(),)
    with pytest.raises(TooFewWorkersError, match="room for 1 ranks of 1 CPU each, 2 are needed"):
        sizes.workers_now()


def test_what_a_lost_group_had_is_waited_for_but_not_for_ever() -> None:
    looks = 0

    def nodes(sure: bool) -> Sequence[Node]:
        nonlocal looks
        looks += 1
        return [node(), node(free=0 if looks < 5 else 1)]

    assert sizing_of(nodes, min_workers=1).workers_now().num_workers == 2
    began = time.monotonic()
    assert sizing_of(Cluster(node(), node(free=0)), min_workers=1).workers_now().num_workers == 1  # the rest is somebody else's
    assert 0.2 <= time.monotonic() - began < 2


def test_too_few_nodes_say_what_there_is_and_what_is_needed() -> None:
    began = time.monotonic()
    with pytest.raises(TooFewWorkersError) as caught:
        sizing_of(Cluster(node(4, free=3)), num_workers=2, threads_per_worker=2).workers_now()
    assert time.monotonic() - began >= 0.3
    assert "1 live nodes with 3 of 4 CPUs free: room for 1 ranks of 2 CPUs each, 2 are needed" in caught.value.cause
    with pytest.raises(TooFewWorkersError, match="0 live nodes"):
        sizing_of(Cluster(), min_workers=1).workers_now()


def test_a_head_that_restarts_is_waited_for_and_one_that_stays_away_counts_as_too_few_workers() -> None:
    looks = 0

    def nodes(sure: bool) -> Sequence[Node]:
        nonlocal looks
        looks += 1
        if looks < 5:
            raise UnreachableError("the head does not answer", "look at it")
        return [node()]

    assert sizing_of(nodes, min_workers=1).workers_now().num_workers == 1
    looks = -1_000_000
    with pytest.raises(TooFewWorkersError, match="the head does not answer"):
        sizing_of(nodes, min_workers=1).workers_now()


def test_whatever_ray_raises_says_that_the_head_does_not_answer() -> None:
    with pytest.raises(UnreachableError, match="does not answer"):  # there is none
        live_nodes(sure=True)


def test_ray_does_not_kill_what_our_own_watch_still_allows() -> None:
    assert float(RAY_ENVIRONMENT["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"]) > max(FIRST_S, *SILENCE_S.values())


def test_a_stop_ends_the_wait() -> None:
    with pytest.raises(InterruptedRunError):
        sizing_of(Cluster(), stopped=lambda: True, wait_s=600).workers_now()


def test_threads_and_device_are_settled_by_the_first_attempt() -> None:
    cluster = Cluster(node(8), node(8))
    sizes = sizing_of(cluster, threads_per_worker="auto", min_workers=1)
    assert sizes.workers_now() == Workers(2, 8, False)
    cluster.nodes = (node(8), node(16, gpus=2))
    assert sizes.workers_now() == Workers(3, 8, False)
    with_gpus = sizing_of(Cluster(node(8, gpus=2), node(8, gpus=2), node(4)), threads_per_worker="auto")
    assert with_gpus.workers_now() == Workers(4, 4, True)


def test_what_is_known_before_there_is_a_cluster() -> None:
    assert workers_of(LocalCluster(), Machine(2, 0), 8) == Workers(2, 1, False)
    assert workers_of(RayCluster(kind="ray"), Machine(2, 0), 8) is None
    with pytest.raises(ConfigError, match="exceeds the 8 micro-batches"):
        workers_of(RayCluster(kind="ray", num_workers=9), Machine(2, 0), 8)
    assert workers_of(RayCluster(kind="ray", num_workers=9, min_workers=1), Machine(2, 0), 8) is None
