"""What of a machine's memory may be taken."""

import os
from pathlib import Path

import pytest

from launcher.host_memory import group_limits, host_bytes


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/\n", {"memory.max": "4000\n"}, {4000}),
        ("0::/jobs/7\n", {"jobs/7/memory.max": "max\n", "jobs/memory.max": "2000\n"}, {2000}),
        ("0::/seen/from/the/host\n", {"memory.max": "3000\n"}, {3000}),
        ("5:memory:/jobs\n4:cpu:/\n0::/\n", {"memory/jobs/memory.limit_in_bytes": "100\n", "memory/memory.limit_in_bytes": "900\n"}, {100, 900}),
        ("0::/\n", {}, set()),
        ("", {}, set()),
    ],
)
def test_limits_of_groups_and_of_those_above(groups: str, files: dict[str, str], limits: set[int], tmp_path: Path) -> None:
    for name, text in files.items():
        write(tmp_path / name, text)
    assert set(group_limits(groups, tmp_path)) == limits


def test_it_is_at_most_what_the_machine_has() -> None:
    assert 0 < host_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
