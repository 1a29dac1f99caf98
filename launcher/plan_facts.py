"""What a plan starts from beside the configuration: a prepared corpus, the network's dimensions, an earlier run, this machine (reads local files, and
imports no torch)."""

import json
import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.errors import ConfigError, MaskwrightError, NotFoundError, UsageError
from data_pipeline.index import MANIFEST, CorpusIndex
from data_pipeline.mixture import Mixture
from data_pipeline.sources import source_names
from data_pipeline.storage import Location
from launcher.cluster_config import Cluster, LocalCluster
from launcher.clusters.local import resolve_workers, this_machine
from launcher.plan_speed import Ranks, earlier_speed
from launcher.plan_time import Speed
from trainer.config import RunConfig
from trainer.dimensions import KNOWN, Dimensions
from trainer.gpus import GPUS, find_gpu, memory_bytes
from trainer.runlog import RunFolder


@dataclass(frozen=True)
class Known:
    """A value and where it comes from: `stated` in the files or on the command line, `measured`, `read` from a file, or `assumed`."""

    value: Any
    basis: str


@dataclass(frozen=True)
class Facts:
    """Everything that is not in the run's configuration."""

    mixture: Mixture | None
    corpus: Known
    """Name of the prepared corpus, None with the reason."""
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
    """Main memory of the machine where all ranks run; None on a cluster."""

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
    mixture, corpus = find_mixture(config)
    vocabulary = Known(mixture.vocabulary.size, f"read from {corpus.value}") if mixture is not None else vocabulary_size(config.tokenizer)
    network, network_basis = dimensions(config, vocabulary.value)
    precision = precision_of(config, gpu)
    storage, workers = Location.at(config.storage), _world_size(config, cluster, world_size, gpu)
    return Facts(
        mixture=mixture,
        corpus=corpus,
        vocabulary=vocabulary,
        network=network,
        network_basis=network_basis,
        precision=precision,
        attention=attention_of(config, gpu),
        world_size=workers,
        gpu=gpu,
        speed=earlier_speed(config, precision.value, network, mixture, Ranks(gpu, _threads(cluster, workers.value) if gpu is None else None)),
        free_bytes=_free_bytes(storage.path) if storage.is_local else None,
        host_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if isinstance(cluster, LocalCluster) and gpu is None else None,
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


def find_mixture(config: RunConfig) -> tuple[Mixture | None, Known]:
    """The prepared corpora of a configuration, by their settings: text is not read again to see whether it has changed."""
    if not Location.at(config.corpora_storage).is_local:
        return None, Known(None, "the storage of the corpora is not on this machine")
    parts = [part.corpus for part in config.mixture] or [config.corpus]
    try:
        folders = [_find_corpus(config, part) for part in parts]
        mixture = Mixture.join([CorpusIndex.open(folder, config.data) for folder in folders], [part.weight for part in config.mixture] or [1.0])
    except MaskwrightError as error:
        return None, Known(None, error.cause)
    return mixture, Known(" + ".join(folder.name for folder in folders), "found by its settings; sources are not compared")


def _find_corpus(config: RunConfig, corpus: CorpusConfig) -> Location:
    """The newest corpus with these settings.

    Raises:
        NotFoundError: there is none.
    """
    folder = Location.at(config.corpora_storage) / "corpora"
    found = [folder / name for name in folder.children() if name.startswith(f"{corpus.label}-") and _fits(folder / name / MANIFEST, config, corpus)]
    if not found:
        raise NotFoundError(f"corpus {corpus.label} is not prepared in {folder.parent}", "Run `maskwright prepare CONFIG`.")
    return max(found, key=lambda each: (each / MANIFEST).path.stat().st_mtime)


def _fits(manifest: Location, config: RunConfig, corpus: CorpusConfig) -> bool:
    try:
        stored: dict[str, Any] = json.loads(manifest.read_bytes())
        settings, names = dict(stored["config"]["corpus"]), [source["name"] for source in stored["sources"]]
        settings.pop("removed_test_texts", None)  # older manifests have none
    except (NotFoundError, ValueError, KeyError, TypeError):
        return False
    wanted = {**corpus.model_dump(mode="json", exclude={"source", "name", "contamination"}), "personal_data": sorted(set(corpus.personal_data))}
    tokenizer = stored["config"]["tokenizer"]
    trains = config.tokenizer.path is None and not (config.mixture and corpus != config.mixture[0].corpus)
    return (
        settings == wanted
        and names == [Location.at(name).name if name != "python-docs" else name for name in source_names(corpus)]
        and stored["sequence_lengths"] == list(config.batch.sequence_lengths)
        and (tokenizer == config.tokenizer.model_dump(exclude={"path"}) if trains else "digest" in tokenizer)
    )


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
        return Known("eager" if "eager" in kernels.values() else "sdpa", f"measured: {file}")
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
