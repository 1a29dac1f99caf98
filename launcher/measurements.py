"""What `maskwright doctor` has measured, as nodes have given it, and what it finds wrong by that: plain values (pure)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from data_pipeline.errors import ExitCode


@dataclass(frozen=True)
class KnownNode:
    """A node of a cluster as Ray knows it."""

    id: str
    address: str
    host: str
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    object_store_bytes: float = 0.0
    is_here: bool = False
    """Whether the command runs on it."""
    is_busy: bool = False
    """Whether Ray has given some of it to others, which makes it slow without a fault of its own."""
    is_leaving: bool = False
    """Whether it is about to be taken away."""
    gone: str = ""
    """Why Ray has given it up; empty while it has not."""
    ports: Mapping[str, int] = field(default_factory=dict[str, int])
    """Ray's on it, by what listens there."""

    @property
    def name(self) -> str:
        """What people and Ray call it; several nodes may share a host and an address."""
        return f"{self.host} ({self.address}, {self.id[:8]})"

    @property
    def trains(self) -> bool:
        """Whether a rank may be placed on it: a head without CPUs only drives."""
        return self.num_cpus >= 1 or self.num_gpus >= 1

    @property
    def is_in_use(self) -> bool:
        """Whether a run may be on its GPUs, whose memory it fills: what doctor put beside it could end it."""
        return self.is_busy and self.num_gpus >= 1


@dataclass(frozen=True)
class Facts:
    """What a node says of itself."""

    machine: str
    """Equal where nodes share a machine, and so must not be measured at the same time."""
    versions: Mapping[str, str]
    """Of Python, of the libraries that train, and of our own packages (a digest)."""
    shm_bytes: int
    """Of /dev/shm."""
    open_ports: tuple[str, ...] = ()
    """Ports of Ray that other machines reach, and that answer to whoever has no token."""
    unsure_ports: tuple[str, ...] = ()
    """Such as others reach, and that have neither answered nor asked for a token."""


@dataclass(frozen=True)
class Rate:
    """How fast a node multiplies matrices; of several GPUs the slowest."""

    device: str
    threads: int
    flops: float
    """FLOP/s by the wall clock over a second, which is what a rank gets there, whoever else is at work."""


@dataclass(frozen=True)
class Clock:
    """A node's clock minus the one here, and how far off that may be: half the round trip of the question."""

    offset_s: float
    error_s: float


@dataclass(frozen=True)
class Written:
    """What became of a node's writes to the storage."""

    seconds: float
    """Of one small file until it is durable under its name; the median of some."""
    won: bool
    """Whether it has created the file that all nodes try to create, and only one may."""


@dataclass(frozen=True)
class Read:
    """What a node reads of what others have written."""

    seconds: float
    """Of one small file; the median."""
    seen: tuple[str, ...]
    """Ids of the nodes whose last write it has seen."""
    unseen: tuple[str, ...] = ()
    """And of those whose it has not."""


@dataclass(frozen=True)
class ShardLook:
    """Shards that a node has looked at, and what is wrong with some, by name."""

    checked: int
    failed: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class NodeMeasurements:
    """One node. What is None was not measured; `failed` may say why."""

    node: KnownNode
    lost: str = ""
    """Why it gives no more answers; empty while it does."""
    failed: Mapping[str, str] = field(default_factory=dict[str, str])
    """Parts that failed on it, and their causes."""
    facts: Facts | None = None
    rate: Rate | None = None
    clock: Clock | None = None
    written: Written | None = None
    read: Read | None = None
    shards: ShardLook | None = None

    @property
    def answers(self) -> bool:
        """Whether it can be asked, and is worth it: on a node that is about to be taken away nothing is placed any more."""
        return not self.lost and not self.node.gone and not self.node.is_leaving


@dataclass(frozen=True)
class Link:
    """An all-reduce between two nodes."""

    nodes: tuple[str, str]
    bytes_per_s: float | None
    error: str = ""
    """Why there was none."""


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce over all nodes that train and reach each other, one rank on each."""

    num_nodes: int
    bytes_per_s: float | None
    """Bytes that each rank sends a second (the `bus bandwidth` of NCCL's tests)."""
    error: str = ""


@dataclass(frozen=True)
class CorpusLook:
    """What all nodes together have looked at of a corpus."""

    folder: str
    num_shards: int
    num_checked: int
    damaged: Mapping[str, str] = field(default_factory=dict[str, str])
    """Shards that two nodes have found wrong (or the only one, twice), and how."""
    unsure: Mapping[str, str] = field(default_factory=dict[str, str])
    """Shards that one node has found wrong and none has looked at again: theirs or the node's fault."""


@dataclass(frozen=True)
class Measurements:
    """Everything that was measured of a cluster."""

    nodes: tuple[NodeMeasurements, ...]
    versions_here: Mapping[str, str]
    storage: str
    links: tuple[Link, ...] = ()
    all_reduce: AllReduce | None = None
    corpus: CorpusLook | None = None

    def answering(self) -> list[NodeMeasurements]:
        """The nodes that answer."""
        return [each for each in self.nodes if each.answers]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or (a warning) that will cost something."""

    what: str
    """Said of the node, where there is one: `answers nothing`."""
    remedy: str
    node: str | None = None
    """Id of the node because of which it is; None where it is not one node's."""
    code: ExitCode = ExitCode.ENVIRONMENT
    """What the command ends with because of it; OK makes it a warning."""

    @property
    def is_fault(self) -> bool:
        """Whether a run must not begin like this."""
        return self.code is not ExitCode.OK


@dataclass(frozen=True)
class Diagnosis:
    """The verdict."""

    findings: tuple[Finding, ...]
    """Faults first."""
    excluded: tuple[str, ...]
    """Ids of the nodes to leave out: those that a fault names."""
    code: ExitCode

    @property
    def faults(self) -> tuple[Finding, ...]:
        """Without the warnings."""
        return tuple(finding for finding in self.findings if finding.is_fault)


def machines_of(nodes: Iterable[NodeMeasurements]) -> dict[str, str]:
    """By node, of those that have said what they are: equal where nodes share a machine."""
    return {each.node.id: each.facts.machine for each in nodes if each.facts is not None}


def best_rates(links: Iterable[Link]) -> dict[str, float]:
    """Bytes a second of each node's fastest link: a slow partner does not count against it."""
    best: dict[str, float] = {}
    for link in links:
        for node in link.nodes:
            if link.bytes_per_s is not None:
                best[node] = max(best.get(node, 0.0), link.bytes_per_s)
    return best
