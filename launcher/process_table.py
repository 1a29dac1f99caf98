"""What this machine's process table says of ranks that say nothing themselves (reads /proc)."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from launcher.health import Seen
from launcher.lease import process_start


def see_processes(processes: Mapping[int, tuple[int, str]]) -> dict[int, tuple[Seen, str]]:
    """What is seen of processes of this machine (by rank: number and start), and what the system says of each."""
    return {rank: _see_process(pid, started) for rank, (pid, started) in processes.items()}


def _see_process(pid: int, started: str) -> tuple[Seen, str]:
    folder = Path(f"/proc/{pid}")
    try:
        if (start := process_start(pid)) != (started or start) or not start:
            return Seen.GONE, f"process {pid} is gone\n"
        state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        text = (folder / "status").read_text()
    except OSError:
        return Seen.GONE, f"process {pid} is gone\n"
    with suppress(OSError):
        text += f"wchan:\t{(folder / 'wchan').read_text()}\n"
    return (Seen.STOPPED if state in "Tt" else Seen.ALIVE), text
