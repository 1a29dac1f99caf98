"""Slurm's commands as far as we use them, without a Slurm: programs that note their words and environment and answer what they are told to."""

import os
from pathlib import Path

import pytest

PROGRAMS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "srun")
_PROGRAM = """\
#!/bin/bash
name=${0##*/} here=${0%/*}
printf '%s\\n' "$name $*" >> "$here/calls"
env > "$here/$name.environment"
[ -e "$here/$name.out" ] && cat "$here/$name.out"
[ -e "$here/$name.once" ] && { rm "$here/$name.once"; echo down >&2; exit 1; }
[ -e "$here/$name.err" ] && { cat "$here/$name.err" >&2; exit 1; }
exit 0
"""


class SlurmCommands:
    """In a folder of its own, which comes first in PATH."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        for name in PROGRAMS:
            (folder / name).write_text(_PROGRAM)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def answer(self, program: str, out: str = "", error: str | None = None) -> None:
        """What a program prints from now on; with `error` it fails."""
        (self.folder / f"{program}.out").write_text(out)
        (self.folder / f"{program}.err").unlink(missing_ok=True)
        if error is not None:
            (self.folder / f"{program}.err").write_text(error)

    def fail_once(self, program: str) -> None:
        """At its next call."""
        (self.folder / f"{program}.once").touch()

    def queue(self, state: str, status: int = 0, reason: str = "None") -> None:
        """What squeue tells of every job; nothing where `state` is empty."""
        self.answer("squeue", f"{state:>40}{status:>40}{reason:>100}\n" if state else "")

    def environment(self, program: str) -> dict[str, str]:
        """In which a program was called last; values of one line."""
        lines = (self.folder / f"{program}.environment").read_text().splitlines()
        return {name: value for name, equals, value in (line.partition("=") for line in lines) if equals}

    def calls(self, program: str) -> list[str]:
        """How a program was called."""
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [line.removeprefix(program).strip() for line in lines if line.split()[0] == program]
