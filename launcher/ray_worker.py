"""The seam to Ray Train: one attempt of a worker group, and how it ended (starts processes through Ray)."""

import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, get_context, get_preemption_info
from ray.train.torch import TorchConfig, TorchTrainer

from data_pipeline.errors import ExitCode
from data_pipeline.storage import Location
from launcher.attempts import read_failure
from launcher.clusters.local import Workers
from launcher.policy import Failure, FailureKind
from launcher.worker_process import WorkerTask, run_task
from trainer.runlog import RunFolder

COLLECTIVE_TIMEOUT_S = 600
"""A collective that takes longer has lost a rank in a way that left its connections open."""

_TorchBackend: Any = TorchConfig().backend_cls


@dataclass
class WorkerGroupConfig(TorchConfig):
    """`TorchConfig` that also prepares each worker's environment before its process group is made."""

    threads: int = 1
    use_gpu: bool = False

    @property
    def backend_cls(self) -> Any:
        return _WorkerGroupBackend


class _WorkerGroupBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(set_worker_environment, backend_config.threads, backend_config.use_gpu)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave the process group to the end of the processes, which comes next; with a dead rank, leaving it politely takes its time-out."""
        del worker_group, backend_config


def set_worker_environment(threads: int, use_gpu: bool) -> None:
    """Set what libraries read when they are first imported: the network interface of Ray's address, threads, DeepSpeed's device."""
    interface = interface_of(ray.util.get_node_ip_address())
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ["NCCL_SOCKET_IFNAME"] = interface
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["DS_ACCELERATOR"] = "cuda" if use_gpu else "cpu"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def interface_of(address: str) -> str | None:
    """Name of the network interface that carries an IPv4 address; None when none does."""
    import fcntl

    if address.startswith("127."):
        return "lo"  # the whole network 127.0.0.0/8 is the loopback's, but the interface names only 127.0.0.1
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                # SIOCGIFADDR: the IPv4 address of an interface.
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def run_attempt(task: WorkerTask, workers: Workers, scratch: Path) -> Failure | None:
    """Run `task` once on a fresh worker group; None when every rank returned.

    Never retries by itself, start-up included: the policy decides, and sees every failure.
    """
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={"task": task},
        torch_config=WorkerGroupConfig(
            backend="nccl" if workers.use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S, threads=workers.threads_per_worker, use_gpu=workers.use_gpu
        ),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers, use_gpu=workers.use_gpu, resources_per_worker=_resources(workers), placement_strategy="PACK"
        ),
        # Ray resumes a run of the same name silently, so every attempt has its own.
        run_config=RunConfig(
            name=f"{Path(task.run).name}-{task.attempt}",
            storage_path=str(scratch / "train"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    run = RunFolder(Location(task.run))
    try:
        trainer.fit()
    except TrainingFailedError as error:
        return _diagnose(error, run, task.attempt)
    except RayError as error:
        return Failure(FailureKind.INFRASTRUCTURE, f"Ray lost the worker group: {_last_line(error)}", "Run `maskwright resume`.", ExitCode.FAILED)
    return read_failure(run, task.attempt)


def _on_worker(settings: dict[str, Any]) -> None:
    context = get_context()
    run_task(settings["task"], context.get_world_rank(), context.get_world_size(), _preempted)


def _preempted() -> bool:
    return get_preemption_info() is not None


def _resources(workers: Workers) -> dict[str, float]:
    resources: dict[str, float] = {"CPU": workers.threads_per_worker}
    return {**resources, "GPU": 1} if workers.use_gpu else resources


def _diagnose(error: Exception, run: RunFolder, attempt: int) -> Failure:
    """Name the failure: a rank's own record of a known error first, then dead ranks, then what else ranks recorded."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    recorded = read_failure(run, attempt)
    dead = sorted(rank for rank, failure in failures.items() if _is_death(failure))
    if recorded is not None and recorded.kind is FailureKind.KNOWN:
        return recorded
    if dead:
        cause = f"{name_ranks(dead)} died: {_last_line(failures[dead[0]])}"
        return Failure(FailureKind.INFRASTRUCTURE, cause, "Run `maskwright resume`.", ExitCode.FAILED, dead[0])
    if recorded is not None:
        return recorded
    return Failure(FailureKind.INFRASTRUCTURE, f"the worker group failed: {_last_line(error)}", "Run `maskwright resume`.", ExitCode.FAILED)


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `rank 3, 7`, and of a whole node that was lost no more than the first few."""
    first, more = ", ".join(map(str, ranks[:8])), len(ranks) - 8
    return f"rank {first} and {more} more" if more > 0 else f"rank {first}"


def _is_death(error: Exception) -> bool:
    inner = getattr(error, "health_check_failure", error)
    return isinstance(inner, RayActorError) or "HealthCheck" in type(error).__name__


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
