"""`HEAP_ENVIRONMENT`: how the C library of a rank on a CPU keeps memory that it has freed, for the next step to take again."""

import os
from collections.abc import Mapping

_TUNABLES = {"mmap_max": 0, "trim_threshold": 1 << 62, "tcache_count": 0, "arena_max": 1}
"""Of glibc, https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html.

By default it maps every tensor of 32 MB anew, and of smaller ones gives back what lies last: at each step the system then clears the memory of
logits, gradients and activations, and hands it out by pages of 4 kB. On one core that took 23 % of a step of 4L/256 and 7 % of 12L/768.

Torch asks for aligned memory, of which glibc cuts off a few bytes on either side. Once those lie in a thread's cache, a tensor's place is too small
for the next one of its size: without the cache the most that a process takes is 5 to 10 % less, and steps are as fast.

Ray trains on a thread that is not the first of its process, which would get an arena of its own, of heaps of 64 MB: a step took up to 5 % longer.
"""
_OURS = [f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items()]
HEAP_ENVIRONMENT: Mapping[str, str] = {"GLIBC_TUNABLES": ":".join([*_OURS, *filter(None, [os.environ.get("GLIBC_TUNABLES")])])}
"""Read when a process starts. What is set where the driver runs comes last, and holds."""
