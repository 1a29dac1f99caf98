"""Finds runs in storage by id, folder or URL, and reads their configuration (reads storage)."""

import difflib
import os
from dataclasses import dataclass
from typing import Any, cast

from data_pipeline.errors import ConfigError, NotFoundError
from data_pipeline.storage import Location
from launcher.cluster_config import Cluster
from launcher.config import STORAGE_VARIABLE, parse_yaml, validate_cluster
from launcher.config_problems import validate
from trainer.config import RunConfig
from trainer.runlog import RunFolder

DEFAULT_STORAGE = "runs"


def resolve_storage(storage: str | None) -> Location:
    """`--storage`, else $MASKWRIGHT_STORAGE, else `./runs`."""
    return Location.at(storage or os.environ.get(STORAGE_VARIABLE) or DEFAULT_STORAGE)


def run_ids(storage: Location) -> list[str]:
    """Ids of all runs in a storage, sorted."""
    return [name for name in storage.children() if name != "corpora" and (storage / name / "run.yaml").exists()]


def find_run(run: str, storage: str | None) -> RunFolder:
    """The run folder of an id (looked for in storage), of a folder, or of a URL.

    Raises:
        NotFoundError: there is no such run; names the nearest ids.
    """
    root = resolve_storage(storage)
    candidates = [Location.at(run)] if "/" in run or run in {".", ".."} else [root / run, Location.at(run)]
    for candidate in candidates:
        if (candidate / "run.yaml").exists():
            return RunFolder(candidate)
    known = run_ids(root)
    near = difflib.get_close_matches(run, known, n=3, cutoff=0.5) or known[:5]
    remedy = f"Runs there: {', '.join(near)}." if near else "Start one with `maskwright run CONFIG`, or give --storage."
    raise NotFoundError(f"there is no run {run!r} in {root}", remedy)


def reference(run: RunFolder) -> str:
    """What names a run on the command line here: its id, or its folder where the id alone would be looked for elsewhere."""
    return run.root.name if run.root.parent == resolve_storage(None) else run.root.url


def read_config(run: RunFolder) -> RunConfig:
    """The run's resolved configuration, with the storage it was found in.

    Raises:
        ConfigError: run.yaml was edited into something invalid. NotFoundError: it is gone.
    """
    data = parse_yaml(run.config.read_bytes().decode(), str(run.config))
    if not isinstance(data, dict):
        raise ConfigError(f"{run.config} holds no configuration", "Restore it, or start a new run under another name.")
    return validate(RunConfig, {**data, "storage": run.root.parent.url, "name": run.root.name}, str(run.config))


def cluster_file(run: RunFolder) -> Location:
    """Where a run keeps the cluster it was last run on."""
    return run.root / "cluster.yaml"


def read_cluster(run: RunFolder) -> Cluster | None:
    """The cluster that the run was last run on; None when it never was."""
    file = cluster_file(run)
    if not file.exists():
        return None
    data = parse_yaml(file.read_bytes().decode(), str(file))
    if not isinstance(data, dict):
        raise ConfigError(f"{file} describes no cluster", "Give --cluster, or remove the file.")
    return validate_cluster(cast(dict[str, Any], data), str(file))


@dataclass(frozen=True)
class Model:
    """An exported model: a Hugging Face folder."""

    folder: Location


def find_run_or_model(name: str, storage: str | None) -> RunFolder | Model:
    """A run, or the folder of a model.

    Raises:
        NotFoundError: it is neither.
    """
    folder = Location.at(name)
    if (folder / "config.json").exists() and (folder / "model.safetensors").exists():
        return Model(folder)
    return find_run(name, storage)
