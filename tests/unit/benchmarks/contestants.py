"""A contestant that says where it ran."""

import os


def report(value: int) -> dict[str, object]:
    """The value, and what the process was given."""
    return {"value": value, "pid": os.getpid(), "cores": len(os.sched_getaffinity(0)), "threads": os.environ["OMP_NUM_THREADS"]}
