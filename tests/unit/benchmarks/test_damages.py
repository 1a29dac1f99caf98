"""Damages change a data set as their case says, and what became of its documents is judged rightly."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from benchmarks.damages import CASES, copy_data_set
from benchmarks.data_corruption import judge

_CASES = {case.name: case for case in CASES}
_SHARDS = ("000000.tar", "000001.tar", "000002.tar")


@pytest.fixture
def data_set(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a data set of three shards of five samples, its content begun with a word."""

    def make(word: str) -> Path:
        folder = tmp_path / word
        folder.mkdir()
        for shard in _SHARDS:
            with webdataset.TarWriter(str(folder / shard), mtime=0, encoder=False) as writer:
                for number in range(5):
                    writer.write({"__key__": f"{shard}{number}", "txt": f"{word} {shard} {number}".encode() * 60})
        return folder

    return make


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", [name for name in _CASES if name != "the index of another corpus"])
def test_every_damage_changes_the_copy_and_only_the_copy(name: str, data_set: Callable[[str], Path], tmp_path: Path) -> None:
    folder, foreign = data_set("own"), data_set("foreign")
    before, of_foreign = _contents(folder), _contents(foreign)
    damages = list(_CASES[name].damages(folder, foreign, 5))
    assert 1 <= len(damages) <= 5
    for number, damage in enumerate(damages):
        copy = tmp_path / f"copy-{number}"
        copy_data_set(folder, copy)
        assert _contents(copy) == before
        damage(copy)
        assert _contents(copy) != before
    assert (_contents(folder), _contents(foreign)) == (before, of_foreign)


def test_a_flipped_bit_is_one_bit_and_cuts_are_where_they_are_said_to_be(data_set: Callable[[str], Path], tmp_path: Path) -> None:
    folder = data_set("own")
    whole = (folder / _SHARDS[1]).read_bytes()
    with tarfile.open(folder / _SHARDS[1]) as tar:
        starts = {member.offset for member in tar.getmembers()}
    for name, rule in {
        "a shard cut between members": lambda place: place in starts,
        "a shard cut at another 512 bytes": lambda place: place % 512 == 0 and place not in starts,
        "a shard cut elsewhere": lambda place: place % 512 != 0,
    }.items():
        for number, damage in enumerate(_CASES[name].damages(folder, folder, 9)):
            copy = tmp_path / f"{name}-{number}"
            copy_data_set(folder, copy)
            damage(copy)
            cut = (copy / _SHARDS[1]).read_bytes()
            assert whole.startswith(cut)
            assert rule(len(cut))
    for nth, name in enumerate(("a bit flipped in a header", "a bit flipped in a payload")):
        for number, damage in enumerate(_CASES[name].damages(folder, folder, 9)):
            copy = tmp_path / f"flip-{nth}-{number}"
            copy_data_set(folder, copy)
            damage(copy)
            changed = (copy / _SHARDS[1]).read_bytes()
            assert sum((one ^ other).bit_count() for one, other in zip(whole, changed, strict=True)) == 1


def test_documents_are_lost_changed_or_all_there() -> None:
    assert judge([b"a", b"b", b"b"], [b"a", b"b", b"b"]) == "no effect"
    assert judge([b"a", b"b", b"b"], [b"a", b"b"]) == "lost silently"
    assert judge([b"a", b"b"], [b"b", b"a"]) == "changed silently"
    assert judge([b"a", b"b"], [b"a", b"c"]) == "changed silently"
    assert judge([b"a", b"b"], [b"a", b"b", b"b"]) == "changed silently"
