"""Sizes the worker group of each attempt by what a live cluster offers, and waits for it within a bound (asks the cluster, sleeps)."""

import time
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace

from data_pipeline.errors import InterruptedRunError, UnreachableError
from launcher.cluster_config import RayCluster
from launcher.clusters.local import Workers
from launcher.elastic import Node, Pace, Work, after_steps, choose_size, count_places, pays, threads_per_worker

_LOOK_S = 0.5
_SETTLE_S = 5.0
"""How long what a lost group had is given to become free; what is still taken then belongs to somebody else."""


class TooFewWorkersError(UnreachableError):
    """The cluster has no room for as many ranks as the run needs, or does not say what it has."""


@dataclass
class Sizing:
    """The sizes of the attempts of one command. Threads, device and a number left to `auto` are settled by the first."""

    config: RayCluster
    nodes: Callable[[bool], Sequence[Node]]
    """The nodes that take work now; True asks each whether it answers, which takes up to a second. Raises UnreachableError."""
    work: Callable[[], Sequence[Work]]
    """What remains of the run."""
    stopped: Callable[[], bool]
    """Whether somebody wants the run to end."""
    left_out: set[str] = field(default_factory=set[str])
    """Ids of nodes that are there and not used: what was placed on them failed."""
    _shape: tuple[int, bool] | None = None
    _settled: int | None = None
    _work: Sequence[Work] = field(default_factory=tuple)

    def workers_now(self) -> Workers:
        """The worker group of the next attempt; waits for the minimum of ranks, and for a head that does not answer.

        Raises:
            TooFewWorkersError: they have not come within `wait_s`. InterruptedRunError: the run was asked to stop meanwhile.
        """
        self._work = self.work()
        began = time.monotonic()
        while True:
            waited_s = time.monotonic() - began
            try:
                nodes = self._nodes_in_use(sure=True)
            except UnreachableError as error:
                failure = TooFewWorkersError(f"{error.cause} (waited {self.config.wait_s:g} s)", error.remedy)
            else:
                size, possible = self._size(nodes, free=True), self._size(nodes, free=False)
                if size is not None and (size == possible or waited_s >= _SETTLE_S):
                    return self._settle(size, nodes)
                failure = self._too_few(nodes)
            if self.stopped():
                raise InterruptedRunError("stopped while waiting for nodes", "Run `maskwright resume`.")
            if waited_s >= self.config.wait_s:
                raise failure
            time.sleep(_LOOK_S)

    def larger_workers(self, current: Workers, pace: Pace) -> Workers | None:
        """The worker group that is worth an interruption of `current`, whose ranks are all at work; None when there is none.

        Raises:
            UnreachableError: the head does not answer now.
        """
        if self._minimum() == self._maximum():
            return None
        size = self._size_beyond(current, self._nodes_in_use(sure=False), pace)
        if size is None or self._size_beyond(current, self._nodes_in_use(sure=True), pace) != size:
            return None
        return replace(current, num_workers=size)

    def keep_to(self, node_ids: Set[str]) -> None:
        """Leave out every other node that is there now; those that come later are other nodes."""
        with suppress(UnreachableError):  # then the next attempt finds what it finds
            self.left_out |= {node.id for node in self.nodes(False)} - node_ids

    def _nodes_in_use(self, *, sure: bool) -> Sequence[Node]:
        return [node for node in self.nodes(sure) if node.id not in self.left_out]

    def _size_beyond(self, current: Workers, nodes: Sequence[Node], pace: Pace) -> int | None:
        places = min(current.num_workers + self._places(nodes, free=True), self._places(nodes, free=False))
        work = after_steps(self._work, pace.num_steps)
        size = choose_size(places, self._minimum(), self._maximum(), work)
        return size if size is not None and pays(current.num_workers, size, work, pace) else None

    def _minimum(self) -> int:
        if self.config.min_workers is not None:
            return self.config.min_workers
        return self._settled or (1 if self.config.num_workers == "auto" else self.config.num_workers)

    def _maximum(self) -> int | None:
        if self.config.num_workers != "auto":
            return self.config.num_workers
        return None if self.config.min_workers is not None else self._settled

    def _size(self, nodes: Sequence[Node], *, free: bool) -> int | None:
        return choose_size(self._places(nodes, free=free), self._minimum(), self._maximum(), self._work)

    def _places(self, nodes: Sequence[Node], *, free: bool) -> int:
        threads, use_gpu = self._shape_for(nodes)
        return count_places(nodes, threads, use_gpu=use_gpu, free=free)

    def _shape_for(self, nodes: Sequence[Node]) -> tuple[int, bool]:
        """Threads of a rank, and whether it gets a GPU."""
        if self._shape is not None:
            return self._shape
        use_gpu = any(node.num_gpus >= 1 for node in nodes) if self.config.use_gpu == "auto" else self.config.use_gpu
        if self.config.threads_per_worker != "auto":
            return self.config.threads_per_worker, use_gpu
        wanted = None if self.config.num_workers == "auto" else self.config.num_workers
        return threads_per_worker(nodes, wanted, use_gpu=use_gpu), use_gpu

    def _settle(self, size: int, nodes: Sequence[Node]) -> Workers:
        self._shape = self._shape_for(nodes)
        self._settled = size
        return Workers(size, *self._shape, tuple(sorted(self.left_out)))

    def _too_few(self, nodes: Sequence[Node]) -> TooFewWorkersError:
        threads, use_gpu = self._shape_for(nodes)
        cpus, free_cpus = sum(node.num_cpus for node in nodes), sum(node.free_cpus for node in nodes)
        gpus, free_gpus = sum(node.num_gpus for node in nodes), sum(node.free_gpus for node in nodes)
        has = f"{len(nodes)} live nodes with {free_cpus:g} of {cpus:g} CPUs" + (f" and {free_gpus:g} of {gpus:g} GPUs" if gpus else "") + " free"
        each = f"{threads} CPU{'s' if threads > 1 else ''}" + (" and a GPU" if use_gpu else "")
        return TooFewWorkersError(
            f"the cluster at {self.config.address} has {has}: room for {self._places(nodes, free=True)} ranks of {each} each, "
            f"{self._minimum()} are needed (waited {self.config.wait_s:g} s)",
            "Add nodes, or set num_workers, min_workers or threads_per_worker to what there is, then `maskwright resume`.",
        )
