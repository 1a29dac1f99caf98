"""Reads run.yaml and cluster YAMLs: defaults < file < `--set`, and all that is wrong in one answer (reads the file, else pure)."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from data_pipeline.config import Section
from data_pipeline.errors import ConfigError, NotFoundError
from data_pipeline.storage import Location
from trainer.config import RunConfig

S = TypeVar("S", bound=Section)
Path_ = tuple[str | int, ...]

STORAGE_VARIABLE = "MASKWRIGHT_STORAGE"


class ClusterConfig(Section):
    """What every kind of cluster has: *where* to train. Machines and budgets only; nothing here changes the model."""

    num_workers: int | Literal["auto"] = Field(default="auto")
    """Ranks. `auto`: one per GPU; without GPUs two on this machine (one where there is a single CPU), on a cluster one per node."""
    threads_per_worker: int | Literal["auto"] = Field(default="auto")
    """CPU threads of a rank. `auto`: CPUs divided by ranks. Part of what must not change for bit-exact resumes."""
    use_gpu: bool | Literal["auto"] = "auto"
    """Whether ranks get a GPU each. `auto`: when there is one."""
    max_failures: int = Field(default=3, ge=0)
    """Infrastructure failures (a worker killed, lost, stopped or hung) in 24 hours that are retried; one more ends the run with exit code 11."""
    max_preemptions: int = Field(default=50, ge=0)
    """Nodes taken away as announced (spot instances) in 24 hours that are followed by another attempt; one more ends the run with exit code 75."""


class LocalCluster(ClusterConfig):
    """The whole of a cluster YAML of kind `local`."""

    kind: Literal["local"] = "local"
    """`local`: Ray started by the command itself, on this machine, for the length of the command."""
    object_store_bytes: int | None = Field(default=None, ge=80_000_000)
    """Shared memory for Ray's object store; null means 512 MB, which only `prepare` uses."""


class SharedVenv(Section):
    """Software that lies in a virtual environment, on every node at one path."""

    venv: str = Field(pattern=r"^/[\w./+-]+$")
    """Its folder. It has the cluster's releases of Python and Ray."""

    @property
    def python(self) -> str:
        """Its interpreter."""
        return f"{self.venv.rstrip('/')}/bin/python"


DASHBOARD = r"^https?://([^\s:/@?#]+|\[[0-9a-fA-F:]+\])(:\d+)?/?$"
"""Addresses without anything that would lead elsewhere, or is secret."""


class RayCluster(ClusterConfig):
    """The whole of a cluster YAML of kind `ray`."""

    kind: Literal["ray"]
    """`ray`: a Ray cluster that is there already. `run` drives it from one of its machines, `submit` from anywhere. It is never shut down."""
    address: str = Field(default="auto", pattern=r"^(auto|[^\s:/]+:\d+|\[[0-9a-fA-F:]+\]:\d+)$")
    """`host:port` of the cluster's head, or `auto`: the cluster that runs on the machine of the driver."""
    dashboard: str | None = Field(default=None, pattern=DASHBOARD)
    """Address of the dashboard, such as `http://head:8265`, through which `submit` hands a run over to the cluster. Null: only `run` works."""
    environment: SharedVenv | None = None
    """Where ranks, and the driver of a submitted run, find their libraries. Null: ranks where Ray does, that driver in the PATH of the head."""
    min_workers: int | None = Field(default=None, ge=1)
    """Elastic: with fewer than `num_workers` ranks the run goes on, down to so many, and grows again where it pays. Null: it waits for all."""
    wait_s: float = Field(default=300.0, ge=0.0)
    """Seconds that an attempt waits for nodes enough before it counts as an infrastructure failure."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.min_workers is not None and self.num_workers != "auto" and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} exceeds num_workers {self.num_workers}")
        return self


Cluster = LocalCluster | RayCluster
_CLUSTERS: dict[str, type[Cluster]] = {"local": LocalCluster, "ray": RayCluster}


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
    return validate(RunConfig, data, os.fspath(path))


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
    model = _CLUSTERS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise ConfigError(
            f"{where}: kind: expected {' or '.join(map(repr, _CLUSTERS))}, found {_shown(kind)}", "Choose a kind of cluster that there is."
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


def validate(model: type[S], data: Mapping[str, Any], where: str) -> S:
    """Build `model` from `data`.

    Raises:
        ConfigError: one line for each problem: dotted path, what was expected, what was found, nearest valid name.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = list(dict.fromkeys(_problems(model, data, error)))
        noun = "problem" if len(lines) == 1 else "problems"
        cause = f"{where}: {len(lines)} {noun}\n" + "\n".join(f"  {line}" for line in lines) if len(lines) > 1 else f"{where}: {lines[0]}"
        raise ConfigError(cause, "Correct the file or the --set; `maskwright schema` lists every key.") from error


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
        raise ConfigError(f"{os.fspath(path)}: expected keys and values, found {_shown(data)}", "See `maskwright init` for examples.")
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
            raise ConfigError(f"--set {dotted}: {'.'.join(keys[:depth])} holds {_shown(node)}, which has no keys", "Set the whole value.")
        if last:
            node[index] = value
            return
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        node = node[index]


def _problems(model: type[Section], data: Any, error: ValidationError) -> Iterator[str]:
    """One line for each path: a union reports once for each of its members, which here become one line."""
    expected: dict[Path_, list[str]] = {}
    found: dict[Path_, Any] = {}
    for item in error.errors(include_url=False):
        path, value = _navigate(data, item["loc"])
        kind = item["type"]
        dotted = ".".join(str(part) for part in path)
        if kind == "extra_forbidden":
            yield f"{dotted}: unknown key{_nearest(model, path)}"
        elif kind == "missing":
            yield f"{'.'.join(str(part) for part in item['loc'])}: required, not given"
        elif kind == "value_error":
            yield f"{dotted + ': ' if dotted else ''}{str(item['msg']).removeprefix('Value error, ')}"
        else:
            expected.setdefault(path, []).append(_expectation(str(item["msg"])))
            found[path] = value
    for path, wanted in expected.items():
        yield f"{'.'.join(str(part) for part in path)}: expected {' or '.join(dict.fromkeys(wanted))}, found {_shown(found[path])}"


def _navigate(data: Any, location: tuple[str | int, ...]) -> tuple[Path_, Any]:
    """The part of `location` that names something in `data` (the rest are pydantic's names of union members), and its value."""
    path: list[str | int] = []
    for part in location:
        if isinstance(data, dict) and part in data:
            data = cast(dict[Any, Any], data)[part]
        elif isinstance(data, list | tuple) and isinstance(part, int) and part < len(cast(Sequence[Any], data)):
            data = cast(Sequence[Any], data)[part]
        else:
            break
        path.append(part)
    return tuple(path), data


def _expectation(message: str) -> str:
    message = re.sub(r"^(Input should be|String should|Value should)\s*", "", message)
    message = re.sub(r"^a valid (\w+)(, unable to parse.*| with a fractional.*)?$", r"\1", message)
    message = re.sub(r"^a valid dictionary or instance of .*$", "keys and values", message)
    return {"integer": "a whole number", "number": "a number", "string": "text", "tuple": "a list", "boolean": "true or false"}.get(message, message)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({_KINDS.get(type(value), type(value).__name__)})"


_KINDS: dict[type, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true/false",
    list: "list",
    dict: "mapping",
    type(None): "nothing",
}


def _nearest(model: type[Section], path: Path_) -> str:
    """`; nearest: …` for an unknown key: a sibling that is spelled alike, else a key of that name somewhere else."""
    *parents, key = path
    siblings = _fields_at(model, parents)
    close = difflib.get_close_matches(str(key), siblings, n=1, cutoff=0.6)
    if close:
        return f"; nearest: {'.'.join([*map(str, parents), close[0]])}"
    elsewhere = [dotted for dotted in dotted_names(model) if dotted.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f"; nearest: {elsewhere[0]}"
    return f"; valid here: {', '.join(siblings)}" if siblings else ""


def _fields_at(model: type[Section], parents: Sequence[str | int]) -> list[str]:
    current: type[Section] | None = model
    for part in parents:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if current else None
        current = _section_of(field.annotation) if field else None
    return list(current.model_fields) if current else []


def _section_of(annotation: Any) -> type[Section] | None:
    """The Section inside an annotation such as `tuple[TaskConfig, ...]` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in {tuple, list, Union, UnionType}:
        return next((section for argument in get_args(annotation) if (section := _section_of(argument))), None)
    return None


def dotted_names(model: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key of a configuration as a dotted path."""
    for name, field in model.model_fields.items():
        yield prefix + name
        section = _section_of(field.annotation)
        if section is not None:
            yield from dotted_names(section, f"{prefix}{name}.")
