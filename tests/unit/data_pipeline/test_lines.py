"""Files of lines in a store: order by time, appended without a listing, read onward from where a reader stands."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_pipeline.lines import LineReader, last_lines
from data_pipeline.storage import Location
from tests.support.object_store import ObjectStore, reachable_object_store


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with reachable_object_store() as running:
        yield running


def test_one_of_many_claims_a_name_in_a_store(store: ObjectStore) -> None:
    claim = Location.at(f"s3://{store.bucket}/run/leases/00000001")
    with ThreadPoolExecutor(max_workers=8) as threads:
        won = list(threads.map(lambda caller: claim.claim(str(caller).encode()), range(8)))
    assert sum(won) == 1
    assert claim.claim(claim.read_bytes())  # the winner's, sent again because the first answer was lost
    assert not claim.claim(b"late")


def test_lines_in_a_store_keep_their_order_and_cost_no_listing(store: ObjectStore) -> None:
    file = Location.at(f"s3://{store.bucket}/run/metrics.jsonl")
    reader = LineReader(file)
    assert (reader.read(), last_lines(file), file.read_lines()) == ([], [], [])
    file.append_line("0")
    store.fail()
    for number in range(1, 12):
        file.append_line(str(number))
    assert {request.split(" ")[0] for request in store.requests()} == {"PUT"}
    late = LineReader(file)
    late.skip()
    file.append_line("12")
    everything = [str(number) for number in range(13)]
    assert file.read_lines() == reader.read() == everything
    assert late.read() == ["12"]
    assert reader.read() == []
    assert last_lines(file)[-2:] == ["11", "12"]


def test_a_reader_goes_on_in_the_next_hour(store: ObjectStore) -> None:
    file = Location.at(f"s3://{store.bucket}/run/events.jsonl")
    file.append_line("now")
    reader = LineReader(file)
    reader.skip()
    (file / "2999010100" / "32503680000000000000-00000000.jsonl").write_bytes(b"later\n")
    assert reader.read() == ["later"]
    assert file.read_lines() == ["now", "later"]
