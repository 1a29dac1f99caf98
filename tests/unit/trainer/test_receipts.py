"""Receipts: what rank 0 reads of the others, whatever a store carries out late."""

from pathlib import Path

from data_pipeline.errors import StorageUnreachableError
from data_pipeline.storage import Location
from trainer.manifest import FileDigest
from trainer.receipts import Receipt, new_receipts


def test_a_write_that_is_carried_out_late_does_not_hide_what_followed(tmp_path: Path) -> None:
    part = Location.at(tmp_path)
    retries = Receipt(3, {}, StorageUnreachableError("rank 3 could not write its part", "wait"), is_final=False)
    done = Receipt(3, {"a": FileDigest(1, "f" * 64)})
    retries.leave(part)
    assert [receipt.is_final for receipt in new_receipts(part, set())] == [False]
    done.leave(part)
    retries.leave(part)
    assert list(new_receipts(part, set())) == [done]
    assert list(new_receipts(part, {3})) == []
