"""The nodes under examination: what each has answered, and who is not asked again (asks them)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from launcher.measurements import KnownNode, NodeMeasurements

Call = Callable[[], Any]
"""Something a node can be asked: a function that its process can import, with its arguments (`functools.partial`)."""


@dataclass(frozen=True)
class Answer:
    """What a node gave."""

    value: Any = None
    error: str = ""
    """Why the call failed there."""
    lost: str = ""
    """Why there is no answer at all: the node, its process or the way to it is gone."""

    @property
    def is_good(self) -> bool:
        """Whether there is a value."""
        return not self.error and not self.lost


class Probes(Protocol):
    """A process on each node."""

    def ask(self, calls: Mapping[str, Call], within_s: float) -> Mapping[str, Answer]:
        """Run a call on each of these nodes, at the same time, and wait for the answers no longer than some seconds more than `within_s`."""
        ...


class Roster:
    """All nodes of a cluster, and what is known of them so far."""

    def __init__(self, nodes: Sequence[KnownNode], probes: Probes) -> None:
        self._probes = probes
        self._found = {node.id: NodeMeasurements(node) for node in nodes}

    def __getitem__(self, node: str) -> NodeMeasurements:
        return self._found[node]

    def all(self) -> tuple[NodeMeasurements, ...]:
        """In the order they were given."""
        return tuple(self._found.values())

    def usable(self, *, training: bool = False) -> list[KnownNode]:
        """Nodes that can be asked more; `training`: those that ranks may be placed on."""
        return [each.node for each in self._found.values() if each.answers and each.facts and (each.node.trains or not training)]

    def keep(self, name: str, values: Mapping[str, Any]) -> None:
        """Note what was measured, a field of `NodeMeasurements`, by node."""
        for node, value in values.items():
            self._found[node] = replace(self._found[node], **{name: value})

    def ask(self, part: str, calls: Mapping[str, Call], within_s: float) -> dict[str, Any]:
        """The values of the nodes that gave one. Of others it is noted that this part failed; who is lost is out of all that follows."""
        answers = self.ask_all(calls, within_s)
        for node, answer in answers.items():
            if answer.error:
                self._found[node] = replace(self._found[node], failed={**self._found[node].failed, part: answer.error})
        return {node: answer.value for node, answer in answers.items() if answer.is_good}

    def ask_all(self, calls: Mapping[str, Call], within_s: float) -> Mapping[str, Answer]:
        """Every answer. A call that fails is not the node's fault; who is lost is out of all that follows."""
        answers = self._probes.ask(calls, within_s) if calls else {}
        self.keep("lost", {node: answer.lost for node, answer in answers.items() if answer.lost})
        return answers
