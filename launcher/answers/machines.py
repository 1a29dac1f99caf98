"""Shapes of what `doctor` answers (pure)."""

from typing import Literal

from pydantic import with_config
from typing_extensions import TypedDict

from launcher.answers.shape import SHAPE


@with_config(SHAPE)
class NodeAnswer(TypedDict):
    """A machine as `doctor` found it. What was not measured is null."""

    id: str
    address: str
    host: str
    answers: bool
    exclude: bool
    device: str | None
    threads: int | None
    flops: float | None
    share_of_others: float | None
    bytes_per_s: float | None
    write_s: float | None
    read_s: float | None
    clock_offset_s: float | None
    clock_error_s: float | None
    shm_bytes: int | None
    versions: dict[str, str] | None
    open_ports: list[str] | None
    unsure_ports: list[str] | None
    shards_checked: int | None


@with_config(SHAPE)
class AllReduceAnswer(TypedDict):
    """Over all nodes together."""

    nodes: int
    bytes_per_s: float | None
    error: str | None


@with_config(SHAPE)
class LinkAnswer(TypedDict):
    """Between two nodes."""

    nodes: list[str]
    bytes_per_s: float | None
    error: str | None


@with_config(SHAPE)
class ShardsAnswer(TypedDict):
    """The shards of a corpus as the nodes see them."""

    folder: str
    shards: int
    checked: int
    damaged: dict[str, str]


@with_config(SHAPE)
class FindingAnswer(TypedDict):
    """What is wrong, or will cost something."""

    node: str | None
    what: str
    remedy: str
    severity: Literal["fault", "warning"]


@with_config(SHAPE)
class DoctorAnswer(TypedDict):
    """Of `doctor`."""

    cluster: str
    healthy: bool
    exit_code: int
    exclude: list[str]
    """Ids of the nodes to leave out."""
    nodes: list[NodeAnswer]
    all_reduce: AllReduceAnswer | None
    links: list[LinkAnswer]
    storage: str
    corpus: ShardsAnswer | None
    findings: list[FindingAnswer]
