"""How much main memory the processes of this machine may take: what there is, or what its control groups allow (reads `/proc` and `/sys`)."""

import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
_LIMITS = {"": ("memory.max", ("", "unified")), "memory": ("memory.limit_in_bytes", ("memory",))}
"""By the controller that `/proc/self/cgroup` names (none in version 2): the file of a group's limit, and where groups lie below the mount."""


def host_bytes() -> int:
    """The memory of this machine, or less where this process is in a control group (of a container, of a job) that allows less."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *group_limits(_GROUPS.read_text() if _GROUPS.exists() else "", _MOUNT)])


def group_limits(groups: str, mount: Path) -> Iterator[int]:
    """Limits in bytes of the groups in `/proc/self/cgroup` and of all above them, from the files below `mount`.

    In a container the groups may be named as the host sees them: of such only those above are found there.
    """
    for line in groups.splitlines():
        _, controller, name = line.split(":", 2)
        file, places = _LIMITS.get(controller, ("", ()))
        group = Path(name.lstrip("/"))
        for place in places:
            for each in (group, *group.parents):
                yield from _limit(mount / place / each / file)


def _limit(file: Path) -> Iterator[int]:
    """None where there is none (`max`), or no such group."""
    try:
        yield int(file.read_text())
    except (OSError, ValueError):
        return
