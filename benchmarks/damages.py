"""Ways to damage a data set of tars: every case yields functions that damage a copy of it."""

import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copyfile

Damage = Callable[[Path], None]
"""Damages the data set in a folder."""

_VICTIM = 1
"""The second shard: what lies before it and after it is read as well."""
_OTHER = 2


@dataclass(frozen=True)
class Case:
    """A kind of damage. `damages(folder, foreign, tries)`: what to do to copies of `folder`; `foreign` has other documents."""

    name: str
    damages: Callable[[Path, Path, int], Iterator[Damage]]


def flipped_header_bits(folder: Path, foreign: Path, tries: int) -> Iterator[Damage]:
    """One bit of a member's 512-byte header, anywhere in it."""
    del foreign
    generator = random.Random(1)
    starts = [member.offset for member in _members(folder)]
    for _ in range(tries):
        yield partial(_flip, generator.choice(starts) * 8 + generator.randrange(512 * 8))


def flipped_payload_bits(folder: Path, foreign: Path, tries: int) -> Iterator[Damage]:
    """One bit of a member's content."""
    del foreign
    generator = random.Random(2)
    members = _members(folder)
    for _ in range(tries):
        member = generator.choice(members)
        yield partial(_flip, member.offset_data * 8 + generator.randrange(member.size * 8))


def cuts_between_members(folder: Path, foreign: Path, tries: int) -> Iterator[Damage]:
    """The shard ends where a member would begin."""
    del foreign
    starts = [member.offset for member in _members(folder)]
    for start in random.Random(3).sample(starts, min(tries, len(starts))):
        yield partial(_cut, start)


def cuts_at_blocks(folder: Path, foreign: Path, tries: int) -> Iterator[Damage]:
    """The shard ends at another multiple of 512 bytes, between a header and its content or within the content."""
    del foreign
    members = _members(folder)
    starts = {member.offset for member in members}
    end = members[-1].offset_data + members[-1].size
    places = [place for place in range(512, end, 512) if place not in starts]
    for place in random.Random(4).sample(places, min(tries, len(places))):
        yield partial(_cut, place)


def cuts_elsewhere(folder: Path, foreign: Path, tries: int) -> Iterator[Damage]:
    """The shard ends at a place that is no multiple of 512 bytes."""
    del foreign
    members = _members(folder)
    end = members[-1].offset_data + members[-1].size
    generator = random.Random(5)
    for _ in range(tries):
        yield partial(_cut, generator.randrange(end // 512) * 512 + generator.randrange(1, 512))


def missing_shard(folder: Path, foreign: Path, tries: int) -> Iterator[Damage]:
    """A shard is not there."""
    del folder, foreign, tries
    yield lambda copy: _shards(copy)[_VICTIM].unlink()


def foreign_shard(folder: Path, foreign: Path, tries: int) -> Iterator[Damage]:
    """A shard is another corpus' shard of the same name."""
    del folder, tries
    yield lambda copy: _overwrite(_shards(copy)[_VICTIM], _shards(foreign)[_VICTIM].read_bytes())


def swapped_shards(folder: Path, foreign: Path, tries: int) -> Iterator[Damage]:
    """Two shards have each other's name."""
    del folder, foreign, tries

    def swap(copy: Path) -> None:
        first, second = _shards(copy)[_VICTIM], _shards(copy)[_OTHER]
        one, other = first.read_bytes(), second.read_bytes()
        _overwrite(first, other)
        _overwrite(second, one)

    yield swap


def foreign_index(folder: Path, foreign: Path, tries: int) -> Iterator[Damage]:
    """The index is another corpus'. Stock webdataset has none."""
    del folder, tries
    if (foreign / "index.bin").exists():
        yield lambda copy: _overwrite(copy / "index.bin", (foreign / "index.bin").read_bytes())


CASES = (
    Case("a bit flipped in a header", flipped_header_bits),
    Case("a bit flipped in a payload", flipped_payload_bits),
    Case("a shard cut between members", cuts_between_members),
    Case("a shard cut at another 512 bytes", cuts_at_blocks),
    Case("a shard cut elsewhere", cuts_elsewhere),
    Case("a shard missing", missing_shard),
    Case("a shard of another corpus", foreign_shard),
    Case("two shards swapped", swapped_shards),
    Case("the index of another corpus", foreign_index),
)


def copy_data_set(folder: Path, copy: Path) -> None:
    """Make `copy` a copy of `folder`."""
    copy.mkdir()
    for entry in folder.iterdir():
        if entry.is_symlink():
            (copy / entry.name).symlink_to(entry.resolve())
        else:
            copyfile(entry, copy / entry.name)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def _members(folder: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(_shards(folder)[_VICTIM]) as tar:
        return tar.getmembers()


def _flip(bit: int, copy: Path) -> None:
    path = _shards(copy)[_VICTIM]
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    _overwrite(path, bytes(data))


def _cut(place: int, copy: Path) -> None:
    path = _shards(copy)[_VICTIM]
    _overwrite(path, path.read_bytes()[:place])


def _overwrite(path: Path, data: bytes) -> None:
    """As another file of the same name: who has mapped the old one keeps it."""
    path.unlink()
    path.write_bytes(data)
