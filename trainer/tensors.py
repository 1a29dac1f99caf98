"""`Tensors`: sizes of tensors that are in memory together, and what a process takes that has several such sets one after the other (pure)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

LARGE_BYTES = 32 << 20
"""From here on a tensor hardly comes to lie where smaller ones were, nor they where it was."""
HEAP_GROWTH = 1.3
"""What tensors that come and go take of the C library's heap, in which all of a CPU's lie (`trainer.heap`), over the sum of their sizes. Fitted to
peaks that `benchmarks/plan_memory.py` has measured, which gave 1.2 to 1.5."""


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
    def large(self) -> "Tensors":
        """Those of `LARGE_BYTES` or more."""
        return Tensors(tuple((size, number) for size, number in self if size >= LARGE_BYTES))


def peak_bytes(kept: Tensors, moments: Sequence[Tensors], *, on_gpu: bool) -> int:
    """The most that is taken by tensors that are kept all along, and by others that are there at one of several moments.

    A GPU's memory is used again whole. Of a process' heap what small tensors took at one moment stays beside what large ones take at another.
    """
    if on_gpu:
        return kept.num_bytes + max(each.num_bytes for each in moments)
    large = [each.large.num_bytes for each in moments]
    small = [each.num_bytes - of_these for each, of_these in zip(moments, large, strict=True)]
    return round(kept.num_bytes + HEAP_GROWTH * (max(large) + max(small)))


NOTHING = Tensors()
