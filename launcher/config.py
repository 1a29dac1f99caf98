"""Reads run.yaml and cluster YAMLs: defaults < file < `--set`, and all that is wrong in one answer (reads the file, else pure)."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import Field, TypeAdapter

from data_pipeline.config import Section
from data_pipeline.errors import ConfigError, NotFoundError
from data_pipeline.storage import Location
from launcher.cluster_config import CLUSTER_KINDS, Cluster
from launcher.config_problems import shown, validate
from trainer.config import RunConfig

STORAGE_VARIABLE = "MASKWRIGHT_STORAGE"


class _StrictLoader(yaml.SafeLoader):
    """`yaml.safe_load` that also refuses a key given twice (YAML would silently keep the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise ConfigError(f"{key.value}: given twice, the second time at line {key.start_mark.line + 1}", "Keep one of the two.")
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML without running code.

    Raises:
        ConfigError: the text is not YAML, with its line and column.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}{place}: not YAML: {getattr(error, 'problem', error)}", "Correct the file; tabs cannot indent YAML.") from error


def load_run_config(path: str | os.PathLike[str], overrides: Sequence[str] = (), storage: str | None = None) -> RunConfig:
    """The run configuration of a YAML file (a path or URL) with `--set` values applied and storage resolved.

    Storage: `storage` (the flag), else what file or `--set` say, else $MASKWRIGHT_STORAGE, else `runs`. Relative paths are
    relative to the current directory.

    Raises:
        ConfigError: everything that is wrong, at once. NotFoundError: there is no such file.
    """
    data = _apply_overrides(_read_mapping(path), overrides)
    if storage is not None:
        data["storage"] = storage
    elif "storage" not in data and STORAGE_VARIABLE in os.environ:
        data["storage"] = os.environ[STORAGE_VARIABLE]
    return validate(RunConfig, data, f"{os.fspath(path)}{' with --set' if overrides else ''}")


def override_run_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with `--set` values applied.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    return validate(RunConfig, _apply_overrides(config.model_dump(mode="json"), overrides), "--set")


def load_cluster_config(name: str) -> Cluster:
    """The cluster of a YAML file (a path or URL), or a built-in one by name.

    Raises:
        ConfigError: everything that is wrong, at once. NotFoundError: there is no such file.
    """
    path, built_in = Path(name), example_configs() / "clusters"
    if "://" in name:
        return validate_cluster(_read_mapping(name), name)
    if "/" not in name and (built_in / f"{name}.yaml").exists():
        path = built_in / f"{name}.yaml"  # whatever lies in the current folder
    elif not path.suffix and not path.exists():
        known = ", ".join(sorted(file.stem for file in built_in.glob("*.yaml")))
        raise NotFoundError(f"there is no built-in cluster {name!r}", f"Built-in clusters: {known}. Or give the path of a YAML file.")
    return validate_cluster(_read_mapping(path), str(path))


def validate_cluster(data: Mapping[str, Any], where: str) -> Cluster:
    """The cluster that `data` describes; `kind` says which keys there are, and is `local` where it is not given.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    kind = data.get("kind", "local")
    model = CLUSTER_KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise ConfigError(
            f"{where}: kind: expected {' or '.join(map(repr, CLUSTER_KINDS))}, found {shown(kind)}", "Choose a kind of cluster that there is."
        )
    return validate(model, data, where)


def example_configs() -> Path:
    """Folder of the YAML files that come with the software: beside the packages in a checkout, inside `launcher` in a wheel."""
    here = Path(__file__).parent
    packaged = here / "example_configs"
    return packaged if packaged.exists() else here.parent / "cluster_configs"


def json_schema() -> dict[str, Any]:
    """JSON schemas of run.yaml and of cluster YAMLs."""
    cluster: dict[str, Any] = TypeAdapter(Annotated[Cluster, Field(discriminator="kind")]).json_schema()
    return {"run": RunConfig.model_json_schema(), "cluster": cluster}


def dump_yaml(config: Section) -> bytes:
    """The resolved configuration, itself valid input."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode()


def _read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        text = Location(os.fspath(path)).read_bytes().decode() if "://" in os.fspath(path) else Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFoundError(f"config file {os.fspath(path)} does not exist", "Check the path; `maskwright init` copies examples.") from error
    except IsADirectoryError as error:
        raise NotFoundError(f"config file {os.fspath(path)} is a folder", "Give the path of a YAML file.") from error
    except OSError as error:
        raise NotFoundError(f"config file {os.fspath(path)} cannot be read: {error.strerror}", "Check the path and its permissions.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{os.fspath(path)} is not UTF-8 text", "Give the path of a YAML file.") from error
    data = parse_yaml(text, os.fspath(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{os.fspath(path)}: expected keys and values, found {shown(data)}", "See `maskwright init` for examples.")
    return cast(dict[str, Any], data)


def _apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            raise ConfigError(f"--set {override!r}: expected a.b=value", "For example: --set schedule.steps=1000")
        _assign(data, key.split("."), parse_yaml(value, f"--set {key}"), key)
    return data


def _assign(data: dict[str, Any], keys: list[str], value: Any, dotted: str) -> None:
    node: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        where = ".".join(keys[: depth + 1])
        if isinstance(node, list):
            items = cast(list[Any], node)
            if not key.isdigit() or int(key) >= len(items):
                raise ConfigError(f"--set {dotted}: {where} is not an index of a list of {len(items)}", "Count from 0, or set the whole list.")
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
        else:
            raise ConfigError(f"--set {dotted}: {'.'.join(keys[:depth])} holds {shown(node)}, which has no keys", "Set the whole value.")
        if last:
            node[index] = value
            return
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        node = node[index]
