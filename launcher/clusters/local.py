"""The embedded cluster: Ray started by this command on this machine, for the length of the command (starts and ends processes)."""

import glob
import importlib
import logging
import os
import secrets
import signal
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from data_pipeline.errors import ConfigError, EnvironmentMismatchError
from data_pipeline.scratch import Scratch
from launcher.cluster_config import ClusterConfig, LocalCluster
from launcher.elastic import require_work
from launcher.health import FIRST_S

OBJECT_STORE_BYTES = 512 * 2**20
_LONGEST_SOCKET_FOLDER = 40
"""Ray puts `/session_<date>_<pid>/sockets/plasma_store` below its folder, and Linux cuts socket paths at 107 bytes."""

_FOLDER_PREFIX = "maskwright-ray-"

_LOOPBACK = "127.0.0.2"
"""Ray replaces 127.0.0.1 by an address that other machines can reach; the rest of the loopback network it leaves alone."""

RAY_ENVIRONMENT = {
    # Found by Ray when it starts its processes, and by its parts in this one.
    # Above every limit of our own watch, which tells a late process from a hung one and says which: Ray would only kill it.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{2 * FIRST_S:.0f}",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the driver looks for drained nodes itself; saves a process per attempt
    # Ranks write their own log into the run folder; Ray's copies of the same lines only cost time.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Workers that are started ahead of need have the wrong environment for ours; each costs a second of CPU.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}

_UNOBSERVED = {
    # Unless metrics are published, nobody collects what Ray measures here, and ranks that fill every core lose what it takes.
    "RAY_enable_metrics_collection": "false",
    "REPORTER_UPDATE_INTERVAL_MS": "600000",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "false",
    "RAY_io_context_monitor_probe_interval_ms": "60000",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "60000",
}
_UNUSED_PARTS = ("start_api_server", "start_monitor", "start_log_monitor")
"""Of Ray's node, each a process: the dashboard's server, the autoscaler, and who sends the workers' output to drivers (ours takes none)."""


@dataclass(frozen=True)
class Machine:
    """What this machine offers."""

    num_cpus: int
    num_gpus: int


@dataclass(frozen=True)
class Workers:
    """The shape of a worker group, resolved from cluster file and machine."""

    num_workers: int
    threads_per_worker: int
    use_gpu: bool
    left_out: tuple[str, ...] = ()
    """Ids of nodes that no rank is placed on."""


def this_machine() -> Machine:
    """CPUs this process may use and GPUs it may see (found without importing torch)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = len(glob.glob("/dev/nvidia[0-9]*"))
    if visible is not None:
        devices = min(devices, len([name for name in visible.split(",") if name.strip() not in {"", "-1"}]))
    return Machine(num_cpus=len(os.sched_getaffinity(0)), num_gpus=devices)


def resolve_workers(config: ClusterConfig, machine: Machine, num_micro_batches: int | None = None) -> Workers:
    """Ranks, threads and device of a worker group (pure); a step of `num_micro_batches` keeps no more ranks than that busy.

    Raises:
        ConfigError: there are fewer GPUs or micro-batches than ranks are asked for.
    """
    use_gpu = machine.num_gpus > 0 if config.use_gpu == "auto" else config.use_gpu
    by_device = machine.num_gpus if use_gpu else min(2, machine.num_cpus)
    most = by_device if num_micro_batches is None else min(by_device, num_micro_batches)
    num_workers = most if config.num_workers == "auto" else config.num_workers
    if num_micro_batches is not None:
        require_work(num_workers, num_micro_batches)
    if use_gpu and (num_workers > machine.num_gpus or num_workers < 1):
        raise ConfigError(
            f"{max(1, num_workers)} ranks need a GPU each, this machine has {machine.num_gpus}", "Lower num_workers or set use_gpu: false."
        )
    if num_workers < 1:
        raise ConfigError(f"num_workers: expected at least 1, found {num_workers}", "Set num_workers in the cluster file, or auto.")
    automatic = max(1, machine.num_cpus // num_workers)
    threads = automatic if config.threads_per_worker == "auto" else config.threads_per_worker
    if threads < 1:
        raise ConfigError(f"threads_per_worker: expected at least 1, found {threads}", "Set threads_per_worker in the cluster file, or auto.")
    return Workers(num_workers, threads, use_gpu)


@contextmanager
def local_cluster(config: LocalCluster, workers: Workers, machine: Machine) -> Generator[Path]:
    """Start Ray, yield a scratch folder that lives as long as it, and end what was started.

    Call it on the main thread: Linux ends Ray's processes when the *thread* that started them dies, which is what
    makes them go when this process is killed.

    Raises:
        EnvironmentMismatchError: Ray does not start.
    """
    scratch = session_folder()
    folder = scratch.path
    with environment({**RAY_ENVIRONMENT, **({} if config.metrics else _UNOBSERVED), **_new_token(folder)}):
        import ray

        read_token_again()
        try:
            for tries_left in (1, 0):
                try:
                    start_ray(ray, config, workers, machine, folder / f"ray{tries_left}")
                    break
                except Exception as error:  # of a part that is late Ray raises an Exception and nothing more
                    ray.shutdown()
                    if not tries_left:
                        raise EnvironmentMismatchError(
                            f"Ray did not start: {error}", "Is the disk or the memory full, or the machine overloaded?"
                        ) from error
            silence_driver(ray)
            keep_from_connecting(ray)
            yield folder
        finally:
            ray.shutdown()
            scratch.remove()


@contextmanager
def environment(values: Mapping[str, str]) -> Generator[None]:
    """Environment variables for the length of the block; what the user has set stays as it is."""
    ours = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def start_ray(ray: Any, config: LocalCluster, workers: Workers, machine: Machine, folder: Path) -> None:
    """Start Ray on this machine, with its files in `folder`."""
    folder.mkdir()
    with undisturbed(folder), _own_process_groups(), _without_unused_parts():
        ray.init(
            address="local",
            num_cpus=max(machine.num_cpus, workers.num_workers * workers.threads_per_worker),
            num_gpus=machine.num_gpus if workers.use_gpu else 0,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
            object_store_memory=config.object_store_bytes or OBJECT_STORE_BYTES,
            _node_ip_address=_LOOPBACK,
            _temp_dir=str(folder),
        )


@contextmanager
def undisturbed(folder: Path) -> Generator[None]:
    """Undo what else `ray.init` does to this process."""
    home = os.getcwd()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    # Ray puts the current folder on its workers' import path, where a user's own `trainer` folder would hide ours.
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(home)
        if on_sigterm not in {signal.SIG_DFL, None}:  # Ray's ends the process on the spot; a run that is asked to stop saves first
            signal.signal(signal.SIGTERM, on_sigterm)


@contextmanager
def _own_process_groups() -> Generator[None]:
    """Keep signals to this command's process group (a closed terminal, `kill -- -GROUP`, a batch system) from Ray: the command saves first.

    Ray calls `set_kill_on_parent_death_linux` in each process that it starts, and has no other hook there.
    """
    utils: Any = importlib.import_module("ray._private.utils")
    tie_to_parent = utils.set_kill_on_parent_death_linux

    def tie_to_parent_apart() -> None:
        os.setpgrp()
        tie_to_parent()

    with _replaced(utils, {"set_kill_on_parent_death_linux": tie_to_parent_apart}):
        yield


@contextmanager
def _without_unused_parts() -> Generator[None]:
    """`ray.init` has no switch for them. Each takes a second or two of a core to start, and half a percent of one for the length of the run."""

    def leave_out(node: Any, **given: Any) -> None:
        del node, given

    with _replaced(importlib.import_module("ray._private.node").Node, dict.fromkeys(_UNUSED_PARTS, leave_out)):
        yield


@contextmanager
def _replaced(owner: Any, attributes: Mapping[str, Any]) -> Generator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def silence_driver(ray: Any) -> None:
    """Keep Ray from printing a paragraph on stdout when a worker dies: the launcher says it in a line, and records it."""
    ray._private.worker.print_to_stdstream = lambda *_, **__: None


def keep_from_connecting(ray: Any) -> None:
    """Give a stage that asks anything of a Ray that was ended an error. By itself Ray would start another one, or end the process."""

    def refuse() -> None:
        raise ray.exceptions.RaySystemError("Ray was ended")

    hook: Any = importlib.import_module("ray._private.auto_init_hook")
    hook.ray = SimpleNamespace(is_initialized=ray.is_initialized, init=refuse)


def session_folder() -> Scratch:
    """A new folder for Ray's files."""
    base = tempfile.gettempdir()
    if len(base) + len("/maskwright-ray-1234-abcdefgh/ray1") > _LONGEST_SOCKET_FOLDER:
        base = "/tmp"
    return Scratch.make(_FOLDER_PREFIX, base)


def _new_token(folder: Path) -> dict[str, str]:
    """A token for this cluster alone: Ray's ports answer to nobody without it. Ray's own default is one file, readable by all, for ever."""
    path = folder / "token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def read_token_again() -> None:
    """Ray reads the mode at import and the token once; a process that imported it earlier, or starts a second cluster, has the wrong ones."""
    raylet: Any = importlib.import_module("ray._raylet")
    with suppress(AttributeError):  # releases of Ray before token authentication have neither
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
