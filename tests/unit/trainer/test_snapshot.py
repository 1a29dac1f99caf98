"""A snapshot holds the bytes that will be written, whatever happens to what they were made from, in memory that is used again."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import snapshot as module
from trainer.snapshot import Snapshot


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(module, "PIECE_BYTES", 300)


def contents(snapshot: Snapshot) -> dict[str, bytes]:
    return {name: b"".join(snapshot.pieces(name)) for name in snapshot.sizes}


def test_files_of_any_size_come_back_in_pieces() -> None:
    files = {f"file-{size}": bytes(number % 251 for number in range(size)) for size in (0, 1, 299, 300, 1000, 2500)}
    snapshot = Snapshot()
    for name, data in files.items():
        snapshot.add(name, data)
    assert contents(snapshot) == files
    assert snapshot.sizes == {name: len(data) for name, data in files.items()}
    assert snapshot.num_bytes == sum(map(len, files.values()))
    assert max(len(piece) for name in files for piece in snapshot.pieces(name)) == 300


def test_the_memory_of_the_last_save_is_used_again() -> None:
    snapshot = Snapshot()
    snapshot.add("old", b"x" * 2500)
    memory = [id(chunk) for chunk in snapshot._chunks]
    snapshot.clear()
    snapshot.add("new", b"y" * 2400)
    assert contents(snapshot) == {"new": b"y" * 2400}
    assert [id(chunk) for chunk in snapshot._chunks] == memory


def test_it_is_what_torch_writes_and_tensors_may_change_afterwards(tmp_path: Path) -> None:
    flat = torch.arange(3000, dtype=torch.float32)
    state: dict[str, Any] = {"flat": flat, "view": flat[10:20].view(2, 5), "bf16": flat.bfloat16(), "empty": torch.empty(0), "number": 3}
    plain = io.BytesIO()
    torch.save(state, plain)
    snapshot = Snapshot()
    torch.save(state, snapshot.file("state.pt"))  # pyright: ignore[reportArgumentType]
    flat.zero_()
    (tmp_path / "state.pt").write_bytes(contents(snapshot)["state.pt"])
    loaded, expected = torch.load(tmp_path / "state.pt", weights_only=True), torch.load(io.BytesIO(plain.getvalue()), weights_only=True)
    assert all(torch.equal(loaded[name], expected[name]) for name in ("flat", "view", "bf16", "empty"))
    assert loaded["view"].untyped_storage().data_ptr() == loaded["flat"].untyped_storage().data_ptr()  # shared storage is written once
    assert snapshot.num_bytes < 1.2 * len(plain.getvalue())
