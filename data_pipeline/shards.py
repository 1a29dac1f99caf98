"""Blocks of documents in WebDataset tars: written byte for byte the same, read by range, verified, decoded from an allow-list.

No member is ever unpickled and no name is ever run: bytes come from our own opener, arrays from `.npy` without objects. webdataset, which imports
torch, is imported where a tar is written or read: who only asks what a corpus holds need not wait for it.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataCorruptError
from data_pipeline.storage import Location

_REMEDY = "Restore the shard from a copy, or remove the corpus folder and run `maskwright prepare` again."
_SUFFIX = ".npy"
_MEMBERS = ("documents.npy", "ids.npy", "sentences.npy")
_TAR_BLOCK = 512
_NPY = re.compile(rb"\x93NUMPY\x01\x00..\{'descr': '(?P<dtype>[<|]u[1248])', 'fortran_order': False, 'shape': \((?P<size>\d+),\), \} *\n", re.DOTALL)
"""Header of a .npy, version 1.0, with one dimension."""


@dataclass(frozen=True)
class Block:
    """Some documents as arrays: the unit that is read."""

    ids: NDArray[np.integer]
    """Token ids, uint16 or uint32."""
    sentence_ends: NDArray[np.integer]
    """Cumulative tokens at the end of each sentence."""
    document_ends: NDArray[np.integer]
    """Cumulative sentences at the end of each document."""


@dataclass(frozen=True)
class BlockExtent:
    """Where a block's members lie in their tar."""

    offset: int
    num_bytes: int
    checksum: int


def block_key(shard: str, number: int) -> str:
    """Key of the n-th block of a shard, its name without `.tar` and the number."""
    return f"{shard.removesuffix('.tar')}-{number:06d}"


def checksum64(data: bytes | memoryview) -> int:
    """First 8 bytes of SHA-256, little-endian."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def write_shard(name: str, blocks: Sequence[Block]) -> tuple[bytes, list[BlockExtent]]:
    """The tar as bytes, and where each block lies in it. Same blocks, same bytes: times, owners and modes are fixed."""
    from webdataset.writer import TarWriter

    buffer = io.BytesIO()
    bounds: list[int] = [0]
    with TarWriter(buffer, user="", group="", mode=0o444, mtime=0, encoder=False) as writer:
        for number, block in enumerate(blocks):
            arrays = {"ids": block.ids, "sentences": block.sentence_ends, "documents": block.document_ends}
            members = {f"{field}{_SUFFIX}": _to_npy(array) for field, array in arrays.items()}
            writer.write({"__key__": block_key(name, number), **members})
            bounds.append(writer.tarstream.offset)
    data = buffer.getvalue()
    view = memoryview(data)
    return data, [BlockExtent(start, stop - start, checksum64(view[start:stop])) for start, stop in pairwise(bounds)]


def read_block(shard: Location, number: int, extent: BlockExtent) -> Block:
    """Read the n-th block of a shard by range.

    Raises:
        DataCorruptError: the shard is missing or cut, or the block's bytes are not those that were written.
        UnreachableError: the shard's store does not give it.
    """
    try:
        data = shard.read_range(extent.offset, extent.offset + extent.num_bytes)
    except FileNotFoundError as error:
        raise missing_shard(shard, number) from error
    if (damage := find_damage(data, extent)) is not None:
        raise damaged_block(shard, number, damage)
    return decode_block(data, shard, number)


def decode_block(data: bytes, shard: Location, number: int) -> Block:
    """The block whose bytes were read and found to be intact. Raises DataCorruptError where they hold something else than a block."""
    try:
        return parse_block(data, block_key(shard.name, number), str(shard))
    except DataCorruptError as error:
        raise DataCorruptError(error.cause, error.remedy, shard.name, number) from error


def holds_block(data: bytes, extent: BlockExtent) -> bool:
    """Whether the bytes of a file hold the intact block in its place: what a server gives that ignores requests for a range."""
    part = memoryview(data)[extent.offset : extent.offset + extent.num_bytes]
    return len(data) > extent.num_bytes and find_damage(part, extent) is None


def find_damage(data: bytes | memoryview, extent: BlockExtent) -> str | None:
    """How the bytes of a block differ from those that were written; None where they do not. `{key}` stands for the block."""
    if len(data) != extent.num_bytes:
        page = " (a page of HTML)" if bytes(data[:256]).lstrip().lower().startswith((b"<!doctype html", b"<html")) else ""
        return f"block {{key}} should have {extent.num_bytes} bytes at {extent.offset}, found {len(data)}{page}"
    if checksum64(data) != extent.checksum:
        return f"checksum of block {{key}} at byte {extent.offset} does not match the index"
    return None


def damaged_block(shard: Location, number: int, damage: str) -> DataCorruptError:
    """What a block is refused with; see `find_damage`."""
    return DataCorruptError(f"{shard}: {damage.format(key=block_key(shard.name, number))}", _REMEDY, shard.name, number)


def missing_shard(shard: Location, number: int) -> DataCorruptError:
    """What a block is refused with whose shard is not there."""
    return DataCorruptError(f"{shard} is missing (wanted: block {block_key(shard.name, number)})", _REMEDY, shard.name, number)


def parse_block(data: bytes, key: str, shard: str) -> Block:
    """Decode the members of one block: as `write_shard` lays them out, or else with webdataset's tar iterator.

    Raises:
        DataCorruptError: not the expected key, or a member that is not a plain array.
    """
    fields = _own_members(data, key)
    if fields is None:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        source = {"url": shard, "stream": io.BytesIO(data)}
        samples = list(group_by_keys(tar_file_expander([source])))
        if len(samples) != 1 or samples[0]["__key__"] != key:
            raise DataCorruptError(f"{shard}: expected block {key}, found {[sample['__key__'] for sample in samples]}", _REMEDY)
        fields = {name: value for name, value in samples[0].items() if not name.startswith("__")}
    if set(fields) != set(_MEMBERS):
        raise DataCorruptError(f"{shard}: block {key} has unexpected members {sorted(fields)}", _REMEDY)
    arrays = {name: _from_npy(value, f"{shard}: {key}.{name}") for name, value in fields.items()}
    return Block(arrays["ids.npy"], arrays["sentences.npy"], arrays["documents.npy"])


def _own_members(data: bytes, key: str) -> dict[str, bytes] | None:
    """The members of a block with exactly the headers that `write_shard` writes (POSIX.1-1988), which Python's tar reader takes ten times as long
    over; None where anything else is there."""
    fields: dict[str, bytes] = {}
    offset = 0
    for name in _MEMBERS:
        path = f"{key}.{name}\0".encode()
        size = data[offset + 124 : offset + 135]
        if not data.startswith(path, offset) or data[offset + 156 : offset + 157] != b"0" or not size.isdigit():
            return None
        start = offset + _TAR_BLOCK
        stop = start + int(size, 8)
        fields[name] = data[start:stop]
        offset = -(-stop // _TAR_BLOCK) * _TAR_BLOCK
    return fields if offset == len(data) else None


def _to_npy(array: NDArray[np.integer]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _from_npy(data: bytes, where: str) -> NDArray[np.integer]:
    """A read-only view. The headers that `_to_npy` writes are recognised as they are: NumPy's reader parses them as Python code, which takes longer
    than all the rest of a small block, and would take more than flat arrays of unsigned integers."""
    header = _NPY.match(data)
    if header is None:
        raise DataCorruptError(f"{where} is not a plain array: expected a flat array of unsigned integers, found {bytes(data[:64])!r}", _REMEDY)
    dtype, size = np.dtype(header["dtype"].decode()), int(header["size"])
    if len(data) - header.end() != size * dtype.itemsize:
        raise DataCorruptError(f"{where}: expected {size} items of {dtype.itemsize} bytes, found {len(data) - header.end()} bytes", _REMEDY)
    return np.frombuffer(data, dtype, size, header.end())
