"""The peers' ways to read: which release, which data set, which function; and whether they can be measured here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.children import ContestantError
from benchmarks.corpora import BenchCorpus, peer_data
from benchmarks.environments import Peer, PeerUnavailableError, python_of


@dataclass(frozen=True)
class Variant:
    """One way of a peer to read documents."""

    peer: Peer
    data: str
    """Data set: `write_<data>` of the peer's module makes it."""
    function: str
    """Function of the peer's module that reads it, or continues in it."""
    title: str

    @property
    def reader(self) -> str:
        """The function as `contestants.peers.load` finds it."""
        return f"{self.peer.name}_peer:{self.function}"


@dataclass(frozen=True)
class Ready:
    """A variant that can be measured: its interpreter and its data set. Or the reason why not."""

    variant: Variant
    python: str = ""
    folder: str = ""
    problem: str | None = None


def make_ready(variants: Sequence[Variant], corpus: BenchCorpus, progress: Callable[[str], None]) -> list[Ready]:
    """Make the environments and the data sets of the peers; what cannot be made says why."""
    ready: list[Ready] = []
    for variant in variants:
        try:
            python = python_of(variant.peer, progress)
            ready.append(Ready(variant, python, peer_data(variant.peer, variant.data, corpus, progress)))
        except (PeerUnavailableError, ContestantError) as error:
            progress(str(error))
            ready.append(Ready(variant, problem=str(error).partition("\n")[0]))
    return ready
