"""`Tensors`: sizes of tensors that are in memory together, and what a process takes that has several such sets one after the other (pure)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

MAPPED_BYTES = 32 << 20
"""From here on glibc maps a piece of memory by itself, and gives it back when it is freed (mallopt(3), DEFAULT_MMAP_THRESHOLD_MAX)."""
HEAP_GROWTH = 1.4
"""What smaller tensors that come and go take of the heap, over the sum of their sizes. Torch asks for aligned memory, for which glibc wants a hole
larger than the tensor: one that another tensor of the same size has left does not do. Fitted to peaks that `benchmarks/plan_memory.py` has measured,
which gave 1.3 to 1.6."""


@dataclass(frozen=True)
class Tensors:
    """How many there are of each size, in bytes."""

    sizes: tuple[tuple[float, float], ...] = ()
    """(bytes, number)."""

    @classmethod
    def of(cls, num_bytes: float, number: float = 1) -> "Tensors":
        """Some of one size."""
        return cls(((num_bytes, number),))

    @classmethod
    def total(cls, several: Iterable["Tensors"]) -> "Tensors":
        """All of them."""
        return cls(tuple(size for each in several for size in each))

    def __add__(self, other: "Tensors") -> "Tensors":
        return Tensors(self.sizes + other.sizes)

    def __mul__(self, times: float) -> "Tensors":
        return Tensors(tuple((size, number * times) for size, number in self))

    def __iter__(self) -> Iterator[tuple[float, float]]:
        return iter(self.sizes)

    @property
    def num_bytes(self) -> int:
        """The sum of their sizes."""
        return round(sum(size * number for size, number in self))

    @property
    def in_heap(self) -> "Tensors":
        """Those that a C library keeps in its heap."""
        return Tensors(tuple((size, number) for size, number in self if size < MAPPED_BYTES))


def peak_bytes(kept: Tensors, moments: Sequence[Tensors], *, on_gpu: bool) -> int:
    """The most that is taken by tensors that are kept all along, and by others that are there at one of several moments.

    A GPU's memory is used again whole. A process' heap is not given back: what it took at one moment stays beside what is mapped at another.
    """
    if on_gpu:
        return kept.num_bytes + max(each.num_bytes for each in moments)
    heap = [each.in_heap.num_bytes for each in moments]
    mapped = max(each.num_bytes - in_heap for each, in_heap in zip(moments, heap, strict=True))
    return round(kept.num_bytes + mapped + HEAP_GROWTH * max(heap))


NOTHING = Tensors()
