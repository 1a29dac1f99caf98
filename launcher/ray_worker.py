"""The seam to Ray Train: one attempt of a worker group, and how it ended (starts processes through Ray)."""

import asyncio
import logging
import os
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, get_context
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError

from data_pipeline.errors import ExitCode, InterruptedRunError, UnreachableError
from data_pipeline.storage import Location
from launcher.aside import through_outages
from launcher.attempts import read_failure
from launcher.clusters.existing import remove_placement_groups
from launcher.clusters.local import Workers
from launcher.deaths import tell_deaths
from launcher.group_watch import GroupWatch, SaveReason, describe
from launcher.health import beat_interval_s, is_numbered, longest_interval_s
from launcher.heartbeats import Polls, Rank, RayGroup, is_driver_there
from launcher.interfaces import choose_interface, interface_of
from launcher.policy import Failure, FailureKind
from launcher.rank_log import lies_on_node
from launcher.worker_process import WorkerTask, run_task
from trainer.heap import HEAP_ENVIRONMENT
from trainer.runlog import RunFolder

COLLECTIVE_TIMEOUT_S = 1800
"""A backstop behind the watch, whose deadlines are all shorter."""

BeforeEnd = Callable[[Callable[[], object]], AbstractContextManager[None]]
"""`RayOnDemand.before_end`."""


@dataclass
class WorkerGroupConfig(BackendConfig):
    """What Ray's `TorchConfig` is for, of which only the ranks import torch, and that after their environment was set."""

    threads: int
    use_gpu: bool

    @property
    def backend_cls(self) -> Any:
        return _WorkerGroupBackend

    @property
    def train_func_context(self) -> Any:
        return _on_own_device


@contextmanager
def _on_own_device() -> Generator[None]:
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield


class _WorkerGroupBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Ray waits without a limit for each rank's part in this; the watch knows of the ranks by now, and ends one that stands still in it."""
        ray.kill(worker_group.get_worker_group_state().sync_actor)  # of Ray's own collectives, which nobody calls; it wakes a hundred times a second
        worker_group.execute(_prepare_rank, backend_config.threads, backend_config.use_gpu)
        host, port = worker_group.execute_single(0, get_address_and_port)  # as late as can be: nobody keeps the port
        worker_group.execute(_join_process_group, "nccl" if backend_config.use_gpu else "gloo", host, port)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave the process group to the end of the processes, which comes next; with a dead rank, leaving it politely takes its time-out."""
        del worker_group, backend_config


def _prepare_rank(threads: int, use_gpu: bool) -> None:
    """All that takes time, or may fail on one rank, before ranks wait for each other."""
    set_worker_environment(threads, use_gpu)
    from ray.train.torch import config

    config._set_torch_distributed_env_vars()  # pyright: ignore[reportPrivateUsage]


def _join_process_group(backend: str, host: str, port: int) -> None:
    """On every rank, with Ray's own function."""
    from ray.train.torch import config

    context = get_context()
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    join = config._setup_torch_process_group  # pyright: ignore[reportPrivateUsage]
    join(backend, context.get_world_rank(), context.get_world_size(), "env://", COLLECTIVE_TIMEOUT_S)


def set_worker_environment(threads: int, use_gpu: bool) -> None:
    """Set what libraries read when they are first imported: the network interface of Ray's address, threads, DeepSpeed's device."""
    interface = interface_of(ray.util.get_node_ip_address())
    if interface:
        choose_interface(interface)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["DS_ACCELERATOR"] = "cuda" if use_gpu else "cpu"
    if not use_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves those of the machine visible
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def run_attempt(task: WorkerTask, workers: Workers, scratch: Path, watch: GroupWatch, before_end: BeforeEnd) -> Failure | None:
    """Run `task` once on a fresh worker group, watched over; None when every rank returned.

    Never retries by itself, start-up included: the policy decides, and sees every failure.

    Raises:
        InterruptedRunError: Ray is about to end.
    """
    group, run = RayGroup.here(), RunFolder(Location(task.run))
    with watch.over(group):
        error = _fit(task, workers, scratch, group, before_end)
    logs = {rank: run.rank_log(task.attempt, rank) for rank in _killed(error, watch)}
    group.keep_logs({rank: log for rank, log in logs.items() if lies_on_node(log, rank, workers.num_workers)})
    recorded = through_outages(lambda: read_failure(run, task.attempt))
    return recorded_reason(watch, recorded) if error is None else _diagnose(error, recorded, watch)


def _fit(task: WorkerTask, workers: Workers, scratch: Path, group: RayGroup, before_end: BeforeEnd) -> Exception | None:
    trainer = _Trainer(
        _on_worker,
        train_loop_config={"task": task},
        backend_config=WorkerGroupConfig(workers.threads_per_worker, workers.use_gpu),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=workers.use_gpu,
            resources_per_worker=_resources(workers),
            placement_strategy="PACK",
            label_selector={"ray.io/node-id": f"!in({','.join(workers.left_out)})"} if workers.left_out else None,
        ),
        # Ray resumes a run of the same name silently, so every attempt has its own.
        run_config=RunConfig(
            name=f"{Path(task.run).name}-{task.attempt}",
            storage_path=str(scratch / "train"),
            worker_runtime_env={} if workers.use_gpu else {"env_vars": dict(HEAP_ENVIRONMENT)},
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # what the controller finds is in what it raises
    trainer.polls, trainer.before_end = Polls(group), before_end
    ended_by: Exception | None = None
    try:
        trainer.fit()
    except asyncio.CancelledError:
        raise InterruptedRunError("the command that ran this ends", _RESUME) from None
    except (TrainingFailedError, RayError) as error:
        ended_by = error
    with suppress(UnreachableError):  # a head that is busy or restarts: what ended the attempt is the news
        remove_placement_groups()
    return ended_by


_LEFT_OUT = (DatasetsCallback, PlacementGroupCleanerCallback, StateManagerCallback)


class _Trainer(DataParallelTrainer):
    """Without processes of Ray's that a group of ours does not need and would wait for: an actor for the controller, which runs on this thread; the
    manager of Ray's datasets; the coordinator of requests to the autoscaler, which looks at placement groups in any case; their cleaner, a detached
    actor that outlives a killed driver for ever where there is no dashboard; the dashboard's record of controllers, which knows actors only."""

    polls: Polls
    before_end: BeforeEnd

    def _create_default_callbacks(self) -> list[Any]:
        """Ours first: the next one asks the ranks for something."""
        return [self.polls, *self._callbacks_of_ray()]

    def _callbacks_of_ray(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, _LEFT_OUT)]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        try:
            controller = _Controller(**{**given, "scaling_policy": _FixedSize(self.scaling_config)})
        except Exception as error:  # what it finds later it wraps itself
            raise ControllerError(error) from error
        asyncio.run(self._run(controller))
        return controller.get_result()

    async def _run(self, controller: TrainController) -> None:
        loop, running = asyncio.get_running_loop(), asyncio.ensure_future(controller.run())

        def cancel() -> None:
            with suppress(RuntimeError):  # the loop has just ended by itself
                loop.call_soon_threadsafe(running.cancel)

        with self.before_end(cancel):
            await running


class _Group(WorkerGroup):
    """Of ranks that have no actor of the controller to ask for checkpoints that were reported to Ray: none are."""

    _worker_cls = Rank

    def _init_train_context_on_workers(self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]) -> None:
        started = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[number] for name, values in train_context_args.items()},
            )
            for number, worker in enumerate(workers)
        ]
        ray.get(started)


class _Controller(TrainController):
    """Polls as often as beats are meant to come: a round begins an interval after the last one began, in which ranks rested (`Rank.poll_status`)."""

    worker_group_cls = _Group

    def __init__(self, *, train_run_context: Any, **given: Any) -> None:
        super().__init__(train_run_context=train_run_context, **given)
        self._world_size = train_run_context.scaling_config.num_workers

    async def _poll_workers(self) -> Any:
        """A round waits for ranks that do not answer no longer than a beat may take."""
        await asyncio.sleep(max(0.0, self._latest_poll_time + beat_interval_s(self._world_size) - time.monotonic()))
        self._latest_poll_time = time.monotonic()
        assert self._worker_group is not None  # Ray polls none that is not there
        return self._worker_group.poll_status(timeout=longest_interval_s(self._world_size))


class _FixedSize(FixedScalingPolicy):
    """A group of as many workers as the attempt was given, of which nobody else is told."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ray would start the coordinator here."""

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


def _on_worker(settings: dict[str, Any]) -> None:
    context = get_context()
    rank = context.get_world_rank()
    run_task(settings["task"], rank, context.get_world_size(), is_driver_there)


def _resources(workers: Workers) -> dict[str, float]:
    resources: dict[str, float] = {"CPU": workers.threads_per_worker}
    return {**resources, "GPU": 1} if workers.use_gpu else resources


_OWN_WORDS = {FailureKind.KNOWN, FailureKind.DATA, FailureKind.NUMERIC}
"""Kinds of failures that explain everything else that is seen."""


def _diagnose(error: Exception, recorded: Failure | None, watch: GroupWatch) -> Failure:
    """Name the failure: a rank's own record of a known error first, then what the watch found, dead ranks, and what else ranks recorded."""
    if recorded is not None and recorded.kind in _OWN_WORDS:
        return recorded
    if watch.verdict is not None:
        return _lost(watch, watch.verdict.rank, describe(watch.verdict, watch.members))
    if dead := _dead(error):
        words = str(dead[min(dead)])
        return replace(_lost(watch, min(dead), tell_deaths(sorted(dead), words, watch)), traceback=words)
    if recorded is not None:
        return recorded
    text = "".join(traceback.format_exception(error))
    return Failure(FailureKind.INFRASTRUCTURE, f"the worker group failed: {_last_line(_root(error))}", _RESUME, ExitCode.FAILED, traceback=text)


_RESUME = "Run `maskwright resume`."


def _lost(watch: GroupWatch, rank: int, cause: str) -> Failure:
    """A lost rank: preemption if its host was about to be taken away, else infrastructure."""
    member, pulse = watch.members.get(rank), watch.health.pulses.get(rank)
    host = member.host if member else None
    kind = FailureKind.PREEMPTION if host in watch.leaving else FailureKind.INFRASTRUCTURE
    step, phase = (pulse.beat.step, pulse.beat.phase) if pulse else (None, None)
    return Failure(kind, cause, _RESUME, ExitCode.FAILED, rank if is_numbered(rank) else None, node=host, phase=phase, step=step)


def recorded_reason(watch: GroupWatch, recorded: Failure | None) -> Failure | None:
    """What ranks that all returned have recorded, with the reason for which they were asked to save."""
    if recorded is None or recorded.kind is not FailureKind.INTERRUPTED:
        return recorded
    if watch.save_reason is SaveReason.PREEMPTION:
        cause = f"{', '.join(watch.leaving)} is taken away; {recorded.cause}"
        return replace(recorded, kind=FailureKind.PREEMPTION, cause=cause, rank=None, node=watch.leaving[0])
    return replace(recorded, kind=FailureKind.GROWTH) if watch.save_reason is SaveReason.GROWTH else recorded


def _killed(error: Exception | None, watch: GroupWatch) -> Sequence[int]:
    """Ranks whose processes ended without a word, or were ended because they stood still; not those that were ended for their sake."""
    return list(filter(is_numbered, watch.verdict.ranks)) if watch.verdict is not None else sorted(_dead(error))


def _dead(error: Exception | None) -> dict[int, Exception]:
    """What Ray says of ranks that died."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    return {rank: failure for rank, failure in failures.items() if _is_death(failure)}


def _is_death(error: Exception) -> bool:
    inner = getattr(error, "health_check_failure", error)
    return isinstance(inner, RayActorError) or "HealthCheck" in type(error).__name__


def _root(error: BaseException) -> BaseException:
    """Where Ray's controller met with it, what that came from."""
    met = getattr(error, "controller_failure", error)
    return met.__cause__ or met


def _last_line(error: BaseException) -> str:
    text = str(error).partition(" Some common causes include")[0]  # Ray's guesses, a paragraph of them
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
