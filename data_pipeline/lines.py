"""Reads files of lines that grow: what is new since the last look, or only the end (reads storage)."""

from dataclasses import dataclass

from data_pipeline.storage import Location

_TAIL_BYTES = 2**16
_TAIL_PARTS = 8


@dataclass
class LineReader:
    """Reads a file written by `Location.append_line` onward from where it stands; costs what is new, not what is there."""

    file: Location
    _offset: int = 0
    _hour: str = ""
    _part: str = ""

    def read(self) -> list[str]:
        """Whole lines appended since the last call; in a store those of writers whose clocks agree."""
        return self._read_local() if self.file.is_local else self._read_store()

    def skip(self) -> None:
        """Begin at the present end."""
        if self.file.is_local:
            self._offset = self.file.path.stat().st_size if self.file.exists() else 0
            return
        for hour in self.file.children()[-1:]:
            self._hour, self._part = hour, (self.file / hour).children()[-1]

    def _read_local(self) -> list[str]:
        if not self.file.exists():
            return []
        with self.file.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return complete.decode(errors="replace").split("\n")[:-1]

    def _read_store(self) -> list[str]:
        lines: list[str] = []
        for hour in [hour for hour in self.file.children() if hour >= self._hour]:
            parts = [part for part in (self.file / hour).children() if part > self._part]
            lines += (self.file / hour).read_parts(parts)
            self._hour, self._part = hour, max([self._part, *parts])
        return lines


def last_lines(file: Location) -> list[str]:
    """Lines at the end of a file, oldest first; empty when there are none. The first and the last may be cut."""
    if not file.is_local:
        return [line for hour in file.children()[-1:] for line in (file / hour).read_parts((file / hour).children()[-_TAIL_PARTS:])]
    if not file.exists():
        return []
    size = file.path.stat().st_size
    return file.read_range(max(0, size - _TAIL_BYTES), size).decode(errors="replace").split("\n")
