"""What is written into a store, over real HTTP, while the store fails: all of it, each line once, or the right error in time."""

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest

from data_pipeline import remote, storage
from data_pipeline.errors import ExitCode, StorageError, StorageUnreachableError
from data_pipeline.storage import Location
from tests.support.object_store import ALWAYS, Fault, ObjectStore, reachable_object_store


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with reachable_object_store() as running:
        yield running


@pytest.fixture
def folder(store: ObjectStore, request: pytest.FixtureRequest) -> Location:
    store.fail()
    return Location.at(f"s3://{store.bucket}/{request.node.name.replace('[', '-').strip(']')}")


PASSING = [
    pytest.param([Fault("500", 4, method="PUT")], id="500", marks=pytest.mark.full),
    pytest.param([Fault("503", 4, method="PUT")], id="slow-down"),
    pytest.param([Fault("reset", 3, method="PUT")], id="reset"),
    pytest.param([Fault("lost", 2, method="PUT")], id="lost"),
    pytest.param([Fault("slow", 1, method="PUT", delay_s=1.0)], id="slow-once"),
    pytest.param([Fault("lost", method="PUT"), Fault("reset", method="PUT"), Fault("500", method="PUT")], id="one-after-another"),
]


@pytest.mark.parametrize("faults", PASSING)
def test_what_passes_loses_nothing_and_writes_nothing_twice(
    folder: Location, store: ObjectStore, faults: list[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_ANSWER_S", 0.3)
    lines = folder / "lines.jsonl"
    lines.append_line("before")
    store.fail(*faults)
    lines.append_line("during")
    lines.append_line("after")
    assert lines.read_lines() == ["before", "during", "after"]
    store.fail(*faults)
    (folder / "file.json").write_json({"whole": True})
    assert (folder / "file.json").read_json() == {"whole": True}
    store.fail(*faults)
    assert (folder / "claim").claim(b"mine")
    store.fail(*faults)
    assert not (folder / "claim").claim(b"theirs")
    assert (folder / "claim").read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["500", "503", "reset"])
def test_looks_and_removals_go_on_when_the_store_answers_again(folder: Location, store: ObjectStore, kind: str) -> None:
    (folder / "one").write_bytes(b"1")
    (folder / "two" / "three").write_bytes(b"3")
    faults = [Fault(kind, 2, method=method) for method in ("GET", "HEAD", "POST")]
    store.fail(*faults)
    assert folder.children() == ["one", "two"]
    store.fail(*faults)
    assert ((folder / "one").exists(), (folder / "two").exists(), (folder / "four").exists()) == (True, True, False)
    store.fail(*faults)
    (folder / "two").remove()
    (folder / "four").remove()
    assert folder.children() == ["one"]
    (folder / "two" / "again").write_bytes(b"")
    assert (folder.children(), (folder / "nothing").children()) == (["one", "two"], [])


WAYS: dict[str, Callable[[Location], object]] = {
    "write": lambda file: file.write_bytes(b"data"),
    "append": lambda file: file.append_line("line"),
    "claim": lambda file: file.claim(b"mine"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_the_store_refuses_is_not_tried_again(folder: Location, store: ObjectStore, way: str) -> None:
    store.fail(Fault("403", ALWAYS, method="PUT"))
    with pytest.raises(StorageError, match=r"cannot write s3://.*PermissionError") as caught:
        WAYS[way](folder / "file")
    assert caught.value.exit_code == ExitCode.STORAGE
    assert len(store.requests()) == 1
    store.fail()
    with pytest.raises(StorageError, match="cannot write s3://no-such-bucket"):
        WAYS[way](Location.at("s3://no-such-bucket/file"))


def test_a_store_that_is_gone_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Botocore's errors of connections are no OSErrors."""
    monkeypatch.setattr(remote, "PATIENCE_S", 0.8)
    monkeypatch.setattr(storage, "_REMOVAL_S", 0.8)
    with reachable_object_store() as running:
        file = Location.at(f"s3://{running.bucket}/file")
        running.stop()
        for ask in (*WAYS.values(), Location.remove, Location.children, Location.exists):
            started_at = time.monotonic()
            with pytest.raises(StorageUnreachableError, match=r"no answer in \d+ attempts? over [\d.]+ s: EndpointConnectionError") as caught:
                ask(file)
            assert time.monotonic() - started_at < 6
            assert caught.value.exit_code == ExitCode.UNREACHABLE


def test_the_error_is_that_of_an_attempt_that_was_answered() -> None:
    """The last attempt is cut short, which says nothing about the store."""
    answers = iter([ConnectionRefusedError("refused")])

    async def ask() -> None:
        for answer in answers:
            raise answer
        await asyncio.sleep(60)

    with pytest.raises(StorageUnreachableError, match=r"no answer in 2 attempts over [\d.]+ s: ConnectionRefusedError: refused"):
        remote.call("s3://bucket/file", ask, remote.patience(1.0))


def test_what_is_new_in_a_file_that_grows_is_read_without_the_rest(folder: Location, store: ObjectStore) -> None:
    file = folder / "rank-00000.log"
    file.write_bytes(b"first\nsecond\n")
    assert file.read_range(6, 100) == b"second\n"
    assert file.read_range(13, 100) == b""
