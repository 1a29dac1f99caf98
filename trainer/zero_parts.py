"""`Parts`: a vector of which each rank owns a part; ranks add up what they have of each other's, and hear what has become of it.

In place, and each sends only what its receiver needs. NCCL has calls for that. Those of gloo would reduce a copy, and to everybody: ranks on CPUs
read each other's memory where they can (`trainer.shared_vectors`), and else exchange parts, two by two.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.shared_vectors import vectors_of_ranks

_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # pyright: ignore[reportDeprecated]
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # pyright: ignore[reportDeprecated]
"""As torch 2.13 calls them, and as it did before."""
_ROW = 1 << 12
"""Elements whose squares a CPU sums to 1e-7; of 2^26 in one go it loses half a per cent."""
_PIECE = 1 << 22
"""Elements that two ranks on CPUs exchange at once: larger pieces are no faster, of smaller ones each waits for the other rank to look."""
_CACHED = 1 << 18
"""Elements that are still in a CPU's cache when they are divided after they were added."""


def parts_of(flats: Sequence[Tensor], ranks: Any, elements: int) -> "list[Parts]":
    """Cut each of `flats`, which every rank has, into parts of one length. CPUs send at most `elements` at once. Collective."""
    if dist.get_world_size(ranks) == 1:
        return [Parts(flat, ranks) for flat in flats]
    if flats[0].device.type == "cuda":
        return [CollectiveParts(flat, ranks) for flat in flats]
    vectors = vectors_of_ranks(flats, ranks)
    if vectors is None:
        return [ExchangedParts(flat, ranks, elements) for flat in flats]
    return [SharedParts(flat, ranks, of_ranks) for flat, of_ranks in zip(flats, vectors, strict=True)]


class Parts:
    """Those of one rank alone: nothing moves. `parts_of` builds what moves them for others."""

    def __init__(self, flat: Tensor, ranks: Any) -> None:
        self._flat = flat
        self._ranks = ranks
        self._rank = dist.get_rank(ranks)
        self._parts = self._cut(flat)
        self.own = self._parts[self._rank]
        """This rank's part."""

    def average_own(self) -> None:
        """Make this rank's part the mean of what all ranks have of it. What it has of the others' is then of no use. Collective."""

    def gather(self) -> None:
        """Give each rank the others' parts as these have them. Collective."""

    def _cut(self, flat: Tensor) -> Tensor:
        """One row a rank."""
        return flat.view(dist.get_world_size(self._ranks), -1)


class CollectiveParts(Parts):
    """By calls that reduce and gather in place, as NCCL's do."""

    def average_own(self) -> None:
        """As `Parts` says."""
        _REDUCE_SCATTER(self.own, self._flat, group=self._ranks)
        self.own.div_(len(self._parts))

    def gather(self) -> None:
        """As `Parts` says."""
        _ALL_GATHER(self._flat, self.own, group=self._ranks)


class SharedParts(Parts):
    """Of ranks on one machine: each reads the others' `vectors`, of which one is its own."""

    def __init__(self, flat: Tensor, ranks: Any, vectors: Sequence[Tensor]) -> None:
        super().__init__(flat, ranks)
        self._others = {source: self._cut(vectors[source]) for source, _ in _exchanges(ranks)}

    def average_own(self) -> None:
        """As `Parts` says. Ranks meet before, when all have their gradients, and after, when nobody reads another's any more."""
        dist.barrier(group=self._ranks)
        theirs = [parts[self._rank].split(_CACHED) for parts in self._others.values()]
        for mine, *others in zip(self.own.split(_CACHED), *theirs, strict=True):
            for other in others:
                mine.add_(other)
            mine.div_(len(self._parts))
        dist.barrier(group=self._ranks)

    def gather(self) -> None:
        """As `Parts` says. A rank may change its part once all have met again, as they do in the next `average_own`; earlier only to gather anew."""
        dist.barrier(group=self._ranks)
        for source, parts in self._others.items():
            self._parts[source].copy_(parts[source])


class ExchangedParts(Parts):
    """Of ranks that cannot read each other's memory, over gloo: in a round each sends to one and receives from one, at most `elements` at once."""

    def __init__(self, flat: Tensor, ranks: Any, elements: int) -> None:
        super().__init__(flat, ranks)
        self._elements = min(elements, _PIECE, len(self.own))

    def average_own(self) -> None:
        """As `Parts` says."""
        arrived = self._flat.new_empty(self._elements)
        for source, target in _exchanges(self._ranks):
            for mine, theirs in zip(self.own.split(self._elements), self._parts[target].split(self._elements), strict=True):
                self._exchange(theirs, target, arrived[: len(mine)], source)
                mine.add_(arrived[: len(mine)])
        self.own.div_(len(self._parts))

    def gather(self) -> None:
        """As `Parts` says."""
        for source, target in _exchanges(self._ranks):
            self._exchange(self.own, target, self._parts[source], source)

    def _exchange(self, sent: Tensor, target: int, received: Tensor, source: int) -> None:
        transfers = [dist.isend(sent, group=self._ranks, group_dst=target), dist.irecv(received, group=self._ranks, group_src=source)]
        for transfer in transfers:
            assert transfer is not None  # nothing is sent only by who is not in the group
            transfer.wait()


def norm_of_parts(own: Sequence[Tensor], ranks: Any) -> Tensor:
    """The 2-norm of all ranks' parts together, the same on each: a scalar."""
    square = torch.linalg.vector_norm(torch.cat([_norms(part) for part in own])).square()
    dist.all_reduce(square, group=ranks)
    return square.sqrt()


def _exchanges(ranks: Any) -> Iterator[tuple[int, int]]:
    """From whom a rank receives and to whom it sends, round after round until it has met all: in none do two ranks send to the same."""
    rank, size = dist.get_rank(ranks), dist.get_world_size(ranks)
    return (((rank - distance) % size, (rank + distance) % size) for distance in range(1, size))


def _norms(flat: Tensor) -> Tensor:
    """Norms whose norm is that of `flat`: one on a GPU, which sums in a tree; on a CPU, which adds one square to the next, those of its rows."""
    if flat.device.type == "cuda":
        return torch.linalg.vector_norm(flat)[None]
    even = flat.numel() // _ROW * _ROW
    return torch.cat([torch.linalg.vector_norm(flat[:even].view(-1, _ROW), dim=1), torch.linalg.vector_norm(flat[even:])[None]])
