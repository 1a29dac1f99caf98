"""What a node tries a storage with, on a disk and in a store."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline.errors import StorageError
from data_pipeline.storage import Location
from launcher.node_storage import WRITES, assert_removed, look_at_shards, make_root, read_words, remove_words, write_words
from tests.support.object_store import ALWAYS, Fault, ObjectStore, reachable_object_store


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """A server with a bucket."""
    with reachable_object_store() as running:
        yield running


@pytest.fixture(params=["disk", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "disk":
        return Location.at(tmp_path / "here")
    running: ObjectStore = request.getfixturevalue("store")
    running.fail()
    return Location.at(f"s3://{running.bucket}/{tmp_path.name}")


def test_what_nodes_write_others_read_and_one_of_them_wins(folder: Location) -> None:
    words = {"a": "hello", "b": "hallo", "c": "salut"}
    make_root(folder.parent.url)
    with ThreadPoolExecutor(3) as threads:
        written = list(threads.map(lambda node: write_words(folder.url, node, words[node]), words))
    assert sum(each.won for each in written) == 1
    assert all(each.seconds > 0 for each in written)
    found = read_words(folder.url, {"b": "hallo", "c": "salut", "d": "nobody", "a": "older"}, patience_s=0.3)
    assert (found.seen, found.unseen) == (("b", "c"), ("d", "a"))
    assert (folder / "a").read_bytes() == f"hello {0}".encode(), f"the last of {WRITES}"
    remove_words(folder.url)
    remove_words(folder.url)
    assert_removed(folder.url)
    assert not folder.exists()


def test_where_a_storage_is_not_mounted_nothing_is_made_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no folder .*/mount here"):
        write_words(str(tmp_path / "mount" / ".doctor-0"), "a", "hello")
    assert not list(tmp_path.iterdir())


def test_shards_that_are_whole_short_long_and_missing(folder: Location) -> None:
    for name, num_bytes in (("whole", 1000), ("short", 999), ("empty", 0), ("long", 1001)):
        (folder / "c" / name).write_bytes(bytes(num_bytes))
    found = look_at_shards(folder.url, [(f"c/{name}", 1000) for name in ("whole", "short", "empty", "long", "missing")])
    assert found.checked == 5
    assert {name: cause.partition(" than")[0] for name, cause in found.failed.items()} == {
        "c/short": "is shorter",
        "c/empty": "is shorter",
        "c/long": "is longer",
        "c/missing": "is missing",
    }


def test_a_store_that_refuses_us_is_told(store: ObjectStore) -> None:
    folder = Location.at(f"s3://{store.bucket}/refused")
    store.fail()
    (folder / "whole").write_bytes(bytes(10))
    store.fail(Fault("403", times=ALWAYS))
    found = look_at_shards(folder.url, [("whole", 10)])
    assert "cannot be read" in found.failed["whole"]
