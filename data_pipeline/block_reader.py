"""Reads the blocks of one corpus: from a local disk at once, from a store ahead of use and through the node's cache; verified before use."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from data_pipeline import remote
from data_pipeline.block_cache import BlockCache
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataCorruptError
from data_pipeline.shards import Block, BlockExtent, checksum64, damaged_block, decode_block, find_damage, holds_block, missing_shard, read_block
from data_pipeline.storage import Location


@dataclass(frozen=True)
class BlockPlace:
    """Where a block lies."""

    shard: str
    number: int
    extent: BlockExtent


class BlockReader:
    """Blocks of the corpus in `folder`. For one thread; reads of a store run behind it."""

    def __init__(self, folder: Location, settings: DataConfig) -> None:
        self._folder = folder
        self._settings = settings
        self._cache = BlockCache.of(settings)
        self._slots = asyncio.Semaphore(settings.concurrent_reads)
        self._ahead: OrderedDict[BlockPlace, Future[bytes]] = OrderedDict()

    def read(self, place: BlockPlace) -> Block:
        """The block, verified.

        Raises:
            DataCorruptError: its shard is missing, cut or damaged; a store was asked twice.
            UnreachableError: its store gave no answer within `data.total_timeout_s`.
        """
        shard = self._folder / place.shard
        if shard.is_local:
            return read_block(shard, place.number, place.extent)
        future = self._ahead.pop(place, None) or self._start(place)
        return decode_block(remote.wait(future, shard.url, self._settings), shard, place.number)

    def read_ahead(self, places: Iterable[BlockPlace]) -> None:
        """Begin to read blocks that will be wanted, the soonest first. Of more than `data.read_ahead_bytes` the oldest are given up."""
        if self._folder.is_local:
            return
        for place in places:
            if place not in self._ahead:
                self._ahead[place] = self._start(place)
        held = sum(place.extent.num_bytes for place in self._ahead)
        while held > self._settings.read_ahead_bytes:
            place, future = self._ahead.popitem(last=False)
            future.cancel()
            held -= place.extent.num_bytes

    def _start(self, place: BlockPlace) -> "Future[bytes]":
        return remote.start(self._fetch(place, remote.Store.of((self._folder / place.shard).url)))

    async def _fetch(self, place: BlockPlace, store: remote.Store) -> bytes:
        """The block's bytes, from the cache or the store; intact. `_slots` bounds the reads of the store under way."""
        key = f"{place.extent.checksum:016x}{place.extent.num_bytes:08x}"
        kept = await asyncio.to_thread(self._cache.get, key, partial(_is_intact, place.extent))
        if kept is not None:
            return kept
        async with self._slots:
            data = await self._fetch_intact(place, store)
        await asyncio.to_thread(self._cache.put, key, data)
        return data

    async def _fetch_intact(self, place: BlockPlace, store: remote.Store) -> bytes:
        """Read, and read once more what is not what was written: it may have been damaged on the way."""
        shard, extent = self._folder / place.shard, place.extent
        deadline = remote.deadline_of(self._settings)
        read = partial(remote.range_of, store, extent.offset, extent.offset + extent.num_bytes)
        error: DataCorruptError | None = None
        for _ in range(2):
            try:
                data = await remote.with_retries(shard.url, read, self._settings, deadline)
            except FileNotFoundError:
                error = missing_shard(shard, place.number)
                continue
            damage = await asyncio.to_thread(find_damage, data, extent)
            if damage is None:
                return data
            if holds_block(data, extent):
                raise remote.ranges_ignored(shard.url)
            error = damaged_block(shard, place.number, damage)
        assert error is not None
        raise error


def _is_intact(extent: BlockExtent, data: bytes) -> bool:
    return len(data) == extent.num_bytes and checksum64(data) == extent.checksum
