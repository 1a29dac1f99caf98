"""What a plan starts from beside the configuration: a prepared corpus, the network's dimensions, an earlier run, this machine (reads local files, and
imports no torch)."""

import json
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config import TokenizerConfig
from data_pipeline.errors import ConfigError, MaskwrightError, UsageError
from data_pipeline.mixture import Mixture
from data_pipeline.storage import Location
from launcher.cluster_config import Cluster, LocalCluster
from launcher.clusters.local import resolve_workers, this_machine
from launcher.host_memory import host_bytes
from launcher.plan_corpora import find_mixture, source_errors
from launcher.plan_speed import Ranks, earlier_speed
from launcher.plan_time import Speed
from trainer.config import RunConfig
from trainer.dimensions import KNOWN, Dimensions
from trainer.gpus import GPUS, find_gpu, memory_bytes
from trainer.runlog import RunFolder
from trainer.tasks import task_errors


@dataclass(frozen=True)
class Known:
    """A value and where it comes from: `stated` in the files or on the command line, `measured`, `read` from a file, or `assumed`."""

    value: Any
    basis: str


@dataclass(frozen=True)
class Facts:
    """Everything that is not in the run's configuration."""

    mixture: Mixture | None
    corpora: tuple[str, ...]
    """Names of the prepared corpora."""
    corpora_basis: str
    """How they were found; where they were not, why."""
    vocabulary: Known
    """Tokens."""
    network: Dimensions | None
    network_basis: str
    precision: Known
    attention: Known
    """Kernel; where rows of several lengths have several, the one that takes most memory."""
    world_size: Known
    gpu: str | None
    speed: Speed | None
    free_bytes: int | None
    """On the disk of the storage; None where it is no local folder."""
    host_bytes: int | None
    """Main memory that all ranks may take on the machine where they run; None on a cluster."""
    source_errors: tuple[MaskwrightError, ...] = ()
    """What is wrong with text that this machine would prepare."""
    task_errors: tuple[MaskwrightError, ...] = ()
    """What is wrong with the tasks to fine-tune on, seen from here."""

    @property
    def gpu_bytes(self) -> int | None:
        """Memory of the GPU."""
        return None if self.gpu is None else memory_bytes(self.gpu)


def gather_facts(config: RunConfig, cluster: Cluster, *, gpu: str | None, world_size: int | None) -> Facts:
    """Look at what there is.

    Raises:
        UsageError: the GPU is not known. ConfigError: the cluster file asks for what this machine cannot give.
    """
    require_gpu(gpu)
    mixture, corpora, corpora_basis = find_mixture(config)
    vocabulary = Known(mixture.vocabulary.size, f"read from {corpora[0]}") if mixture is not None else vocabulary_size(config.tokenizer)
    network, network_basis = dimensions(config, vocabulary.value)
    precision = precision_of(config, gpu)
    is_here = isinstance(cluster, LocalCluster) and gpu is None
    storage, workers = Location.at(config.storage), _world_size(config, cluster, world_size, gpu)
    return Facts(
        mixture=mixture,
        corpora=corpora,
        corpora_basis=corpora_basis,
        vocabulary=vocabulary,
        network=network,
        network_basis=network_basis,
        precision=precision,
        attention=attention_of(config, gpu),
        world_size=workers,
        gpu=gpu,
        speed=earlier_speed(config, precision.value, network, mixture, Ranks(gpu, _threads(cluster, workers.value) if gpu is None else None)),
        free_bytes=_free_bytes(storage.path) if storage.is_local else None,
        host_bytes=host_bytes() if is_here else None,
        source_errors=tuple(source_errors(config)) if is_here and mixture is None else (),
        task_errors=tuple(task_errors(config.finetune.tasks)),
    )


def require_gpu(gpu: str | None) -> None:
    """Refuse a GPU of which too little is known.

    Raises:
        UsageError: it is not in the table, or comes in several sizes.
    """
    if gpu is None:
        return
    if find_gpu(gpu) is None:
        names = ", ".join(entry.pattern.replace(r"\b", "") for entry in GPUS)
        raise UsageError(f"--gpu {gpu}: not known", f"Known are {names}, by these names or as CUDA calls them.")
    if memory_bytes(gpu) is None:
        raise UsageError(f"--gpu {gpu} comes with several sizes of memory", f"Say which: --gpu {gpu}-SXM4-80GB, for example.")


def vocabulary_size(tokenizer: TokenizerConfig) -> Known:
    """Of the tokenizer that the run would have.

    Raises:
        ConfigError: its file is damaged.
    """
    if tokenizer.path is None:
        return Known(tokenizer.vocab_size, "stated: tokenizer.vocab_size; a small corpus may fill less")
    file = Path(tokenizer.path).expanduser() / "tokenizer.json"
    if not file.exists():
        return Known(None, f"tokenizer.path {tokenizer.path} is no folder with a tokenizer.json; hub ids are not looked up")
    with _damaged(file, "tokenizer.path"):
        stored = json.loads(file.read_bytes())
        vocabulary: Any = stored["model"].get("vocab", ())
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        return Known(1 + max([*ids, *(token["id"] for token in stored.get("added_tokens", ()))]), f"read from {file}")


def dimensions(config: RunConfig, vocab_size: int | None) -> tuple[Dimensions | None, str]:
    """The network, or None with the reason.

    Raises:
        ConfigError: `model.init_from` is not the architecture, or is damaged.
    """
    model = config.model
    if model.architecture not in KNOWN:
        return None, f"the dimensions of {model.architecture} are not known here, only those of {', '.join(KNOWN)}"
    if model.init_from is None:
        return (None, "its vocabulary is not known") if vocab_size is None else (Dimensions.of(model, vocab_size), "stated: model")
    file = Path(model.init_from).expanduser() / "config.json"
    if not file.exists():
        return None, f"model.init_from {model.init_from} is no folder with a config.json; hub ids are not looked up"
    with _damaged(file, "model.init_from"):
        stored: dict[str, Any] = dict(json.loads(file.read_bytes()))
    if stored.get("model_type") != model.architecture:
        raise ConfigError(
            f"model.init_from {model.init_from} is a {stored.get('model_type')} model; expected {model.architecture}",
            f"Set model.architecture to {stored.get('model_type')}, or choose another folder.",
        )
    with _damaged(file, "model.init_from"):
        return Dimensions.read(stored, model.dropout), f"read from {file}"


@contextmanager
def _damaged(file: Path, setting: str) -> Generator[None]:
    """Say whose file it is that cannot be understood.

    Raises:
        ConfigError: it could not.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{setting}: {file} cannot be read: {error!r}", f"Repair it, or set {setting} to another folder.") from error


def precision_of(config: RunConfig, gpu: str | None) -> Known:
    """In what the run will compute."""
    if config.precision != "auto":
        return Known(config.precision, "stated: precision")
    found, file = _choices(config, gpu)
    if "precision" in found:
        return Known(found["precision"], f"measured: {file}")
    if gpu is not None and (entry := find_gpu(gpu)) is not None:
        return Known("bf16" if "bf16" in entry.tflops else "fp32", f"auto, on {gpu}")
    return Known("fp32", "assumed: `auto` is settled by a measurement before step 1")


def attention_of(config: RunConfig, gpu: str | None) -> Known:
    """The kernel of attention: what is not settled yet is what the trainer takes unless it finds another one faster."""
    if config.model.attention != "auto":
        return Known(config.model.attention, "stated: model.attention")
    found, file = _choices(config, gpu)
    if kernels := found.get("attention"):
        takes_most = next(name for name in ("eager", "sdpa", "varlen") if name in kernels.values())
        return Known(takes_most, f"measured: {file}")
    return Known("eager" if gpu is None else "sdpa", "assumed: `auto` is settled by a measurement before step 1")


def _choices(config: RunConfig, gpu: str | None) -> tuple[dict[str, Any], str]:
    """What the run has settled before its first step on this type of device, and in which file."""
    chosen = RunFolder(Location.at(config.storage) / config.name).choices
    found = chosen.read_json() if chosen.is_local and chosen.exists() else {}
    return found if found.get("device") == ("cpu" if gpu is None else "cuda") else {}, f"{config.name}/{chosen.name}"


def _world_size(config: RunConfig, cluster: Cluster, stated: int | None, gpu: str | None) -> Known:
    if stated is not None:
        return Known(stated, "stated: --world-size")
    if cluster.num_workers != "auto":
        return Known(cluster.num_workers, "stated: num_workers of the cluster")
    if isinstance(cluster, LocalCluster) and gpu is None:
        most = max(phase.num_micro_batches for phase in config.phases)
        return Known(resolve_workers(cluster, this_machine(), most).num_workers, "this machine")
    return Known(1, "assumed: num_workers is auto; state --world-size")


def _threads(cluster: Cluster, num_ranks: int) -> int | None:
    """Of a rank on CPUs; None where the cluster's machines decide."""
    if cluster.threads_per_worker != "auto":
        return cluster.threads_per_worker
    return max(1, this_machine().num_cpus // num_ranks) if isinstance(cluster, LocalCluster) else None


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(_existing(folder))).free


def _existing(folder: Path) -> Iterator[Path]:
    return (each for each in (folder, *folder.parents) if each.is_dir())
